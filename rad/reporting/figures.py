"""Figures of scores, and what all figures share. Each returns a figure; nothing is saved here.

Views are not mixed: controlled figures show controlled runs, with reference models as guides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, MultipleLocator, NullFormatter

from rad.reporting.collect import Results, RunResult
from rad.reporting.describe import reference_rows
from rad.reporting.plan import Block, Cell, blocks
from rad.reporting.scores import Family, documents_of, estimate, families, members
from rad.reporting.statistics import Estimate
from rad.reporting.style import MUTED, Mark, marks, new_figure, panel_title
from rad.reporting.writers import size

bytes_axis = FuncFormatter(lambda value, _: size(value) if value else "0")


def legend(figure: Figure, handles: Sequence[Any], handle_length: float = 2.0) -> None:
    """A legend above all panels with as many columns as the figure is wide enough for."""
    fitting = 1
    labels = [len(str(handle.get_label())) for handle in handles]
    for columns in range(2, len(handles) + 1):
        # entries run down the columns, the first of which are one longer where it does not come
        # out even; 5.4 points a letter is wide for 8.5 point text
        depth, longer = divmod(len(labels), columns)
        starts = [column * depth + min(column, longer) for column in range(columns + 1)]
        width = sum(
            8.5 * (handle_length + 2.8) + 5.4 * max(labels[start:end])
            for start, end in pairwise(starts)
        )
        if width <= 72 * figure.get_figwidth():
            fitting = columns
    figure.legend(
        handles=list(handles),
        loc="outside upper left",
        ncols=fitting,
        handlelength=handle_length,
    )


def selector_legend(figure: Figure, names: Sequence[str], chosen: dict[str, Mark]) -> None:
    """A legend of selectors: markers and lines as drawn."""
    handles = [
        Line2D([], [], marker=chosen[name].marker, label=name, **chosen[name].line)
        for name in names
    ]
    legend(figure, handles, 2.6)


def panel_grid(
    rows: int, columns: int, width: float, height: float, **shared: Any
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of `rows` x `columns` panels, sizes per panel in inches, room for a legend."""
    figure = new_figure(max(width * columns + 0.7, 4.6), height * rows + 0.6)
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    return figure, [list(row) for row in axes]


def log_axis(axes: Axes) -> None:
    """Logarithmic y axis with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _extent(results: Results, family: Family) -> str:
    """How much a family's score is made of."""
    tasks = f"{len(family.tasks)} tasks, " if len(family.tasks) > 1 else ""
    return f"{tasks}n = {documents_of(results, family):,}"


def nothing(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure, grid = panel_grid(1, 1, 4.6, 1.0)
    grid[0][0].text(0.5, 0.5, text, ha="center", va="center", color=MUTED)
    grid[0][0].set_axis_off()
    return figure


def _display(family: Family, value: Estimate) -> tuple[float, float, float]:
    scale = 100.0 if family.is_share else 1.0
    return scale * value.value, scale * value.low, scale * value.high


def _axis_title(family: Family) -> str:
    if family.is_perplexity:
        return "perplexity (lower is better)"
    return "score (%)" if family.is_share else f"{family.metric}"


def _log_if_wide(axes: Axes, family: Family, values: Sequence[float], axis: str) -> None:
    """Perplexities that span an order of magnitude go on a logarithmic axis."""
    if family.is_perplexity and values and max(values) > 10 * min(values):
        (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
        which = axes.xaxis if axis == "x" else axes.yaxis
        which.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        which.set_minor_formatter(NullFormatter())


def guides(results: Results, base: str) -> list[tuple[str, list[RunResult], str]]:
    """Reference lines: the base itself and the student without attention, when there are any."""
    found: list[tuple[str, list[RunResult], str]] = []
    for title, role, group, cell in reference_rows(results):
        if role == "base" and title == base:
            found.append((f"{title}, untouched", group, "-"))
        elif cell is not None and cell.base == base:
            placement = group[0].placement
            if placement is not None and not placement.softmax:
                found.append((title, group, ":"))
    return found


def scores(results: Results, block: Block) -> Figure:
    """Score with 95 % interval: a panel per family, a row per teacher and selector."""
    chosen, everything = marks(results.study), families(results)
    if not everything:
        return nothing("missing data: no task was scored")
    positions: dict[Cell, float] = {}
    ticks: list[tuple[float, str]] = []
    at = 0.0
    for teacher in block.teachers:
        start = at
        for selector in block.selectors:
            cell = block.cell(selector, teacher)
            if cell is not None:
                positions[cell] = at
                at += 1
        ticks.append(((start + at - 1) / 2, f"teacher:\n{teacher}"))
        at += 0.8
    figure, grid = panel_grid(1, len(everything), 2.75, 0.21 * at + 1.1, sharey=True)
    lines = guides(results, block.base)
    for axes, family in zip(grid[0], everything, strict=True):
        panel_title(axes, f"{family.name} ({_extent(results, family)})")
        drawn = []
        for _, group, style in lines:
            drawn.append(estimate(group, family).value)
            axes.axvline(_display(family, estimate(group, family))[0], color=MUTED, ls=style, lw=1)
        for cell, position in positions.items():
            value, low, high = _display(family, estimate(members(results, cell), family))
            drawn.append(value)
            mark = chosen[cell.selector]
            axes.plot([low, high], [position] * 2, color=mark.color, lw=1.6, solid_capstyle="butt")
            axes.plot([value], [position], marker=mark.marker, color=mark.color, ls="", ms=6)
        axes.set_xlabel(_axis_title(family))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        _log_if_wide(axes, family, drawn, "x")
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    first = grid[0][0]
    first.set_ylim(at - 0.8, -0.8)
    first.set_yticks([tick for tick, _ in ticks], [text for _, text in ticks])
    handles: list[Any] = [
        Line2D([], [], marker=chosen[name].marker, color=chosen[name].color, ls="", label=name)
        for name in block.selectors
    ]
    handles += [Line2D([], [], color=MUTED, ls=style, lw=1, label=t) for t, _, style in lines]
    legend(figure, handles)
    return figure


def score_vs_kv(results: Results) -> Figure:
    """Score against KV bytes per token: a column per family, a row per teacher."""
    chosen, everything = marks(results.study), families(results)
    if not everything:
        return nothing("missing data: no task was scored")
    members_of = [cell for block in blocks(results.study) for cell in block.cells]
    teachers = list(dict.fromkeys(cell.teacher for cell in members_of))
    selectors = list(dict.fromkeys(cell.selector for cell in members_of))
    bases = {cell.base for cell in members_of}
    guides = [
        (title, group)
        for title, role, group, cell in reference_rows(results)
        if (cell is not None and cell.base in bases) or (cell is None and title in bases)
    ]
    height = 2.05 if len(teachers) > 1 else 2.5
    figure, grid = panel_grid(
        len(teachers), len(everything), 2.9, height, sharex=True, sharey="col"
    )
    widest = max(
        [result.efficiency.kv_bytes_per_token for _, group in guides for result in group]
        + [members(results, cell)[0].efficiency.kv_bytes_per_token for cell in members_of]
    )
    # placements of one budget cost the same: side by side they stay readable
    step = 0.022 * (widest or 1.0)
    grey = ("*", "X", "P", "p", "d")
    for axes_row, teacher in zip(grid, teachers, strict=True):
        for column, (axes, family) in enumerate(zip(axes_row, everything, strict=True)):
            panel_title(axes, f"{family.name}, teacher: {teacher}")
            axes.set_title(_extent(results, family), loc="right", fontsize=8, color=MUTED)
            for index, (_, group) in enumerate(guides):
                x = group[0].efficiency.kv_bytes_per_token
                _point(axes, x, estimate(group, family), family, MUTED, grey[index % len(grey)])
            for index, selector in enumerate(selectors):
                offset = step * (index - (len(selectors) - 1) / 2)
                points = []
                for cell in members_of:
                    if (cell.selector, cell.teacher) == (selector, teacher):
                        group = members(results, cell)
                        x = group[0].efficiency.kv_bytes_per_token + offset
                        value = estimate(group, family)
                        mark = chosen[selector]
                        _point(axes, x, value, family, mark.color, mark.marker)
                        points.append((x, _display(family, value)[0]))
                if len(points) > 1:
                    points.sort()
                    xs, ys = zip(*points, strict=True)
                    axes.plot(xs, ys, lw=1.0, alpha=0.7, **_thin(chosen[selector]))
            axes.xaxis.set_major_formatter(bytes_axis)
            axes.xaxis.set_major_locator(MultipleLocator(_binary_step(widest)))
            axes.set_xlim(-0.06 * (widest or 1.0), 1.08 * (widest or 1.0))
            shown = [estimate(group, family).value for _, group in guides]
            shown += [estimate(members(results, cell), family).value for cell in members_of]
            _log_if_wide(axes, family, shown, "y")
            if column == 0 or family.is_perplexity:
                axes.set_ylabel(_axis_title(family))
    for axes in grid[-1]:
        axes.set_xlabel("KV cache per token")
    handles = [
        Line2D([], [], marker=chosen[name].marker, color=chosen[name].color, ls="", label=name)
        for name in selectors
    ]
    handles += [
        Line2D([], [], marker=grey[index % len(grey)], color=MUTED, ls="", label=title)
        for index, (title, _) in enumerate(guides)
    ]
    legend(figure, handles)
    return figure


def _binary_step(largest: float) -> float:
    """Distance of ticks in bytes: a power of two that gives about four."""
    return float(2 ** math.ceil(math.log2(max(largest, 1.0) / 5)))


def _thin(mark: Mark) -> dict[str, Any]:
    return {key: value for key, value in mark.line.items() if key != "linewidth"}


def _point(axes: Axes, x: float, value: Estimate, family: Family, color: str, marker: str) -> None:
    """A point with its interval as a vertical bar."""
    y, low, high = _display(family, value)
    axes.plot([x, x], [low, high], color=color, lw=1.3, solid_capstyle="butt")
    axes.plot([x], [y], marker=marker, color=color, ls="", ms=5.5, mew=0.5)
