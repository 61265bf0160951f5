"""From per-document scores to estimates: per task, per family, and against the reference or self.

Runs of a cell differ by seed. Where there are several, intervals describe documents and seeds (what
another test set and another training run would change), else documents only; see `seeds.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rad.reporting.collect import Results, RunResult
from rad.reporting.plan import Block, Cell, baseline, cells, reference_selectors
from rad.reporting.samples import PERPLEXITY, Task
from rad.reporting.seeds import pooled_difference, pooled_estimate
from rad.reporting.significance import holm
from rad.reporting.statistics import Array, Difference, Estimate

FAMILY_ORDER = (
    *("gsm", "crux", "gsm8k", "cruxeval", "ruler", "retrieval", "general", "text"),
    PERPLEXITY,
)
# scores that are no shares of right answers: nats per token, shown as their exponential
LOSSES = ("token_nll",)


@dataclass(frozen=True)
class Family:
    """Tasks that are averaged into one number; without `tasks` there is none.

    `missing` are tasks of the family that have no data.
    """

    name: str
    tasks: tuple[Task, ...]
    missing: tuple[Task, ...] = ()

    @property
    def family(self) -> str:
        """Name of the family that the tasks belong to."""
        return (*self.tasks, *self.missing)[0].family

    @property
    def higher_is_better(self) -> bool:
        """Direction of the metric."""
        return all(task.higher_is_better for task in (*self.tasks, *self.missing))

    @property
    def is_perplexity(self) -> bool:
        """Whether scores are nats per token, shown as their exponential."""
        return (*self.tasks, *self.missing)[0].metric in LOSSES

    @property
    def is_share(self) -> bool:
        """Whether scores lie between 0 and 1 and are shown in percent."""
        return self.higher_is_better and not self.is_perplexity

    @property
    def metric(self) -> str:
        """Name of what is reported."""
        if self.is_perplexity:
            return "perplexity"
        names = list(dict.fromkeys(task.metric for task in (*self.tasks, *self.missing)))
        return names[0] if len(names) == 1 else "score"

    @property
    def reason(self) -> str:
        """Why there is no number; empty where there is one."""
        return "" if self.tasks else self.missing[0].missing

    @property
    def heading(self) -> str:
        """Column heading: name, unit and direction."""
        if self.is_perplexity:
            return "ppl ↓" if self.name == PERPLEXITY else f"{self.name}, ppl ↓"
        arrow = "↑" if self.higher_is_better else "↓"
        name = f"{self.name} ({self.label})" if self.label else self.name
        return f"{name} % {arrow}" if self.is_share else f"{name} {arrow}"

    @property
    def label(self) -> str:
        """Says of documents that are not those of a published set: all of them, or some."""
        labels = [task.label for task in self.tasks]
        found = list(dict.fromkeys(label for label in labels if label))
        if not found:
            return ""
        return f"{'' if all(labels) else 'partly '}{' and '.join(found)}"


def _grouped(tasks: Iterable[Task]) -> dict[str, list[Task]]:
    """Family -> tasks, families in report order."""
    grouped: dict[str, list[Task]] = {}
    for task in tasks:
        grouped.setdefault(task.family, []).append(task)
    known = [name for name in FAMILY_ORDER if name in grouped]
    others = [name for name in grouped if name not in FAMILY_ORDER]
    return {name: grouped[name] for name in [*known, *others]}


def all_families(results: Results) -> list[Family]:
    """Families in report order, also those that have no data at all."""
    grouped = _grouped([*results.tasks.values(), *results.missing.values()])
    return [
        Family(
            name,
            tuple(task for task in tasks if not task.missing),
            tuple(task for task in tasks if task.missing),
        )
        for name, tasks in grouped.items()
    ]


def families(results: Results) -> list[Family]:
    """Families that were scored, in report order; tasks keep the order of the evaluation."""
    return [family for family in all_families(results) if family.tasks]


def single_tasks(results: Results) -> list[Family]:
    """Every task as a family of its own, also those that have no data."""
    return [
        Family(task.name, (), (task,)) if task.missing else Family(task.name, (task,))
        for family in all_families(results)
        for task in (*family.tasks, *family.missing)
    ]


def documents_of(results: Results, family: Family) -> int:
    """Documents that every model answered."""
    first = results.everything[0].scores
    return sum(len(first[task.name]) for task in family.tasks)


def members(results: Results, cell: Cell) -> list[RunResult]:
    """The results of a cell, one per seed."""
    return [results.runs[run] for run in cell.runs]


def _seed(result: RunResult) -> int | None:
    return result.run.seed if result.run is not None else None


Reader = Callable[[RunResult, Task], dict[int, float]]


def headline(result: RunResult, task: Task) -> dict[int, float]:
    """Document -> score under the task's main metric."""
    return dict(result.scores[task.name])


def _arrays(
    group: Sequence[RunResult], tasks: Sequence[Task], read: Reader = headline
) -> list[list[Array]]:
    """Per seed and task the documents' scores, documents in one order."""
    runs = []
    for result in group:
        found = [read(result, task) for task in tasks]
        tables = [[own[key] for key in sorted(own)] for own in found]
        runs.append([np.array(table, dtype=np.float64) for table in tables])
    return runs


def _weights(result: RunResult, family: Family) -> list[Array] | None:
    """Tokens per document and task: what a perplexity averages over; None for other scores."""
    if not family.is_perplexity or not all(task.name in result.weights for task in family.tasks):
        return None
    return _arrays([result], family.tasks, lambda own, task: dict(own.weights[task.name]))[0]


def estimate(group: Sequence[RunResult], family: Family) -> Estimate:
    """Mean over seeds and the family's tasks with its 95 % interval (perplexity: exp of the mean).

    The family must have tasks.
    """
    return pooled_estimate(
        _arrays(group, family.tasks),
        weights=_weights(group[0], family),
        exponential=family.is_perplexity,
    )


def estimate_of(group: Sequence[RunResult], tasks: Sequence[Task], read: Reader) -> Estimate:
    """Mean over seeds and tasks of what `read` finds."""
    return pooled_estimate(_arrays(group, tasks, read))


def mean_score(results: Results, group: Sequence[RunResult]) -> Estimate | None:
    """Mean over families of shares, each family the mean of its tasks; None without such tasks.

    Perplexities are left out: they are no shares.
    """
    counted = [family for family in families(results) if family.is_share]
    tasks = [(task, 1 / len(family.tasks)) for family in counted for task in family.tasks]
    if not tasks:
        return None
    return pooled_estimate(
        _arrays(group, [task for task, _ in tasks]), shares=[share for _, share in tasks]
    )


def difference(
    group: Sequence[RunResult], other: Sequence[RunResult], family: Family
) -> Difference:
    """Paired difference `group` minus `other`, in the unit of `estimate`."""
    seeds = [_seed(result) for result in group]
    order = {_seed(result): result for result in other}
    matched = None not in order and set(seeds) == set(order) and len(order) == len(other)
    second = [order[seed] for seed in seeds] if matched else list(other)
    return pooled_difference(
        _arrays(group, family.tasks),
        _arrays(second, family.tasks),
        weights=_weights(group[0], family),
        exponential=family.is_perplexity,
        matched=matched,
    )


def reference_of(results: Results, block: Block, teacher: str) -> Cell | None:
    """The block's reference cell with this teacher: what the others are compared to."""
    return baseline(results.study, block, teacher)


def reference_run_of(results: Results, cell: Cell, index: int) -> RunResult | None:
    """The reference run that differs from run `index` of `cell` by its selector alone."""
    for candidate in cells(results.study, cell.view):
        if (
            candidate.selector in reference_selectors(results.study)
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


def adjusted(values: Sequence[Difference | None]) -> list[float | None]:
    """Holm-adjusted p-values of the differences that are there; None stays None."""
    found = iter(holm([value.p for value in values if value is not None]))
    return [None if value is None else next(found) for value in values]


def probed_tasks(results: Results, chosen: Iterable[Cell]) -> list[str]:
    """Probe tasks that a curve of the cells has, in order of appearance."""
    names: dict[str, None] = {}
    for cell in chosen:
        for result in members(results, cell):
            for point in result.curve:
                names.update(dict.fromkeys(point.probe))
    return list(names)


def final_kls(group: Sequence[RunResult]) -> list[float]:
    """Held-out KL from the base at the end of each seed's curve, nats per token."""
    last = [
        [point.held_out_kl for point in result.curve if point.held_out_kl is not None][-1:]
        for result in group
    ]
    return [value[0] for value in last if value]


def final_kl(group: Sequence[RunResult]) -> float | None:
    """Held-out KL from the base at the end of the curve, nats per token, mean over seeds."""
    values = final_kls(group)
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
