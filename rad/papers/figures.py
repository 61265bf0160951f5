"""The ledger as a forest plot: every comparison's effect with its interval, and its verdict."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from rad.papers.contrast import Effect
from rad.papers.ledger import (
    INCONCLUSIVE,
    NOT_RUN,
    NOT_SUPPORTED,
    SUPPORTED,
    Entry,
    Finding,
)
from rad.papers.tables import amount, unit_of
from rad.reporting.style import INK, MUTED, new_figure

# of Okabe and Ito; the marker differs as well, so that grey prints can be read
LOOKS: dict[str, dict[str, Any]] = {
    SUPPORTED: {"color": "#009e73", "marker": "o"},
    NOT_SUPPORTED: {"color": "#d55e00", "marker": "X"},
    INCONCLUSIVE: {"color": "#5c6470", "marker": "s"},
}
PUBLISHED: dict[str, Any] = {
    "marker": "D",
    "markerfacecolor": "none",
    "markeredgecolor": "#0072b2",
    "markeredgewidth": 1.4,
    "linestyle": "none",
}
AXES = {
    "points": "effect in points of score",
    "share": "share of the other arm's score, %",
    "ratio": "ratio (logarithmic)",
    "nats": "effect in nats per token",
}
WIDTH, ROW, WRAP = 10.4, 0.42, 64


@dataclass(frozen=True)
class _Line:
    """A row of a panel."""

    entry: Entry
    found: Finding
    effect: Effect
    first: bool

    @property
    def label(self) -> str:
        """The claim where it begins, and what was compared."""
        where = textwrap.shorten(self.found.where, WRAP + 14, placeholder=" …")
        if not self.first:
            return where
        return f"{textwrap.fill(self.entry.claim.says, WRAP)}\n{where}"


def _lines(entries: Sequence[Entry]) -> dict[str, list[_Line]]:
    """Rows by unit; comparisons without an effect are left to the list below."""
    panels: dict[str, list[_Line]] = {unit: [] for unit in AXES}
    for entry in entries:
        first = True
        for found in entry.findings:
            if found.effect is not None and not math.isnan(found.effect.value):
                line = _Line(entry, found, found.effect, first)
                panels[unit_of(entry.claim)].append(line)
                first = False
    return {unit: lines for unit, lines in panels.items() if lines}


def _scale(unit: str) -> float:
    return 100.0 if unit in ("points", "share") else 1.0


def _limits(unit: str, lines: Sequence[_Line]) -> tuple[float, float]:
    """Ends of the axis from what is finite; a logarithmic one has no zero."""
    values = []
    for line in lines:
        values += [line.effect.value, line.entry.claim.test.margin]
        values += (
            [] if line.entry.claim.published.value is None else [line.entry.claim.published.value]
        )
        if math.isfinite(line.effect.error):
            values += [line.effect.low, line.effect.high]
    kept = [_scale(unit) * value for value in values if math.isfinite(value)]
    if unit == "ratio":
        kept = [value for value in kept if value > 0]
        return min(kept) / 1.4, max(kept) * 1.6
    room = 0.06 * (max(kept) - min(kept)) or 1.0
    return min(kept) - room, max(kept) + room


def _tick(value: float, _: object) -> str:
    """A tick of the logarithmic axis: 1, 2 and 5 of every decade."""
    digit = value / 10 ** math.floor(math.log10(value) + 1e-9)
    return f"{value:g}×" if round(digit) in (1, 2, 5) else ""


def _draw(axes: Axes, unit: str, lines: Sequence[_Line]) -> None:
    scale, (left, right) = _scale(unit), _limits(unit, lines)
    if unit == "ratio":
        axes.set_xscale("log")
        for axis_format in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            axis_format(FuncFormatter(_tick))
    axes.set_xlim(left, right)

    def inside(value: float) -> float:
        return min(max(scale * value, left), right)

    for row, line in enumerate(lines):
        look, claim, effect = LOOKS[line.found.verdict], line.entry.claim, line.effect
        margin = inside(claim.test.margin)
        axes.plot([margin, margin], [row - 0.42, row + 0.42], color=INK, linewidth=1.2, zorder=2)
        if math.isfinite(effect.error):
            ends = [inside(effect.low), inside(effect.high)]
            axes.plot(ends, [row, row], color=look["color"], linewidth=2.2, zorder=3)
        axes.plot(
            inside(effect.value),
            row,
            linestyle="none",
            markersize=7.5,
            markeredgecolor="white",
            markeredgewidth=0.8,
            clip_on=False,
            zorder=4,
            **look,
        )
        if not math.isfinite(scale * effect.value) or not left < scale * effect.value < right:
            text = {math.inf: "∞: before training", 0.0: "never"}.get(effect.value)
            if text:
                at_right = effect.value == math.inf
                axes.annotate(
                    text,
                    (inside(effect.value), row),
                    xytext=(-8 if at_right else 8, 0),
                    textcoords="offset points",
                    ha="right" if at_right else "left",
                    va="center",
                    fontsize=7.5,
                    color=look["color"],
                )
        if claim.published.value is not None:
            axes.plot(inside(claim.published.value), row, markersize=6, zorder=3, **PUBLISHED)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_yticks(range(len(lines)), [line.label for line in lines], fontsize=7.6, color=INK)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(AXES[unit])
    _amounts(axes, lines)


def _amounts(axes: Axes, lines: Sequence[_Line]) -> None:
    """The effect in figures at the right, with documents and seeds."""
    for row, line in enumerate(lines):
        effect = line.effect
        text = amount(line.entry.claim, effect.value)
        counts = [f"{effect.documents:,} doc."] if effect.documents else []
        counts += [f"{effect.seeds} seed{'' if effect.seeds == 1 else 's'}"] if effect.seeds else []
        axes.annotate(
            f"{text}\n{', '.join(counts) or 'exact'}",
            (1.0, row),
            xycoords=("axes fraction", "data"),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.4,
            linespacing=1.25,
            color=INK,
            annotation_clip=False,
        )


def _legend(figure: Figure, title: str) -> None:
    drawn: list[dict[str, Any]] = [
        {"linewidth": 2.2, "markersize": 7.5, "markeredgecolor": "white", "label": verdict, **look}
        for verdict, look in LOOKS.items()
    ]
    claimed = {"marker": "|", "markersize": 11, "color": INK, "label": "claimed: above"}
    drawn.append({**claimed, "linestyle": "none"})
    drawn.append({**PUBLISHED, "label": "published"})
    legend = figure.legend(
        handles=[Line2D([], [], **look) for look in drawn],
        loc="outside upper left",
        ncols=len(drawn),
        fontsize=8.2,
        title=title,
        title_fontproperties={"size": 10.5, "weight": "bold"},
        alignment="left",
    )
    legend.get_title().set_color(INK)


def forest(entries: Sequence[Entry], study: str) -> Figure:
    """A panel per unit, rows in the order of the ledger; claims that were not run are listed."""
    panels = _lines(entries)
    absent = [entry.claim.id for entry in entries if entry.verdict == NOT_RUN]
    heights = [len(lines) * 1.0 + 0.9 for lines in panels.values()]
    figure = new_figure(WIDTH, 0.9 + ROW * 1.25 * sum(heights) + 0.14 * (len(absent) // 3 + 1))
    if panels:
        drawn = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
        for axes, (unit, lines) in zip(drawn[:, 0], panels.items(), strict=True):
            _draw(axes, unit, lines)
    _legend(figure, f"The papers' claims on the study {study}")
    if absent:
        text = textwrap.fill(f"{NOT_RUN} ({len(absent)}): {', '.join(absent)}", 150)
        figure.supxlabel(text, x=0.01, ha="left", fontsize=7.4, color=MUTED)
    return figure
