"""Figures of selection: what quality costs to find, and where selectors agree."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from rad.reporting.collect import Results
from rad.reporting.describe import budget_text
from rad.reporting.figures import legend, log_axis, panel_grid
from rad.reporting.plan import CostGroup
from rad.reporting.scores import final_kl, mean_score, members
from rad.reporting.selection_tables import Pairs, correlated, flops_of, pairwise
from rad.reporting.statistics import Array
from rad.reporting.style import GRID, MUTED, marks, new_figure
from rad.reporting.writers import MINUS

# seconds: below this no model ran, and what was measured is the time to write a list
INSTANT = 0.1
CELL = 0.43  # side of a cell of a heat map in inches
SMALLEST, LARGEST = 5.0, 8.5  # marker sizes of the smallest and the largest budget, in points


@dataclass(frozen=True)
class Point:
    """One selector at one budget; `kl` or `score` (value, low, high, in percent) may be missing."""

    selector: str
    budget: str
    flops: float | None
    seconds: float
    kl: float | None
    score: tuple[float, float, float] | None
    documents: int


def _points(results: Results, group: CostGroup) -> list[Point]:
    points = []
    for cell in group.cells:
        students = members(results, cell)
        placement = students[0].placement
        assert placement is not None
        value = mean_score(results, students)
        scaled = None if value is None else (100 * value.value, 100 * value.low, 100 * value.high)
        seconds = placement.cost.seconds
        flops, kl = flops_of(placement), final_kl(students)
        n = 0 if value is None else value.n
        points.append(Point(cell.selector, cell.budget, flops, seconds, kl, scaled, n))
    return points


def _sizes(results: Results, group: CostGroup) -> dict[str, float]:
    """Marker size per budget: more attention, larger marker."""
    kept: dict[str, list[float]] = {}
    for cell in group.cells:
        placement = members(results, cell)[0].placement
        assert placement is not None
        kept.setdefault(cell.budget, []).append(placement.fraction())
    order = sorted(kept, key=lambda budget: (float(np.mean(kept[budget])), budget))
    if len(order) == 1:
        return {order[0]: 6.5}
    step = (LARGEST - SMALLEST) / (len(order) - 1)
    return {budget: SMALLEST + step * index for index, budget in enumerate(order)}


def cost_axis(axes: Axes, costs: list[float], zero: str) -> float:
    """A logarithmic x axis with a strip for cost zero left of a marked break, labelled `zero`.

    Returns the width of the strip in units of the axis, 0 when nothing is free.
    """
    positive = [cost for cost in costs if cost > 0]
    if not positive:
        axes.set_xlim(-1, 1)
        axes.set_xticks([0], [zero])
        return 1.0
    low = 10.0 ** math.floor(math.log10(min(positive) / 1.1))
    high = max(positive) * 1.8
    decades = math.log10(high / low)
    digits = (1, 2, 5) if decades < 1.7 else (1, 3) if decades < 2.3 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [digit * 10.0**power for power in powers for digit in digits]
    ticks = [tick for tick in ticks if low <= tick <= high]
    ticks = ticks[:: math.ceil(len(ticks) / 6)]
    labels = {tick: _power(tick) for tick in ticks}
    free = len(positive) < len(costs)
    if free:
        axes.set_xscale("symlog", linthresh=low, linscale=0.55)
        axes.set_xlim(-0.55 * low, high)
        axes.axvspan(-0.55 * low, 0.55 * low, color=GRID, alpha=0.45, linewidth=0, zorder=0)
        labels[0.0] = zero
        for at in (0.66, 0.76):
            axes.plot(
                [(at - 0.05) * low, (at + 0.05) * low],
                [-0.022, 0.022],
                transform=axes.get_xaxis_transform(),
                color=MUTED,
                linewidth=0.9,
                clip_on=False,
            )
    else:
        axes.set_xscale("log")
        axes.set_xlim(min(positive) / 1.8, high)
        labels = {tick: text for tick, text in labels.items() if tick >= min(positive) / 1.8}
    axes.xaxis.set_major_locator(FixedLocator(sorted(labels)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: labels.get(value, "")))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    return 0.8 * low if free else 0.0


def _power(value: float) -> str:
    """Plain up to ten thousand, a power of ten above."""
    if value < 1e4:
        return f"{value:g}"
    exponent = math.floor(math.log10(value) + 1e-9)
    digit = round(value / 10.0**exponent)
    power = f"10^{{{exponent}}}"
    return f"${power}$" if digit == 1 else f"${digit}\\times{power}$"


def _draw_costs(
    axes: Axes,
    results: Results,
    points: list[tuple[Point, float]],
    sizes: dict[str, float],
    what: str,
    zero: str,
) -> None:
    """Points (with their cost) of one panel; `what` is `kl` or `score`."""
    chosen = marks(results.study)
    strip = cost_axis(axes, [cost for _, cost in points], zero)
    free = list(dict.fromkeys(point.selector for point, cost in points if cost == 0))
    heights: list[float] = []
    for point, cost in points:
        value = point.kl if what == "kl" else point.score and point.score[0]
        if value is None:
            continue
        heights.append(value)
        # free selectors stand side by side in the strip: all of them cost nothing
        offset = (free.index(point.selector) + 0.5) / len(free) - 0.5 if cost == 0 else 0.0
        x = cost + offset * strip
        mark = chosen[point.selector]
        # budgets often cost the same to choose for: a few points apart their intervals show
        turn = list(sizes).index(point.budget) - (len(sizes) - 1) / 2
        shift = axes.transData + ScaledTranslation(4.5 * turn / 72, 0, axes.figure.dpi_scale_trans)
        if what == "score" and point.score is not None:
            low, high = point.score[1:]
            heights += [low, high]
            axes.plot([x, x], [low, high], color=mark.color, lw=1.3, transform=shift)
            ends: Any = {"marker": "_", "ms": 5.0, "mew": 1.2, "ls": ""}
            axes.plot([x, x], [low, high], color=mark.color, transform=shift, **ends)
        axes.plot(
            [x],
            [value],
            marker=mark.marker,
            color=mark.color,
            markersize=sizes[point.budget],
            markeredgecolor="white",
            markeredgewidth=0.6,
            linestyle="",
            zorder=3,
            transform=shift,
        )
    if not heights:
        return
    # shifted points do not take part in automatic limits
    low, high = min(heights), max(heights)
    if what == "kl" and high > 4 * low > 0:
        pad = (high / low) ** 0.1
        log_axis(axes)
        axes.set_ylim(low / pad, high * pad)
    else:
        pad = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - pad, high + pad)
        axes.yaxis.set_major_locator(MaxNLocator(5))


def selection_cost(results: Results, group: CostGroup) -> Figure:
    """Held-out KL and mean score (columns) against FLOPs and seconds of the selection (rows).

    A row of FLOPs is there when any were counted, a column when any student has the number. What
    ran no model stands left of the break. Budgets of one selector are set a few points apart.
    """
    chosen, points = marks(results.study), _points(results, group)
    sizes = _sizes(results, group)
    rows: list[tuple[str, str, list[tuple[Point, float]]]] = []
    counted = [(point, point.flops) for point in points if point.flops is not None]
    if any(flops for _, flops in counted):
        rows.append(("FLOPs of the selection", "0", counted))
    seconds = [(p, 0.0 if p.seconds < INSTANT else p.seconds) for p in points]
    rows.append(("time of the selection (s)", f"< {INSTANT:g}", seconds))
    columns = ["kl"] if any(point.kl is not None for point in points) else []
    columns += ["score"] if any(point.score is not None for point in points) else []
    documents = next((point.documents for point in points if point.documents), 0)
    titles = {
        "kl": "held-out KL from the base ↓\n(nats / token)",
        "score": f"mean score (%) ↑\n(n = {documents:,})",
    }
    figure, grid = panel_grid(len(rows), max(len(columns), 1), 3.3, 2.35)
    for axes_row, (title, zero, priced) in zip(grid, rows, strict=True):
        for axes, what in zip(axes_row, columns, strict=False):
            _draw_costs(axes, results, priced, sizes, what, zero)
            axes.set_xlabel(title)
            axes.set_ylabel(titles[what])
    handles = [
        Line2D([], [], marker=chosen[name].marker, color=chosen[name].color, ls="", label=name)
        for name in group.selectors
    ]
    if len(sizes) > 1:
        handles += [
            Line2D([], [], marker="o", color=MUTED, ls="", ms=size, label=budget_text(budget))
            for budget, size in sizes.items()
        ]
    legend(figure, handles)
    return figure


# --- agreement ------------------------------------------------------------------------------


def _values(names: list[str], pairs: Pairs) -> Array:
    """(N, N) numbers of N selectors; NaN on the diagonal and where there is none."""
    values = np.full((len(names), len(names)), np.nan)
    for row, first in enumerate(names):
        for column, second in enumerate(names):
            number = None if first == second else pairs[first, second]
            if number is not None:
                values[row, column] = number
    return values


def _draw_matrix(axes: Axes, names: list[str], values: Array, lowest: float) -> None:
    """A heat map with its numbers; `lowest` is 0 (one hue) or -1 (two hues)."""
    colours = colormaps["Blues" if lowest == 0 else "RdBu"]
    # the darkest end would swallow the numbers
    span = np.clip(0.85 * (values - lowest) / (1 - lowest) + (0 if lowest == 0 else 0.075), 0, 1)
    for row in range(len(names)):
        for column in range(len(names)):
            if math.isnan(values[row, column]):
                face, text, ink = "#f2f3f5", "" if row == column else "–", MUTED
            else:
                red, green, blue, _ = colours(float(span[row, column]))
                face = to_hex((red, green, blue))
                text = f"{values[row, column]:.2f}".replace("-", MINUS)
                ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "#1c2026"
            axes.fill(
                [column - 0.48, column + 0.48, column + 0.48, column - 0.48],
                [row - 0.48, row - 0.48, row + 0.48, row + 0.48],
                facecolor=face,
                edgecolor="none",
            )
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=7.5)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.grid(visible=False)
    axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _heading(axes: Axes, text: str, height: float, **style: Any) -> None:
    """Text `height` points above the left corner of a panel."""
    place: Any = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(text, xytext=(0, height), va="bottom", **place, **style)


def agreement(results: Results) -> Figure:
    """A heat map per budget of the overlap of kept heads, and one of rank correlations, if any."""
    found = pairwise(results)
    several_bases = len({base for base, _ in found}) > 1
    panels: list[tuple[str, str, list[str], Array, float]] = []
    for (base, budget), (names, overlap, correlation) in found.items():
        where = f"{base}, {budget_text(budget)}" if several_bases else budget_text(budget)
        panels.append((where, "kept heads, Jaccard", names, _values(names, overlap), 0.0))
        ranked = correlated(names, correlation)
        if ranked:
            title = "layer scores, Spearman"
            panels.append((where, title, ranked, _values(ranked, correlation), -1.0))
    # sizes are known in inches, so that cells are as large in every panel
    longest = max(len(name) for _, _, names, _, _ in panels for name in names)
    left, above, below = 0.066 * longest + 0.12, 0.5, 0.042 * longest + 0.2
    slots = [max(CELL * len(names), 1.75) + left + 0.2 for _, _, names, _, _ in panels]
    columns = max(1, min(len(panels), int(9.6 // max(slots))))
    widths = [max(slots[column::columns]) for column in range(columns)]
    starts = range(0, len(panels), columns)
    heights = [
        max(CELL * len(names) for _, _, names, _, _ in panels[start : start + columns])
        for start in starts
    ]
    total = sum(heights) + len(heights) * (above + below)
    figure = new_figure(sum(widths), total)
    figure.set_layout_engine("none")
    for index, (where, title, names, values, lowest) in enumerate(panels):
        row, column = divmod(index, columns)
        side = CELL * len(names)
        x = sum(widths[:column]) + left
        top = total - sum(heights[:row]) - row * (above + below) - above
        size = (side / sum(widths), side / total)
        axes = figure.add_axes((x / sum(widths), (top - side) / total, *size))
        _draw_matrix(axes, names, values, lowest)
        _heading(axes, title, 17, fontsize=9.5, fontweight="bold")
        _heading(axes, where, 5, fontsize=8, color=MUTED)
    return figure
