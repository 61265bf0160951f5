"""Speed and memory against context and batch size: the probe's points of a study or a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rad.reporting.collect import Results, RunResult
from rad.reporting.describe import budget_text
from rad.reporting.plan import Cell, cells, row_titles, views
from rad.reporting.records import optional
from rad.reporting.scores import members
from rad.reporting.writers import Column, Entry, Panel, Table, significant, size

AS_THEY_ARE = "models as they are"


@dataclass(frozen=True)
class ProbePoint:
    """One context and batch size of a model; what was not measured is None."""

    context: int
    batch_size: int
    prefill_tokens_per_second: float | None = None
    first_token_seconds: float | None = None
    decode_tokens_per_second: float | None = None
    peak_memory_bytes: float | None = None
    cache_bytes: float | None = None
    cache_formula_bytes: float | None = None
    skipped: str | None = None  # why there is no measurement


MEASURES = (
    *("prefill_tokens_per_second", "first_token_seconds", "decode_tokens_per_second"),
    *("peak_memory_bytes", "cache_bytes", "cache_formula_bytes"),
)


def probe_points(record: Mapping[str, Any], where: str | Path) -> list[ProbePoint]:
    """The points of an `efficiency.json`, or of its key `base`; raises `ValueError`.

    Files of the first version have fewer measurements and one batch size.
    """
    found = []
    usual = record.get("batch_size", 1)
    try:
        for point in (*record["points"], *record.get("batch_points", ())):
            batch = point.get("batch_size", usual)
            values: dict[str, Any] = {name: optional(point, name, where) for name in MEASURES}
            seconds = optional(point, "prefill_seconds", where)
            if values["prefill_tokens_per_second"] is None and seconds:
                values["prefill_tokens_per_second"] = batch * point["context"] / seconds
            found.append(ProbePoint(point["context"], batch, **values))
        for point in record.get("skipped", ()):
            place = (point["context"], point["batch_size"])
            found.append(ProbePoint(*place, skipped=point["reason"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: not the points of an efficiency probe ({error})") from error
    return sorted(found, key=lambda point: (point.batch_size, point.context))


@dataclass(frozen=True)
class Group:
    """Students of one placement (they cost the same), or a model as it is."""

    view: str
    title: str
    selector: str
    budget: str
    mixer: str
    runs: int
    points: tuple[ProbePoint, ...]
    base: tuple[ProbePoint, ...]  # of the untouched base, empty where it was not probed

    def at(self, context: int, batch_size: int) -> ProbePoint | None:
        """The measured point of a context and batch size."""
        return _at(self.points, context, batch_size)

    def decode_ratio(self, context: int, batch_size: int) -> float | None:
        """Decoding speed over the base's."""
        own, base = self.at(context, batch_size), _at(self.base, context, batch_size)
        if own is None or base is None:
            return None
        if not own.decode_tokens_per_second or not base.decode_tokens_per_second:
            return None
        return own.decode_tokens_per_second / base.decode_tokens_per_second


def _at(points: Iterable[ProbePoint], context: int, batch_size: int) -> ProbePoint | None:
    for point in points:
        if (point.context, point.batch_size) == (context, batch_size) and point.skipped is None:
            return point
    return None


def pooled(members_points: Sequence[Sequence[ProbePoint]]) -> tuple[ProbePoint, ...]:
    """The mean of several runs, point by point; a point that one of them skipped is skipped."""
    grouped: dict[tuple[int, int], list[ProbePoint]] = {}
    for points in members_points:
        for point in points:
            grouped.setdefault((point.batch_size, point.context), []).append(point)
    found = []
    for (batch, context), alike in sorted(grouped.items()):
        reason = next((point.skipped for point in alike if point.skipped is not None), None)
        if reason is not None:
            found.append(ProbePoint(context, batch, skipped=reason))
            continue
        values: dict[str, Any] = {}
        for name in MEASURES:
            known = [value for point in alike if (value := getattr(point, name)) is not None]
            values[name] = float(np.mean(known)) if known else None
        found.append(ProbePoint(context, batch, **values))
    return tuple(found)


def groups(results: Results) -> list[Group]:
    """Every placement of the study by view, then the models as they are."""
    study, found = results.study, []

    def points_of(group: Sequence[RunResult], key: str | None = None) -> tuple[ProbePoint, ...]:
        gathered = []
        for result in group:
            whole = result.efficiency.record
            record = whole if key is None else whole.get(key)
            if record is not None:
                path = results.root / "runs" / result.id / "efficiency.json"
                gathered.append(probe_points(record, path))
        return pooled(gathered)

    for view in views(study):
        shared: dict[tuple[str, ...], list[Cell]] = {}
        for cell in cells(study, view):
            shared.setdefault((cell.base, cell.selector, cell.budget, cell.mixer), []).append(cell)
        for alike in shared.values():
            cell = alike[0]
            group = [result for each in alike for result in members(results, each)]
            reference = results.references.get(cell.base)
            # the base probed in turn with the student is the better comparison
            base = points_of(group, "base") or (points_of([reference]) if reference else ())
            title = row_titles(alike)[cell] if view == "reference" else cell.selector
            about = (view, title, cell.selector, cell.budget, cell.mixer, len(group))
            found.append(Group(*about, points_of(group), base))
    for name, result in results.references.items():
        found.append(Group(AS_THEY_ARE, name, "", "", "", 1, points_of([result]), ()))
    return found


def common_context(found: Sequence[Group], batch_size: int) -> int | None:
    """The longest context at which every group was measured with this batch size."""
    sets = [
        {p.context for p in group.points if p.batch_size == batch_size and p.skipped is None}
        for group in found
    ]
    shared = set.intersection(*sets) if sets else set()
    return max(shared, default=None)


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{significant(1000 * value)} ms"


def _panel(title: str, found: Sequence[Group], batch: int, context: int | None) -> Panel:
    columns = [Column(name, numeric=False) for name in ("model", "kept", "mixer")]
    columns += [
        Column(name)
        for name in (
            *("prefill tokens/s", "first token", "decode tokens/s", "× base", "peak memory"),
            *("cache", "cache by formula", "fits up to"),
        )
    ]
    rows = []
    for group in found:
        asked = [point for point in group.points if point.batch_size == batch]
        fitted = [point.context for point in asked if point.skipped is None]
        point = None if context is None else group.at(context, batch)
        ratio = None if context is None else group.decode_ratio(context, batch)
        shown = point or ProbePoint(0, batch)
        longest = f"{max(fitted):,}" if fitted else "none"
        if len(fitted) < len(asked):
            longest += f" of {max(each.context for each in asked):,}"
        texts = (
            *(group.title, budget_text(group.budget) if group.budget else "all"),
            group.mixer or "–",
            *(significant(shown.prefill_tokens_per_second), _seconds(shown.first_token_seconds)),
            *(significant(shown.decode_tokens_per_second), significant(ratio)),
            *(size(shown.peak_memory_bytes), size(shown.cache_bytes)),
            *(size(shown.cache_formula_bytes), longest),
        )
        rows.append(tuple(map(Entry, texts)))
    return Panel(title, tuple(columns), tuple(rows))


def _records(found: Sequence[Group]) -> list[dict[str, Any]]:
    return [
        {
            **{"view": group.view, "model": group.title, "budget": group.budget},
            **{"mixer": group.mixer, "runs": group.runs},
            **{"context": point.context, "batch_size": point.batch_size},
            **{name: getattr(point, name) for name in MEASURES},
            "decode_ratio_to_base": group.decode_ratio(point.context, point.batch_size),
            "skipped": point.skipped,
        }
        for group in found
        for point in group.points
    ]


def _table(found: Sequence[Group], caption: str) -> Table:
    batches = sorted({point.batch_size for group in found for point in group.points})
    panels = []
    for batch in batches:
        context = common_context(found, batch)
        at = "no common context" if context is None else f"{context:,} tokens"
        for view in dict.fromkeys(group.view for group in found):
            members_of = [group for group in found if group.view == view]
            kind = view if view == AS_THEY_ARE or not view else f"{view} view"
            title = ", ".join(part for part in (kind, at, f"batch {batch}") if part)
            panels.append(_panel(title, members_of, batch, context))
    return Table(
        "speed",
        "Speed and memory",
        caption,
        tuple(panels),
        (
            *("view", "model", "budget", "mixer", "runs", "context", "batch_size", *MEASURES),
            *("decode_ratio_to_base", "skipped"),
        ),
        _records(found),
    )


def speed(results: Results) -> Table:
    """Prefill, first token, decoding, peak memory and cache at the longest common context."""
    return _table(
        groups(results),
        "Measured at the longest context that every model was measured at; the CSV has every "
        "point, with the reason of those that were skipped. Cache of one sequence; the rest of the "
        "whole batch. × base: decoding speed over the untouched base's.",
    )


def probe_table(record: Mapping[str, Any], name: str) -> Table:
    """The table of a single `efficiency.json`: the model and, if it was probed, its base."""
    base = tuple(probe_points(record["base"], name)) if record.get("base") else ()
    found = [Group("", name, "", "", "", 1, tuple(probe_points(record, name)), base)]
    if base:
        found.append(Group("", "base", "", "", "", 1, base, ()))
    columns = [Column("model", numeric=False), Column("batch"), Column("context")]
    titles = ("prefill tokens/s", "first token", "decode tokens/s", "× base", "peak memory")
    columns += [Column(title) for title in (*titles, "cache", "cache by formula")]
    columns.append(Column("skipped", numeric=False))
    rows = []
    for group in found:
        for point in group.points:
            ratio = group.decode_ratio(point.context, point.batch_size)
            texts = (
                *(group.title, str(point.batch_size), f"{point.context:,}"),
                significant(point.prefill_tokens_per_second),
                _seconds(point.first_token_seconds),
                *(significant(point.decode_tokens_per_second), significant(ratio)),
                *(size(point.peak_memory_bytes), size(point.cache_bytes)),
                *(size(point.cache_formula_bytes), point.skipped or ""),
            )
            rows.append(tuple(map(Entry, texts)))
    where = f"{record['dtype']}, {record['device']}, {record['threads']} threads"
    return Table(
        "speed",
        "Speed and memory",
        f"{where}; peak memory: {record['peak_memory'] or 'not measured'}. Cache of one sequence, "
        "the rest of the whole batch.",
        (Panel("", tuple(columns), tuple(rows)),),
        (
            *("view", "model", "budget", "mixer", "runs", "context", "batch_size", *MEASURES),
            *("decode_ratio_to_base", "skipped"),
        ),
        _records(found),
    )
