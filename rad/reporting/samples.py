"""What models answered: scores per document, other metrics of the same answers, missing tasks.

Records are those of `samples.jsonl`, whose keys beyond `task`, `family`, `doc_id`, `metric` and
`score` may all be absent: files of the first version have neither `metrics` nor `truncated`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rad.reporting.records import number, optional, records, value_of

PERPLEXITY = "perplexity"
# what is known of an answer besides its metrics, read as if they were metrics of it
ABOUT_ANSWERS = ("truncated", "new_tokens")


@dataclass(frozen=True)
class Task:
    """A scored task as the evaluation expanded it; `parent` is its name in the study.

    `missing` is the reason why there are no documents, empty where there are; `label` says that the
    documents are made up, or stand in for a published set.
    """

    name: str
    family: str
    metric: str
    higher_is_better: bool
    parent: str = ""
    subtask: str | None = None
    length: int | None = None
    missing: str = ""
    label: str = ""


@dataclass(frozen=True)
class Samples:
    """The content of a `samples.jsonl` that is not text; all by task, then document."""

    tasks: dict[str, Task] = field(default_factory=dict)
    scores: dict[str, dict[int, float]] = field(default_factory=dict)
    weights: dict[str, dict[int, float]] = field(default_factory=dict)
    # task -> metric -> document: the headline again, and others of the same answers
    metrics: dict[str, dict[str, dict[int, float]]] = field(default_factory=dict)


def _task(name: str, record: Mapping[str, Any], about: Mapping[str, Any], where: str) -> Task:
    family = str(value_of(record, "family", where))
    length = record.get("length", about.get("length"))
    subtask = record.get("subtask", about.get("subtask"))
    return Task(
        name=name,
        family=family,
        metric=str(value_of(record, "metric", where)),
        higher_is_better=bool(about.get("higher_is_better", family != PERPLEXITY)),
        parent=str(about.get("task", name)),
        subtask=None if subtask is None else str(subtask),
        length=None if length is None else int(length),
        label=_label(about),
    )


def _label(about: Mapping[str, Any]) -> str:
    if about.get("stand_in"):
        return "stand-in"
    return "synthetic" if about.get("synthetic") else ""


def _metrics(record: Mapping[str, Any], where: str) -> dict[str, float]:
    """Metric -> value of one answer."""
    stated = record.get("metrics") or {}
    if not isinstance(stated, dict):
        raise ValueError(f"{where}: metrics is not an object")
    found = {name: number(stated, name, f"{where}: metrics") for name in stated}
    for name in ABOUT_ANSWERS:
        value = optional(record, name, where)
        if value is not None:
            found[name] = value
    return found


def read_samples(
    path: Path, described: Mapping[str, Any], *, may_be_empty: bool = False
) -> Samples:
    """Per-document scores of a `samples.jsonl`.

    `described` is `tasks` of the evaluation, which knows the direction of each metric. Raises
    `ValueError` naming the line where a document is twice or a value is no number, or the task
    where some documents lack what others have.
    """
    samples = Samples()
    for where, record in records(path):
        name = str(value_of(record, "task", where))
        if name not in samples.tasks:
            samples.tasks[name] = _task(name, record, described.get(name, {}), where)
        document = int(number(record, "doc_id", where))
        if document in samples.scores.setdefault(name, {}):
            raise ValueError(f"{where}: document {document} of {name} appears twice")
        samples.scores[name][document] = number(record, "score", where)
        tokens = optional(record, "tokens", where)
        if tokens is not None:
            samples.weights.setdefault(name, {})[document] = tokens
        for metric, value in _metrics(record, where).items():
            own = samples.metrics.setdefault(name, {}).setdefault(metric, {})
            own[document] = value
    if not samples.tasks and not may_be_empty:
        raise ValueError(f"{path}: no documents")
    _complete(path, samples)
    return samples


def _complete(path: Path, samples: Samples) -> None:
    """Raise unless all documents of a task have what one of them has."""
    for name, documents in samples.scores.items():
        found = dict(samples.metrics.get(name, {}))
        if name in samples.weights:
            found["tokens"] = samples.weights[name]
        for key, own in found.items():
            if own.keys() != documents.keys():
                raise ValueError(f"{path}: some documents of {name} lack the key {key!r}")


def missing_tasks(evaluation: Mapping[str, Any], path: Path) -> dict[str, Task]:
    """Tasks without data and why, from `rad.missing` of an `evaluation.json`."""
    described = evaluation["rad"]
    stated = described.get("missing") or {}
    if not isinstance(stated, dict):
        raise ValueError(f"{path}: rad.missing is not an object")
    tasks = {}
    for name, reason in stated.items():
        about = described.get("tasks", {}).get(name, {})
        tasks[name] = Task(
            name=name,
            family=str(about.get("family", name)),
            metric=str(about.get("metric", "score")),
            higher_is_better=bool(about.get("higher_is_better", True)),
            parent=str(about.get("task", name)),
            subtask=about.get("subtask"),
            length=about.get("length"),
            missing=str(reason) or "no data",
        )
    return tasks
