"""Figures of the efficiency probe, and of the published memory accounting. Nothing is saved here.

A line is a placement (its students cost the same); the models as they are are grey.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from rad.evaluation.memory_accounting import (
    AS_PRINTED,
    BASELINES,
    MB,
    Point,
    retrieval_aware,
    saving,
)
from rad.reporting.collect import Results
from rad.reporting.describe import budget_text
from rad.reporting.efficiency_tables import (
    AS_THEY_ARE,
    Group,
    ProbePoint,
    common_context,
    groups,
    probe_points,
)
from rad.reporting.figures import legend, panel_grid
from rad.reporting.style import INK, MUTED, Mark, marks, panel_title
from rad.reporting.writers import size

# colours of Okabe and Ito (2008), for lines that are not selectors
_CYCLE = (
    Mark("#0072b2", "o", ()),
    Mark("#d55e00", "^", ()),
    Mark("#009e73", "D", ()),
    Mark("#cc79a7", "v", ()),
    Mark("#e69f00", "P", ()),
    Mark("#56b4e9", "X", ()),
    Mark("#7f4f24", "<", ()),
)
_DASHES = ((), (4.0, 1.6), (1.2, 1.2), (5.0, 1.4, 1.2, 1.4))
_GREY = ("s", "h", "p", "d", "*")

Read = Callable[[Group, ProbePoint], float | None]


def _seconds(value: float, _: object = None) -> str:
    return f"{1000 * value:g} ms" if value < 1 else f"{value:g} s"


def _bytes(value: float, _: object = None) -> str:
    return size(value)


def _plain(value: float, _: object = None) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


# title, how to read it, how ticks read, base of the ticks
PANELS: tuple[tuple[str, Read, Callable[..., str], int], ...] = (
    ("prefill, tokens/s", lambda _, point: point.prefill_tokens_per_second, _plain, 10),
    ("time to first token", lambda _, point: point.first_token_seconds, _seconds, 10),
    ("decoding, tokens/s", lambda _, point: point.decode_tokens_per_second, _plain, 10),
    ("peak memory", lambda _, point: point.peak_memory_bytes, _bytes, 2),
    ("cache of one sequence", lambda _, point: point.cache_bytes, _bytes, 2),
    (
        "decoding, times the base's speed",
        lambda group, point: group.decode_ratio(point.context, point.batch_size),
        _plain,
        10,
    ),
)


def _lines(results: Results) -> dict[str, tuple[Group, Mark]]:
    """Title -> group and how it is drawn: controlled placements, else all, and the references."""
    found = groups(results)
    students = [group for group in found if group.view == "controlled"]
    students = students or [group for group in found if group.view != AS_THEY_ARE]
    # the same placement in two views is one line
    unique = {(g.title, g.budget, g.mixer): g for g in students}
    students = list(unique.values())
    varying = [
        len({getattr(group, name) for group in students}) > 1
        for name in ("title", "budget", "mixer")
    ]
    by_selector = len({group.selector for group in students}) == len(students)
    chosen, drawn = marks(results.study), {}
    for index, group in enumerate(students):
        parts = (group.title, budget_text(group.budget), group.mixer)
        shown = [part for part, varies in zip(parts, varying, strict=True) if varies]
        title = ", ".join(shown) or group.title
        turn, place = divmod(index, len(_CYCLE))
        cycle = _CYCLE[place]
        spare = Mark(cycle.color, cycle.marker, _DASHES[turn % len(_DASHES)])
        drawn[title] = (group, chosen[group.selector] if by_selector else spare)
    grey = [group for group in found if group.view == AS_THEY_ARE]
    for index, group in enumerate(grey):
        mark = Mark(MUTED, _GREY[index % len(_GREY)], _DASHES[index % len(_DASHES)])
        drawn[group.title] = (group, mark)
    return drawn


def _axis(which: Any, text: Callable[..., str], base: int) -> None:
    """Ticks of a logarithmic axis in the panel's own unit."""
    low, high = which.get_view_interval()
    subs = (1.0, 2.0, 5.0) if base == 10 else (1.0, 1.5) if high < 4 * low else (1.0,)
    which.set_major_locator(LogLocator(base=base, subs=subs, numticks=9))
    which.set_major_formatter(FuncFormatter(text))
    which.set_minor_formatter(NullFormatter())
    which.set_minor_locator(NullLocator())


def _draw(
    lines: Mapping[str, tuple[Group, Mark]],
    select: Callable[[ProbePoint], bool],
    x: Callable[[ProbePoint], int],
    x_title: str,
) -> Figure:
    """The panels of every measure that somebody has, against `x`."""
    points = {
        title: [p for p in group.points if p.skipped is None and select(p)]
        for title, (group, _) in lines.items()
    }
    present = [
        panel
        for panel in PANELS
        if any(panel[1](group, p) for title, (group, _) in lines.items() for p in points[title])
    ]
    columns = min(3, max(1, len(present)))
    rows = max(1, -(-len(present) // columns))
    figure, grid = panel_grid(rows, columns, 3.1, 2.3)
    every = [axes for row in grid for axes in row]
    ticks = sorted({x(point) for group in points.values() for point in group})
    for axes in every[len(present) :]:
        axes.set_visible(False)
    for axes, (title, read, text, base) in zip(every, present, strict=False):
        panel_title(axes, title)
        for name, (group, mark) in lines.items():
            known = [(x(p), value) for p in points[name] if (value := read(group, p)) is not None]
            if known:
                xs, ys = zip(*known, strict=True)
                axes.plot(xs, ys, marker=mark.marker, ms=4.5, **mark.line)
            if title == "cache of one sequence":
                formula = [(x(p), p.cache_formula_bytes) for p in points[name]]
                if formula and all(value is not None for _, value in formula):
                    axes.plot(*zip(*formula, strict=True), color=INK, lw=0.7, ls=":", zorder=5)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(axis="x", rotation=45 if len(ticks) > 6 else 0)
        axes.set_xlabel(x_title)
        axes.set_yscale("log", base=base)
        _axis(axes.yaxis, text, base)
        if "times" in title:
            axes.axhline(1.0, color=MUTED, lw=0.8)
            axes.set_yscale("linear")
            axes.autoscale(axis="y")
            axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    handles = [
        Line2D([], [], marker=mark.marker, label=name, **mark.line)
        for name, (_, mark) in lines.items()
    ]
    if any(p.cache_formula_bytes for group in points.values() for p in group):
        handles.append(Line2D([], [], color=INK, lw=0.7, ls=":", label="cache by formula"))
    legend(figure, handles, 2.6)
    return figure


def speed(results: Results) -> Figure:
    """Speed, memory and cache against context length, at the first batch size."""
    lines = _lines(results)
    settings = results.study.evaluation.efficiency
    batch = (settings.batch_sizes or [settings.batch_size])[0]
    return _draw(
        lines, lambda p: p.batch_size == batch, lambda p: p.context, "context length, tokens"
    )


def speed_batches(results: Results) -> Figure:
    """The same against batch size, at the longest context that every model fits at the largest."""
    lines = _lines(results)
    found = [group for group, _ in lines.values()]
    largest = max(point.batch_size for group in found for point in group.points)
    context = common_context(found, largest)
    return _draw(
        lines,
        lambda p: p.context == context,
        lambda p: p.batch_size,
        f"sequences per batch, {context:,} tokens each",
    )


def probe_figure(record: Mapping[str, Any], name: str) -> Figure:
    """A single `efficiency.json` against context length: the model and, if probed, its base."""
    base = tuple(probe_points(record["base"], name)) if record.get("base") else ()
    batch = record["batch_size"]
    own = tuple(probe_points(record, name))
    lines = {name: (Group("", name, "", "", "", 1, own, base), _CYCLE[0])}
    if base:
        lines["base"] = (Group("", "base", "", "", "", 1, base, ()), Mark(MUTED, "s", (4.0, 1.6)))
    return _draw(
        lines, lambda p: p.batch_size == batch, lambda p: p.context, "context length, tokens"
    )


# --- the published accounting ----------------------------------------------------------------

_POINTS: tuple[tuple[str, Point, Mark], ...] = (
    ("k=10, d_state 8: as printed, never evaluated", AS_PRINTED, Mark("#d55e00", "^", ())),
    ("k=10, d_state 64: COV_R 95.0", retrieval_aware(10, 64), Mark("#0072b2", "o", ())),
    ("k=20, d_state 8: COV_R 90.0", retrieval_aware(20, 8), Mark("#009e73", "D", ())),
)
_LENGTHS = tuple(2**power for power in range(5, 18))


def memory_accounting() -> Figure:
    """Memory against context, and the saving over each layer-wise hybrid, by the point chosen."""
    figure, grid = panel_grid(1, 3, 3.2, 2.6)
    greys = [("layer-wise 25 %", "--"), ("layer-wise 50 %", "-."), ("teacher", ":")]
    first = grid[0][0]
    panel_title(first, "memory, M(L)")
    for baseline, (_, style) in zip(BASELINES, greys, strict=True):
        values = [baseline.bytes(length) / MB for length in _LENGTHS]
        first.plot(_LENGTHS, values, color=MUTED, ls=style, lw=1.2)
    for _, point, mark in _POINTS:
        first.plot(_LENGTHS, [point.bytes(length) / MB for length in _LENGTHS], **mark.line)
    first.set_yscale("log")
    first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} MB"))
    for axes, baseline, title in zip(
        grid[0][1:],
        BASELINES[:2],
        ("saving over layer-wise 25 %", "saving over layer-wise 50 %"),
        strict=True,
    ):
        panel_title(axes, title)
        axes.axhspan(5, 6, color="#e3e6ea", lw=0, zorder=0)
        axes.axhline(1, color=MUTED, lw=0.8)
        for _, point, mark in _POINTS:
            ratios = [saving(point, baseline, length) for length in _LENGTHS]
            axes.plot(_LENGTHS, ratios, **mark.line)
        axes.set_ylim(0, 7)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"×{value:g}"))
    for axes in grid[0]:
        _length_axis(axes)
    handles = [Line2D([], [], label=title, **mark.line) for title, _, mark in _POINTS]
    handles += [Line2D([], [], color=MUTED, ls=style, lw=1.2, label=t) for t, style in greys]
    handles.append(Line2D([], [], color="#e3e6ea", lw=6, label="the claimed 5 to 6"))
    legend(figure, handles, 2.6)
    return figure


def _length_axis(axes: Axes, lengths: Sequence[int] = (128, 2048, 32768)) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(list(lengths)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("context length, tokens")
