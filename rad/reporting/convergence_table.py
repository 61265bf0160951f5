"""Table of convergence: the tokens each selector needs to reach what the baseline ends with.

RAD (arXiv 2505.22135) claims up to about twice the speed and leaves the measure open; ours is the
number of tokens at which uniform reaches its own final value over those at which a selector does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rad.reporting.collect import CurvePoint, Results, RunResult
from rad.reporting.crossing import NEVER, START, Curve, Reached, reached
from rad.reporting.describe import CELL_FIELDS, block_title, cell_record
from rad.reporting.plan import Cell, Race, races, reference_name
from rad.reporting.scores import members, probed_tasks
from rad.reporting.writers import MISSING, Column, Entry, Panel, Table, count, significant

UNTRAINED = "before training"  # the first logged point is usually at no tokens
TOO_EARLY = "before the first point"
INTERVALS = {
    "documents": "95 % bootstrap over the documents of the probe, the same ones for both curves",
    "seeds": "the range over seeds, each against the reference of its own seed",
    "points": "the two logged points around the crossing (for the ratio: what both brackets "
    "allow), which is the resolution of the curve and says nothing of documents or seeds",
}


@dataclass(frozen=True)
class Quantity:
    """Something that curves log: how to read it, and which way is better."""

    name: str
    read: Callable[[CurvePoint], float | None]
    falling: bool = False
    log: bool = False  # interpolated in its logarithm
    documents: Callable[[CurvePoint], tuple[int, ...] | None] = lambda _: None

    def heading(self, target: float) -> str:
        """The name and the value that is to be reached."""
        if self.falling:
            return f"{self.name} ≤ {significant(target)}"
        return f"{self.name} ≥ {100 * target:.1f} %"


def quantities(results: Results, race: Race) -> list[Quantity]:
    """Held-out KL, and every probed task that a curve of the race has."""
    found = [Quantity("held-out KL", lambda point: point.held_out_kl, falling=True, log=True)]
    return found + [_probed(name) for name in probed_tasks(results, race.cells)]


def _probed(name: str) -> Quantity:
    return Quantity(
        name,
        lambda point: point.probe.get(name),
        documents=lambda point: point.probe_documents.get(name),
    )


def curve_of(result: RunResult, quantity: Quantity) -> Curve | None:
    """The logged points of a run that have the quantity; None without any."""
    points = [point for point in result.curve if quantity.read(point) is not None]
    if not points:
        return None
    answers = [quantity.documents(point) for point in points]
    lengths = {None if each is None else len(each) for each in answers}
    complete = len(lengths) == 1 and None not in lengths
    return Curve(
        tokens=np.array([point.tokens for point in points], dtype=np.float64),
        values=np.array([quantity.read(point) for point in points], dtype=np.float64),
        documents=np.array(answers, dtype=np.float64) if complete else None,
    )


def race_result(results: Results, race: Race, cell: Cell, quantity: Quantity) -> Reached | None:
    """When `cell` reaches the final value of the race's baseline; None without curves."""

    def curves(of: Cell) -> dict[int, Curve]:
        runs = zip(of.seeds, members(results, of), strict=True)
        found = {seed: curve_of(result, quantity) for seed, result in runs}
        return {seed: curve for seed, curve in found.items() if curve is not None}

    own, other = curves(cell), curves(race.baseline)
    return reached(
        list(own.values()),
        list(other.values()),
        [(own[seed], other[seed]) for seed in own if seed in other],
        falling=quantity.falling,
        log=quantity.log,
    )


def _first_tokens(results: Results, cell: Cell) -> int:
    """Tokens of the first logged point of a cell's runs."""
    return min(
        (result.curve[0].tokens for result in members(results, cell) if result.curve), default=0
    )


def _spread(found: Reached) -> bool:
    """Whether there is an interval: there is none where all of it is never, or at the start."""
    return found.counts or found.tokens.low != found.tokens.high


def _token_text(tokens: float, start: str) -> str:
    if tokens == START:
        return start
    return "never" if tokens == NEVER else count(tokens)


def _ratio_text(value: float) -> str:
    return "∞" if math.isinf(value) else f"{significant(value)}"


def _entries(found: Reached | None, is_baseline: bool, start: str) -> list[Entry]:
    """Tokens and ratio of a selector."""
    if found is None:
        return [MISSING, MISSING]
    span, between = found.tokens, ""
    if _spread(found):
        # in an interval the name of the end is enough
        ends = [_token_text(end, "start") for end in (span.low, span.high)]
        between = f"[{ends[0]}, {ends[1]}]"
    tokens = Entry(_token_text(span.value, start), between)
    if found.ratio is None:
        return [tokens, MISSING]
    if is_baseline:
        return [tokens, Entry("1")]
    low, high = map(_ratio_text, (found.ratio.low, found.ratio.high))
    return [tokens, Entry(f"{_ratio_text(found.ratio.value)}×", f"[{low}, {high}]")]


def _record(cell: Cell, quantity: Quantity, found: Reached, start: str) -> dict[str, Any]:
    span, gain = found.tokens, found.ratio
    spread = _spread(found)
    return {
        **cell_record(cell),
        "seeds": len(cell.seeds),
        "quantity": quantity.name,
        "target": found.target,
        "reached": "at tokens" if found.counts else _token_text(span.value, start),
        "tokens": span.value if found.counts else None,
        "tokens_low": span.low if spread else None,
        "tokens_high": span.high if spread else None,
        "baseline_tokens": found.baseline if START < found.baseline < NEVER else None,
        "ratio": gain.value if gain else None,
        "ratio_low": gain.low if gain else None,
        "ratio_high": gain.high if gain else None,
        "interval": found.interval,
    }


def _panel(results: Results, race: Race) -> tuple[Panel, list[dict[str, Any]]]:
    columns = [Column("selector", numeric=False)]
    rows: dict[Cell, list[Entry]] = {cell: [Entry(cell.selector)] for cell in race.cells}
    records = []
    for quantity in quantities(results, race):
        everyone = {cell: race_result(results, race, cell, quantity) for cell in race.cells}
        goal = everyone[race.baseline]
        if goal is None:
            continue  # the baseline has nothing to reach
        improves = goal.tokens.value != START
        if improves:
            group = quantity.heading(goal.target)
            columns += [Column("tokens", group), Column("ratio", group)]
        for cell, found in everyone.items():
            same = cell == race.baseline
            start = TOO_EARLY if _first_tokens(results, cell) else UNTRAINED
            if improves:
                rows[cell] += _entries(found, same, start)
            if found is None:
                continue
            record = _record(cell, quantity, found, start)
            if same:
                record |= {"ratio_low": None, "ratio_high": None}
            records.append(record)
    title = f"{block_title(race.block)} · teacher: {race.teacher}"
    return Panel(title, tuple(columns), tuple(map(tuple, rows.values()))), records


def _caption(records: Sequence[dict[str, Any]], samples: int, reference: str) -> str:
    text = (
        f"Distillation tokens at which a selector first has what {reference} with the same teacher "
        f"ends with (the heading names the value), and {reference}'s tokens over its own: 2× is "
        "half the tokens. Between logged points held-out KL is interpolated in its logarithm, "
        "scores linearly. Nothing is extrapolated: “never” is not within the run, “before …” has "
        f"it at the first logged point already; neither has a ratio. Where {reference} has its "
        "final value at the first point there is nothing to reach, and no column (the CSV has all)."
    )
    kinds: dict[str, dict[str, None]] = {}
    for record in records:
        kinds.setdefault(record["interval"], {})[record["quantity"]] = None
    for kind, words in INTERVALS.items():
        if kind in kinds:
            whose = "" if len(kinds) == 1 else f" of {', '.join(kinds[kind])}"
            text += f" Interval{whose}: {words}."
    if len({record["quantity"] for record in records}) > 1 and samples:
        text += f" Probed tasks are shares of {samples} documents each."
    return text


def convergence(results: Results) -> Table:
    """Tokens to reach the baseline: selectors against uniform, by block and teacher."""
    panels, records = [], []
    for race in races(results.study):
        panel, more = _panel(results, race)
        if len(panel.columns) > 1:
            panels.append(panel)
        records += more
    return Table(
        "convergence",
        "Tokens to reach the baseline",
        _caption(records, results.study.evaluation.probe_samples, reference_name(results.study)),
        tuple(panels),
        (
            *("view", *CELL_FIELDS, "seeds", "quantity", "target", "reached"),
            *("tokens", "tokens_low", "tokens_high", "baseline_tokens"),
            *("ratio", "ratio_low", "ratio_high", "interval"),
        ),
        records,
    )
