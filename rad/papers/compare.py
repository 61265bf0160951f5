"""Published numbers beside ours: measured with an interval, or not run and what it would cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rad.papers.contrast import Arm, ratio
from rad.papers.evidence import Cell, Evidence, Findings, Side, cache_bytes, scores_of
from rad.papers.ledger import describe
from rad.papers.matching import NoMatch, Quantity, find, methods_of, quantity_of
from rad.papers.published import Number, numbers
from rad.reporting.records import json_object, value_of
from rad.reporting.records import number as number_of
from rad.reporting.samples import Task
from rad.reporting.seeds import pooled_estimate
from rad.reporting.statistics import Estimate

MEASURED, NOT_RUN = "measured", "not run"
SCALE = {"percent": 100.0, "fraction": 1.0, "MB": 1e-6, "tokens": 1.0}
# what a run of its own costs; corpora, alignments and selections are shared
RUN_STAGES = ("distil", "evaluate")
NO_ESTIMATE = "cost unknown: rad estimate CONFIG --json FILE, then --estimate FILE"


@dataclass(frozen=True)
class Cost:
    """What a run is estimated to need."""

    gpu_hours: float
    price: float  # USD


@dataclass(frozen=True)
class Comparison:
    """A published number and what a study has to put beside it."""

    number: Number
    status: str
    run: str = ""
    ours: Estimate | None = None
    cost: Cost | None = None
    reason: str = ""

    @property
    def inside(self) -> bool | None:
        """Whether the published value lies in our interval."""
        if self.ours is None:
            return None
        return self.ours.low <= self.number.value <= self.ours.high


def relevant(findings: Findings) -> list[Number]:
    """Published numbers of the methods that the study selects with, in the order of the file."""
    wanted = methods_of(findings.study)
    return [number for number in numbers() if number.method in wanted]


def read_costs(path: Path) -> dict[str, Cost]:
    """Run id -> what distilling and scoring it costs, from the file of `rad estimate --json`.

    Raises `ValueError` naming the file and key.
    """
    found: dict[str, Cost] = {}
    for index, job in enumerate(value_of(json_object(path), "jobs", path)):
        where = f"{path}: jobs.{index}"
        if value_of(job, "stage", where) not in RUN_STAGES:
            continue
        name = str(value_of(job, "name", where))
        hours, price = number_of(job, "gpu_hours", where), number_of(job, "cost", where)
        before = found.get(name, Cost(0.0, 0.0))
        found[name] = Cost(before.gpu_hours + hours, before.price + price)
    return found


def compare(findings: Findings, costs: Mapping[str, Cost] | None = None) -> list[Comparison]:
    """Every relevant published number beside the study's; several runs give several rows."""
    rows: list[Comparison] = []
    for number in relevant(findings):
        quantity = quantity_of(number)
        if quantity is None:
            reason = f"{number.benchmark} ({number.metric}) is not measured here"
            rows.append(Comparison(number, NOT_RUN, reason=reason))
            continue
        try:
            sides = find(findings, number)
        except NoMatch as error:
            rows.append(Comparison(number, NOT_RUN, reason=str(error)))
            continue
        rows += [_row(findings, number, quantity, side, costs or {}) for side in sides]
    return rows


def _row(
    findings: Findings, number: Number, quantity: Quantity, side: Side, costs: Mapping[str, Cost]
) -> Comparison:
    name = describe(side)
    try:
        ours = _measure(findings, number, quantity, side)
    except NoMatch as error:
        return Comparison(number, NOT_RUN, name, None, _cost(side, costs), str(error))
    return Comparison(number, MEASURED, name, ours)


def _cost(side: Side, costs: Mapping[str, Cost]) -> Cost | None:
    """Of all seeds of a cell; None where one of them is unknown."""
    found = [costs[member.id] for member in side.members if member.id in costs]
    if not found or len(found) < len(side.members):
        return None
    return Cost(sum(cost.gpu_hours for cost in found), sum(cost.price for cost in found))


def _measure(findings: Findings, number: Number, quantity: Quantity, side: Side) -> Estimate:
    scale = SCALE[number.unit]
    members = side.members
    if quantity.bytes is not None:
        found = cache_bytes(side, quantity.bytes)
        if found is None:
            raise NoMatch(f"the cache was not measured at {quantity.bytes} tokens")
        return _exact(found * scale, len(members))
    if quantity.selection_tokens:
        placement = members[0].placement
        if placement is None or placement.cost is None:
            raise NoMatch("the selection has not been run")
        return _exact(placement.cost.tokens * scale, 1)
    tasks = _tasks(findings, quantity, members)
    if quantity.over == "base":
        if not isinstance(side, Cell) or side.run.base not in findings.references:
            raise NoMatch("there is no untouched base to divide by")
        base = findings.references[side.run.base]
        _tasks(findings, quantity, (base,))
        arms = (
            Arm(tuple(_scores(member, tasks) for member in members), side.seeds),
            Arm((_scores(base, tasks),), None),
        )
        effect = ratio(*arms)
        if math.isinf(effect.error) or math.isnan(effect.value):
            raise NoMatch("the untouched base scores nothing on these tasks")
        ends = (scale * effect.value, scale * effect.low, scale * effect.high)
        return Estimate(*ends, effect.documents, len(members))
    found_estimate = pooled_estimate([_scores(member, tasks) for member in members])
    value, low, high = (
        scale * end for end in (found_estimate.value, found_estimate.low, found_estimate.high)
    )
    sd = None if found_estimate.seed_sd is None else scale * found_estimate.seed_sd
    return Estimate(value, low, high, found_estimate.n, found_estimate.seeds, sd)


def _exact(value: float, seeds: int) -> Estimate:
    return Estimate(value, value, value, 0, seeds)


Chosen = list[tuple[Task, str]]


def _tasks(findings: Findings, quantity: Quantity, members: Sequence[Evidence]) -> Chosen:
    """Scored tasks of the quantity's kinds with the metric to read; raises `NoMatch`."""
    for member in members:
        if member.samples is None:
            raise NoMatch(f"{member.id} is not scored")
    samples = members[0].samples
    assert samples is not None
    declared = findings.study.evaluation.tasks
    found: Chosen = []
    for kind, metric in quantity.kinds.items():
        own = [
            (task, metric)
            for task in samples.tasks.values()
            if task.parent in declared
            and declared[task.parent].kind == kind
            and (quantity.length is None or task.length == quantity.length)
            and (quantity.subtask is None or task.subtask == quantity.subtask)
        ]
        if not own:
            raise NoMatch(f"no task of kind {kind} was scored")
        found += own
    return found


def _scores(member: Evidence, tasks: Chosen) -> list[Any]:
    try:
        return [scores_of(member, [task], metric)[0] for task, metric in tasks]
    except ValueError as error:
        raise NoMatch(str(error)) from error
