"""The placement map: layer against head, one panel per placement, kept heads in colour."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from rad.placement import Placement
from rad.reporting.collect import Results
from rad.reporting.describe import budget_text
from rad.reporting.figures import legend
from rad.reporting.selection_tables import placements
from rad.reporting.statistics import Array
from rad.reporting.style import GRID, INK, MUTED, marks, new_figure, panel_title

PANELS_PER_ROW = 4
LIGHTEST, DARKEST = 0.97, 0.62  # greys of the lowest and highest score; ink stays readable


def importance(placement: Placement) -> Array | None:
    """(layers, heads) scores scaled to 0-1, 1 for what its selector wants to keep; or None."""
    if placement.scores is None:
        return None
    values = np.asarray(placement.scores.values, dtype=np.float64)
    if values.ndim == 1:
        values = np.repeat(values[:, None], placement.heads, axis=1)
    if values.shape != (placement.layers, placement.heads) or not np.isfinite(values).all():
        return None
    if not placement.scores.higher_is_kept:
        values = -values
    spread = values.max() - values.min()
    scaled = (values - values.min()) / spread if spread > 0 else np.zeros_like(values)
    # a few heads dominate: without the root everything else would look alike
    return np.asarray(np.sqrt(scaled))


def _draw(axes: Axes, placement: Placement, color: str) -> None:
    shades = importance(placement)
    kept = set(placement.softmax)
    cells, colors = [], []
    for layer in range(placement.layers):
        for head in range(placement.heads):
            cells.append(Rectangle((head - 0.5, layer - 0.5), 1, 1))
            shade = 0.0 if shades is None else float(shades[layer, head])
            colors.append(str(LIGHTEST + (DARKEST - LIGHTEST) * shade))
    axes.add_collection(
        PatchCollection(cells, facecolors=colors, edgecolors="white", linewidths=0.8)
    )
    # inset squares: the shade of a kept head stays visible around its mark; on a deep model the
    # cells are small and the mark needs the room
    half = 0.32 if placement.layers <= 16 else 0.44
    marked = [
        Rectangle((head - half, layer - half), 2 * half, 2 * half) for layer, head in sorted(kept)
    ]
    axes.add_collection(
        PatchCollection(marked, facecolors=color, edgecolors="white", linewidths=0.6)
    )
    axes.set_xlim(-0.5, placement.heads - 0.5)
    axes.set_ylim(placement.layers - 0.5, -0.5)
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(9, integer=True))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def placement_map(results: Results, view: str) -> Figure:
    """Every placement of a view; rows are layers (first on top), columns query heads."""
    chosen: Mapping[tuple[str, str, str], Placement] = placements(results, view)
    colors = marks(results.study)
    columns = min(PANELS_PER_ROW, len(chosen))
    rows = math.ceil(len(chosen) / columns)
    layers = max(placement.layers for placement in chosen.values())
    width, height = 2.1, min(4.6, 0.2 * layers + 1.0)
    figure = new_figure(max(columns * width + 0.5, 4.6), rows * height + 0.7)
    grid = figure.subplots(rows, columns, squeeze=False)
    several_bases = len({base for base, _, _ in chosen}) > 1
    panels = list(grid.flat)
    for axes, ((base, selector, budget), placement) in zip(panels, chosen.items(), strict=False):
        where = f"{base}, " if several_bases else ""
        panel_title(axes, f"{selector}\n")
        # a long name must not run into the next panel
        axes.title.set_fontsize(min(9.5, 9.5 * 17 / max(len(selector), 1)))
        axes.text(
            0,
            1.015,
            f"{where}{budget_text(budget)}",
            transform=axes.transAxes,
            fontsize=8,
            color=MUTED,
            va="bottom",
        )
        _draw(axes, placement, colors[selector].color)
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    for index, axes in enumerate(panels[: len(chosen)]):
        if index % columns == 0:
            axes.set_ylabel("layer")
        if index + columns >= len(chosen):
            axes.set_xlabel("query head")
    handles = [
        Patch(facecolor=INK, edgecolor="white", label="stays softmax attention"),
        Patch(facecolor=str(LIGHTEST), edgecolor=GRID, label="converted, low score or none"),
        Patch(facecolor=str(DARKEST), edgecolor=GRID, label="high score of its selector"),
    ]
    legend(figure, handles, 1.2)
    return figure
