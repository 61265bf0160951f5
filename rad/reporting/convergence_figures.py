"""Figures of convergence: what curves log against distillation tokens.

Views are not mixed: a panel has the controlled runs of one teacher, or the faithful ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import blended_transform_factory

from rad.reporting.collect import CurvePoint, Results, RunResult
from rad.reporting.figures import log_axis, panel_grid, selector_legend
from rad.reporting.plan import Block, cells, races, row_titles, trained
from rad.reporting.scores import final_kl, members, probed_tasks
from rad.reporting.statistics import wilson
from rad.reporting.style import MUTED, Mark, marks, panel_title
from rad.reporting.writers import count

Value = Callable[[CurvePoint], float | None]

tokens_axis = FuncFormatter(lambda value, _: count(value) if value else "0")


def _series(group: Sequence[RunResult], value: Value) -> tuple[list[int], list[list[float]]]:
    """Tokens, and the values of all seeds that logged there."""
    gathered: dict[int, list[float]] = {}
    for result in group:
        for point in result.curve:
            number = value(point)
            if number is not None:
                gathered.setdefault(point.tokens, []).append(number)
    order = sorted(gathered)
    return order, [gathered[tokens] for tokens in order]


def _draw_series(axes: Axes, group: Sequence[RunResult], value: Value, mark: Mark) -> None:
    """Mean over seeds as a line; the range over seeds as a band when there are several.

    Earlier lines are wider: selectors that chose the same placement have the same curve, and the
    one underneath stays visible.
    """
    tokens, values = _series(group, value)
    if not tokens:
        return
    excess = max(0.0, 2.7 - 0.9 * len(axes.lines))
    means = [float(np.mean(seeds)) for seeds in values]
    axes.plot(
        tokens,
        means,
        marker=mark.marker,
        markevery=max(1, len(tokens) // 6),
        markersize=4.2 + excess,
        linewidth=1.5 + excess,
        **mark.line,
    )
    if len(group) > 1:
        lows, highs = [min(seeds) for seeds in values], [max(seeds) for seeds in values]
        axes.fill_between(tokens, lows, highs, color=mark.color, alpha=0.15, linewidth=0)


def note_if_empty(axes: Axes, text: str) -> None:
    if not axes.lines:
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=MUTED)


def _held_out_kl(point: CurvePoint) -> float | None:
    return point.held_out_kl


def _agreement(point: CurvePoint) -> float | None:
    """Share of tokens in percent."""
    return None if point.agreement is None else 100 * point.agreement


def _token_axis(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(tokens_axis)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _goal(axes: Axes, results: Results, block: Block, teacher: str) -> None:
    """A dotted line at the KL that the reference ends with, where others race against it."""
    for race in races(results.study):
        if race.block == block and race.teacher == teacher:
            value = final_kl(members(results, race.baseline))
            if value is not None:
                color = marks(results.study)[race.baseline.selector].color
                axes.axhline(value, color=color, ls=":", lw=1.0, zorder=1.5)


def convergence_kl(results: Results, block: Block) -> Figure:
    """Held-out KL from the base against distillation tokens, one panel per teacher.

    Where the curves have it, the agreement with the base's most likely token is drawn as well:
    below, or beside it when there is a single teacher.
    """
    chosen, runs = (
        marks(results.study),
        [result for cell in block.cells for result in members(results, cell)],
    )
    agreed = any(point.agreement is not None for result in runs for point in result.curve)
    kinds: list[Value] = [_held_out_kl, _agreement] if agreed else [_held_out_kl]
    alone = len(block.teachers) == 1
    rows, columns = (1, len(kinds)) if alone else (len(kinds), len(block.teachers))
    width = 5.0 if rows == columns == 1 else 3.4 if alone else 2.9
    height = 2.4 if rows > 1 else 2.7
    figure, grid = panel_grid(
        rows, columns, width, height, sharex=True, sharey=False if alone else "row"
    )
    wanted = [(kind, teacher) for kind in kinds for teacher in block.teachers]
    panels = [axes for axes_row in grid for axes in axes_row]
    for index, (axes, (kind, teacher)) in enumerate(zip(panels, wanted, strict=True)):
        if index < columns:
            panel_title(axes, f"teacher: {teacher}")
        for cell in block.cells:
            if cell.teacher == teacher:
                _draw_series(axes, members(results, cell), kind, chosen[cell.selector])
        if kind is _held_out_kl:
            log_axis(axes)
            note_if_empty(axes, "no held-out KL was logged")
            _goal(axes, results, block, teacher)
        _token_axis(axes)
        if index + columns >= len(wanted):
            axes.set_xlabel("distillation tokens")
        if alone or index % columns == 0:
            label = "held-out KL from the base\n(nats / token)"
            axes.set_ylabel(
                label if kind is _held_out_kl else "same most likely token\nas the base (%)"
            )
    selector_legend(figure, block.selectors, chosen)
    return figure


def convergence_probe(results: Results, block: Block) -> Figure:
    """Probe score against distillation tokens: a row per task and a column per teacher.

    With a single teacher tasks stand side by side instead.
    """
    chosen, names = marks(results.study), probed_tasks(results, block.cells) or [""]
    samples = results.study.evaluation.probe_samples
    wanted = [(name, teacher) for name in names for teacher in block.teachers]
    alone = len(block.teachers) == 1
    columns = min(3, len(names)) if alone else len(block.teachers)
    rows = math.ceil(len(wanted) / columns)
    figure, grid = panel_grid(rows, columns, 2.9, 2.0, sharex=True, sharey=True)
    panels = [axes for axes_row in grid for axes in axes_row]
    for axes in panels[len(wanted) :]:
        axes.set_visible(False)
    for index, (axes, (name, teacher)) in enumerate(zip(panels, wanted, strict=False)):
        if alone:
            panel_title(axes, name)
        elif index < columns:
            panel_title(axes, f"teacher: {teacher}")
        for cell in block.cells:
            if cell.teacher == teacher:
                group = members(results, cell)
                _draw_series(axes, group, _probe_value(name), chosen[cell.selector])
        note_if_empty(axes, "no probe scores were logged")
        _resolution(axes, samples)
        axes.set_ylim(-4, 104)
        axes.set_yticks([0, 25, 50, 75, 100])
        _token_axis(axes)
        if index % columns == 0:
            answers = f"right answers (%), n = {samples}"
            axes.set_ylabel(answers if alone else f"{name}\n{answers}")
        if index + columns >= len(wanted):
            axes.set_xlabel("distillation tokens")
            axes.tick_params(axis="x", labelbottom=True)
    selector_legend(figure, block.selectors, chosen)
    return figure


def _resolution(axes: Axes, documents: int) -> None:
    """A bar as long as the 95 % interval of a score of 50 % of so many documents."""
    low, high = wilson(documents / 2, documents)
    place = blended_transform_factory(axes.transAxes, axes.transData)
    axes.plot([1.0] * 2, [100 * low, 100 * high], color=MUTED, lw=3.0, alpha=0.45, transform=place)


def _probe_value(name: str) -> Value:
    """Reads a probe score in percent off a point."""

    def read(point: CurvePoint) -> float | None:
        return 100 * point.probe[name] if name in point.probe else None

    return read


def convergence_faithful(results: Results) -> Figure:
    """Held-out KL of the faithful runs; each line has its own label, recipes differ."""
    chosen = marks(results.study)
    everything = cells(results.study, "faithful")
    titles = row_titles(everything)
    figure, grid = panel_grid(1, 1, 6.2, 2.6)
    axes = grid[0][0]
    seen: dict[str, int] = {}
    for cell in trained(results.study, everything):
        # one selector may stand in several rows: same colour, other dashes
        turn = seen[cell.selector] = seen.get(cell.selector, -1) + 1
        base = chosen[cell.selector]
        dashes = [base.dashes, (5.0, 1.5), (1.5, 1.5), (6.0, 1.5, 1.5, 1.5)][turn % 4]
        mark = Mark(base.color, base.marker, dashes)
        _draw_series(axes, members(results, cell), _held_out_kl, mark)
        axes.plot([], [], marker=mark.marker, label=titles[cell], **mark.line)
    log_axis(axes)
    axes.xaxis.set_major_formatter(tokens_axis)
    axes.set_xlabel("distillation tokens")
    axes.set_ylabel("held-out KL from the base\n(nats / token)")
    figure.legend(loc="outside right upper", handlelength=3.2)
    return figure
