"""Figure of RULER: score against context length, selectors as lines, one figure per block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from rad.evaluation.scoring.ruler import THRESHOLD
from rad.reporting.collect import Results
from rad.reporting.convergence_figures import note_if_empty
from rad.reporting.figures import guides, legend, panel_grid
from rad.reporting.plan import Block, length_tasks
from rad.reporting.ruler_tables import by_length, lengths_of
from rad.reporting.scores import documents_of, members
from rad.reporting.statistics import Estimate
from rad.reporting.style import MUTED, marks, panel_title

APART = 1.025  # factor between the selectors of a length, so that their intervals can be told


def _draw(axes: Axes, values: Mapping[int, Estimate], shift: float, **style: Any) -> None:
    """A line through the lengths with an interval at each, all moved along by a factor."""
    at = [length * shift for length in values]
    color = style["color"]
    axes.plot(at, [100 * value.value for value in values.values()], lw=1.5, **style)
    for x, value in zip(at, values.values(), strict=True):
        axes.plot([x, x], [100 * value.low, 100 * value.high], color=color, lw=1.1, alpha=0.75)


def ruler(results: Results, block: Block) -> Figure:
    """Mean over sub-tasks against length: a row per RULER task, a column per teacher.

    Grey: the untouched base and the student without attention; dash-dotted: what counts for
    the effective length.
    """
    chosen, wanted = marks(results.study), length_tasks(results.study)
    figure, grid = panel_grid(len(wanted), len(block.teachers), 3.0, 2.5, sharey=True)
    shown = guides(results, block.base)
    for axes_row, task in zip(grid, wanted, strict=True):
        families = by_length(results, task)
        counts = sorted(documents_of(results, family) for family in families.values()) or [0]
        n = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
        for column, (axes, teacher) in enumerate(zip(axes_row, block.teachers, strict=True)):
            panel_title(axes, f"{task.name}, teacher: {teacher}")
            for _, group, dashes in shown:
                _draw(axes, lengths_of(group, families), 1.0, color=MUTED, ls=dashes)
            for index, selector in enumerate(block.selectors):
                cell = block.cell(selector, teacher)
                if cell is not None:
                    values = lengths_of(members(results, cell), families)
                    mark = chosen[selector]
                    shift = APART ** (index - (len(block.selectors) - 1) / 2)
                    _draw(axes, values, shift, marker=mark.marker, ms=4.5, **_line(mark.line))
            axes.axhline(100 * THRESHOLD, color=MUTED, ls="-.", lw=0.9, zorder=1.5)
            note_if_empty(axes, "missing data")
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(FixedLocator(list(task.lengths)))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _tokens(value)))
            axes.set_xlim(0.85 * task.lengths[0], task.lengths[-1] / 0.85)
            axes.set_ylim(-4, 104)
            axes.set_xlabel(f"context in tokens (n = {n} per length)")
            if column == 0:
                axes.set_ylabel("mean of sub-tasks (%)")
    handles: list[Any] = [
        Line2D([], [], marker=chosen[name].marker, label=name, **chosen[name].line)
        for name in block.selectors
    ]
    handles += [Line2D([], [], color=MUTED, ls=dashes, lw=1, label=t) for t, _, dashes in shown]
    legend(figure, handles, 2.6)
    return figure


def _line(style: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in style.items() if key != "linewidth"}


def _tokens(value: float) -> str:
    """A length in tokens, binary thousands as k."""
    whole = round(value)
    return f"{whole // 1024}k" if whole >= 1024 and whole % 1024 == 0 else f"{whole}"
