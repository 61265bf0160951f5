"""From per-document scores to estimates: per task, per family, and against uniform or self.

Seeds of a cell are pooled by averaging each document over seeds first, so intervals describe the
documents (what another test set of this size would change), not the spread between seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rad.reporting.collect import PERPLEXITY, Results, RunResult, Task
from rad.reporting.plan import Block, Cell, baseline, cells, uniform_selectors
from rad.reporting.statistics import (
    Array,
    Documents,
    Estimate,
    mean_estimate,
    paired_difference,
)

FAMILY_ORDER = ("gsm", "crux", "ruler", "text", PERPLEXITY)


@dataclass(frozen=True)
class Family:
    """Tasks that are averaged into one number."""

    name: str
    tasks: tuple[Task, ...]

    @property
    def higher_is_better(self) -> bool:
        """Direction of the metric."""
        return all(task.higher_is_better for task in self.tasks)

    @property
    def is_perplexity(self) -> bool:
        """Whether scores are nats per token, shown as their exponential."""
        return self.tasks[0].metric == "token_nll"

    @property
    def is_share(self) -> bool:
        """Whether scores lie between 0 and 1 and are shown in percent."""
        return self.higher_is_better and not self.is_perplexity

    @property
    def metric(self) -> str:
        """Name of what is reported."""
        if self.is_perplexity:
            return "perplexity"
        names = list(dict.fromkeys(task.metric for task in self.tasks))
        return names[0] if len(names) == 1 else "score"

    @property
    def heading(self) -> str:
        """Column heading: name, unit and direction."""
        if self.is_perplexity:
            return "ppl ↓"
        arrow = "↑" if self.higher_is_better else "↓"
        return f"{self.name} % {arrow}" if self.is_share else f"{self.name} {arrow}"

    def of(self, task: Task) -> Family:
        """A family of one task."""
        return Family(task.name, (task,))


def families(results: Results) -> list[Family]:
    """Families that were scored, in report order; tasks keep the order of the evaluation."""
    grouped: dict[str, list[Task]] = {}
    for task in results.tasks.values():
        grouped.setdefault(task.family, []).append(task)
    known = [name for name in FAMILY_ORDER if name in grouped]
    others = [name for name in grouped if name not in FAMILY_ORDER]
    return [Family(name, tuple(grouped[name])) for name in [*known, *others]]


def single_tasks(results: Results) -> list[Family]:
    """Every task as a family of its own."""
    return [family.of(task) for family in families(results) for task in family.tasks]


def members(results: Results, cell: Cell) -> list[RunResult]:
    """The results of a cell, one per seed."""
    return [results.runs[run] for run in cell.runs]


def pooled(group: Sequence[RunResult], task: str) -> dict[int, float]:
    """Each document's mean over seeds."""
    if len(group) == 1:
        return dict(group[0].scores[task])
    return {
        document: float(np.mean([result.scores[task][document] for result in group]))
        for document in group[0].scores[task]
    }


def _exp(values: Array) -> Array:
    return np.exp(values)


def _weights(result: RunResult, family: Family) -> list[dict[int, float]] | None:
    """Tokens per document and task: what a perplexity averages over; None for other scores."""
    if not family.is_perplexity or not all(task.name in result.weights for task in family.tasks):
        return None
    return [dict(result.weights[task.name]) for task in family.tasks]


def estimate(group: Sequence[RunResult], family: Family) -> Estimate:
    """Mean over the family's tasks with its 95 % interval (perplexity: exp of the mean)."""
    documents = [pooled(group, task.name) for task in family.tasks]
    weights = _weights(group[0], family)
    return mean_estimate(
        [list(scores.values()) for scores in documents],
        _exp if family.is_perplexity else None,
        None
        if weights is None
        else [[own[key] for key in scores] for own, scores in zip(weights, documents, strict=True)],
    )


def mean_score(results: Results, group: Sequence[RunResult]) -> Estimate | None:
    """Mean over families of shares, each family the mean of its tasks; None without such tasks.

    Perplexities are left out: they are no shares.
    """
    counted = [family for family in families(results) if family.is_share]
    tasks = [(task.name, 1 / len(family.tasks)) for family in counted for task in family.tasks]
    if not tasks:
        return None
    return mean_estimate(
        [list(pooled(group, name).values()) for name, _ in tasks],
        shares=[share for _, share in tasks],
    )


def difference(group: Sequence[RunResult], other: Sequence[RunResult], family: Family) -> Estimate:
    """Paired difference `group` minus `other`, in the unit of `estimate`."""
    first: list[Documents] = [pooled(group, task.name) for task in family.tasks]
    second: list[Documents] = [pooled(other, task.name) for task in family.tasks]
    transform = _exp if family.is_perplexity else None
    return paired_difference(first, second, transform, _weights(group[0], family))


def uniform_of(results: Results, block: Block, teacher: str) -> Cell | None:
    """The block's uniform cell with this teacher: what the others are compared to."""
    return baseline(results.study, block, teacher)


def uniform_run_of(results: Results, cell: Cell, index: int) -> RunResult | None:
    """The uniform run that differs from run `index` of `cell` by its selector alone."""
    for candidate in cells(results.study, cell.view):
        if (
            candidate.selector in uniform_selectors(results.study)
            and candidate.fixed == cell.fixed
            and candidate.teacher == cell.teacher
            and cell.seeds[index] in candidate.seeds
        ):
            return results.runs[candidate.runs[candidate.seeds.index(cell.seeds[index])]]
    return None


def best_of(family: Family, values: Sequence[float]) -> float | None:
    """The best of the values; None when there is nothing to choose between."""
    if len(set(values)) < 2:
        return None
    return max(values) if family.higher_is_better else min(values)


def probed_tasks(results: Results, chosen: Iterable[Cell]) -> list[str]:
    """Probe tasks that a curve of the cells has, in order of appearance."""
    names: dict[str, None] = {}
    for cell in chosen:
        for result in members(results, cell):
            for point in result.curve:
                names.update(dict.fromkeys(point.probe))
    return list(names)


def final_kl(group: Sequence[RunResult]) -> float | None:
    """Held-out KL from the base at the end of the curve, nats per token, mean over seeds."""
    last = [
        [point.held_out_kl for point in result.curve if point.held_out_kl is not None][-1:]
        for result in group
    ]
    values = [value[0] for value in last if value]
    return float(np.mean(values)) if values else None


def training_number(group: Sequence[RunResult], *keys: str) -> float | None:
    """Mean over seeds of the first of `keys` that `training.json` has as a number."""
    values = []
    for result in group:
        for key in keys:
            if isinstance(result.training.get(key), int | float):
                values.append(float(result.training[key]))
                break
    return float(np.mean(values)) if values else None


def training_speed(group: Sequence[RunResult]) -> float | None:
    """All tokens over all seconds of the seeds' `training.json`; None where nothing was trained."""
    tokens = training_number(group, "tokens")
    seconds = training_number(group, "seconds", "wall_seconds")
    return tokens / seconds if tokens and seconds else None
