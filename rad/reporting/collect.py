"""Read `results/<study>/` into typed records; every fault is one `ValueError` naming the file.

Formats are those of `docs/contracts.md`. Nothing is computed here beyond checking that all runs
were scored on the same documents, which paired differences rely on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rad.files import read_json
from rad.placement import Placement
from rad.study import Run, Study, training_digest

PERPLEXITY = "perplexity"


@dataclass(frozen=True)
class Task:
    """A scored task as the evaluation expanded it."""

    name: str
    family: str
    metric: str
    higher_is_better: bool


@dataclass(frozen=True)
class CurvePoint:
    """One logged point of a distillation; KL in nats per token.

    What a curve of an older version does not have is None or empty.
    """

    step: int
    tokens: int
    held_out_kl: float | None
    probe: Mapping[str, float]
    agreement: float | None = None  # share of tokens with the base's most likely one
    probe_documents: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class EfficiencyPoint:
    """Cost of one sequence at a context length in tokens."""

    context: int
    cache_bytes: float
    prefill_seconds: float | None
    decode_tokens_per_second: float | None


@dataclass(frozen=True)
class Efficiency:
    """Sizes and speeds of a model."""

    parameters: int
    kv_bytes_per_token: float
    state_bytes: float
    flops_per_token: float | None
    points: tuple[EfficiencyPoint, ...]


@dataclass(frozen=True)
class RunResult:
    """Everything a finished run, or a reference model, left behind."""

    id: str
    run: Run | None  # None for a reference model
    tasks: Mapping[str, Task]
    scores: Mapping[str, Mapping[int, float]]  # task -> document -> score
    weights: Mapping[str, Mapping[int, float]]  # tokens of documents, for tasks that have them
    efficiency: Efficiency
    evaluation: Mapping[str, Any]  # the key `rad` of evaluation.json
    lm_eval: Mapping[str, Any] = field(default_factory=dict)  # what lm-eval says about itself
    placement: Placement | None = None
    curve: tuple[CurvePoint, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StageTime:
    """Wall time of a stage over its jobs."""

    stage: str
    jobs: int
    seconds: float
    longest: float
    max_rss_mib: float | None


@dataclass(frozen=True)
class Results:
    """A study's results."""

    study: Study
    root: Path
    runs: Mapping[str, RunResult]
    references: Mapping[str, RunResult]  # by model name
    stages: tuple[StageTime, ...]

    @property
    def everything(self) -> list[RunResult]:
        """Runs, then reference models."""
        return [*self.runs.values(), *self.references.values()]

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks of the study, in the order of the evaluation."""
        for result in self.everything:
            return dict(result.tasks)
        return {}


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`file:line` and record of each line of a JSON Lines file."""
    try:
        with open(path, encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{number}: not JSON ({error})") from error
                if not isinstance(record, dict):
                    raise ValueError(f"{path}:{number}: expected an object")
                yield f"{path}:{number}", record
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text") from error


def _object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object")
    return content


def _value(record: Mapping[str, Any], key: str, where: str | Path) -> Any:
    if key not in record:
        raise ValueError(f"{where}: key {key!r} is missing")
    return record[key]


def _number(record: Mapping[str, Any], key: str, where: str | Path) -> float:
    value = _value(record, key, where)
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"{where}: {key} is {value!r}, expected a number")
    return float(value)


def _optional(record: Mapping[str, Any], key: str, where: str | Path) -> float | None:
    return None if record.get(key) is None else _number(record, key, where)


def read_curve(path: Path) -> tuple[CurvePoint, ...]:
    """The logged points of a `curve.jsonl`, by tokens."""
    points = []
    for where, record in _records(path):
        probe = record.get("probe") or {}
        if not isinstance(probe, dict):
            raise ValueError(f"{where}: probe is not an object")
        points.append(
            CurvePoint(
                step=int(_number(record, "step", where)),
                tokens=int(_number(record, "tokens", where)),
                held_out_kl=_optional(record, "held_out_kl", where),
                probe={name: _number(probe, name, where) for name in probe},
                agreement=_optional(record, "held_out_agreement", where),
                probe_documents=_answers(record, where),
            )
        )
    return tuple(sorted(points, key=lambda point: point.tokens))


def _answers(record: Mapping[str, Any], where: str) -> dict[str, tuple[int, ...]]:
    """Task -> 1 or 0 per document of the probe, kept as a text of digits."""
    kept = record.get("probe_documents") or {}
    if not isinstance(kept, dict):
        raise ValueError(f"{where}: probe_documents is not an object")
    for name, text in kept.items():
        if not isinstance(text, str) or not text or text.strip("01"):
            raise ValueError(f"{where}: probe_documents of {name} is not a text of 0 and 1")
    return {name: tuple(map(int, text)) for name, text in kept.items()}


@dataclass(frozen=True)
class Samples:
    """The content of a `samples.jsonl` that is not text; scores and weights by task, document."""

    tasks: dict[str, Task]
    scores: dict[str, dict[int, float]]
    weights: dict[str, dict[int, float]]


def read_samples(path: Path, described: Mapping[str, Any]) -> Samples:
    """Per-document scores of a `samples.jsonl`.

    `described` is `tasks` of the evaluation, which knows the direction of each metric.
    """
    tasks: dict[str, Task] = {}
    scores: dict[str, dict[int, float]] = {}
    weights: dict[str, dict[int, float]] = {}
    for where, record in _records(path):
        name = str(_value(record, "task", where))
        if name not in tasks:
            family = str(_value(record, "family", where))
            entry = described.get(name, {})
            tasks[name] = Task(
                name=name,
                family=family,
                metric=str(_value(record, "metric", where)),
                higher_is_better=bool(entry.get("higher_is_better", family != PERPLEXITY)),
            )
        document = int(_number(record, "doc_id", where))
        if document in scores.setdefault(name, {}):
            raise ValueError(f"{where}: document {document} of {name} appears twice")
        scores[name][document] = _number(record, "score", where)
        tokens = _optional(record, "tokens", where)
        if tokens is not None:
            weights.setdefault(name, {})[document] = tokens
    if not tasks:
        raise ValueError(f"{path}: no documents")
    for name, own in weights.items():
        if own.keys() != scores[name].keys():
            raise ValueError(f"{path}: some documents of {name} lack the key 'tokens'")
    return Samples(tasks, scores, weights)


def read_efficiency(path: Path) -> Efficiency:
    """The sizes and speeds of an `efficiency.json`."""
    content = _object(path)
    points = [
        EfficiencyPoint(
            context=int(_number(point, "context", path)),
            cache_bytes=_number(point, "cache_bytes", path),
            prefill_seconds=_optional(point, "prefill_seconds", path),
            decode_tokens_per_second=_optional(point, "decode_tokens_per_second", path),
        )
        for point in _value(content, "points", path)
    ]
    return Efficiency(
        parameters=int(_number(content, "parameters", path)),
        kv_bytes_per_token=_number(content, "kv_bytes_per_token", path),
        state_bytes=_number(content, "state_bytes", path),
        flops_per_token=_optional(content, "flops_per_token", path),
        points=tuple(sorted(points, key=lambda point: point.context)),
    )


def _scored(folder: Path, run: Run | None, **fields: Any) -> RunResult:
    """The files that runs and reference models share, plus `fields`."""
    path = folder / "evaluation.json"
    evaluation = _object(path)
    described = _value(evaluation, "rad", path)
    samples = read_samples(folder / "samples.jsonl", described.get("tasks", {}))
    # lm-eval repeats every prompt in its samples; only what it says about itself is kept
    about = {key: value for key, value in evaluation.items() if isinstance(value, str)}
    return RunResult(
        id=folder.name,
        run=run,
        tasks=samples.tasks,
        scores=samples.scores,
        weights=samples.weights,
        efficiency=read_efficiency(folder / "efficiency.json"),
        evaluation=described,
        lm_eval=about,
        **fields,
    )


def read_run(study: Study, folder: Path, run: Run) -> RunResult:
    """A run of the grid; raises `ValueError` when it was made from another configuration."""
    spec = _object(folder / "spec.json")
    if training_digest(spec) != study.spec_digest(run.id):
        raise ValueError(
            f"{folder / 'spec.json'}: this run was made from another configuration; "
            "run the workflow again"
        )
    try:
        placement = Placement.load(folder / "placement.json")
    except FileNotFoundError as error:
        raise ValueError(f"{folder / 'placement.json'}: no such file") from error
    path = folder / "curve.jsonl"
    # a recipe without stages has nothing to log, and may leave no curve
    has_curve = bool(study.recipes[run.recipe].stages) or path.exists()
    return _scored(
        folder,
        run,
        placement=placement,
        curve=read_curve(path) if has_curve else (),
        training=_object(folder / "training.json"),
    )


def read_stages(folder: Path) -> tuple[StageTime, ...]:
    """Wall time per stage from Snakemake's `benchmark:` records; empty when there are none."""
    stages = []
    for stage in sorted(path for path in folder.glob("*") if path.is_dir()):
        seconds, memory = [], []
        for path in sorted(stage.rglob("*.jsonl")):
            for where, record in _records(path):
                seconds.append(_number(record, "s", where))
                # jobs shorter than the sampling interval have no memory record
                if isinstance(record.get("max_rss"), int | float):
                    memory.append(float(record["max_rss"]))
        if seconds:
            stages.append(
                StageTime(
                    stage=stage.name,
                    jobs=len(seconds),
                    seconds=sum(seconds),
                    longest=max(seconds),
                    max_rss_mib=max(memory, default=None),
                )
            )
    return tuple(stages)


def _same_documents(results: list[RunResult], root: Path) -> None:
    """Raise unless every result was scored on the documents of the first."""
    for result in results[1:]:
        path = root / "runs" / result.id / "samples.jsonl"
        first = results[0]
        if result.scores.keys() != first.scores.keys():
            odd = sorted(result.scores.keys() ^ first.scores.keys())
            raise ValueError(f"{path}: task {odd[0]} is not scored in this run and in {first.id}")
        for task, documents in result.scores.items():
            if documents.keys() != first.scores[task].keys():
                raise ValueError(f"{path}: documents of {task} differ from those of {first.id}")


def collect(study: Study, root: Path) -> Results:
    """Read all runs and reference models of `study` under `root` (`results/<study>/`)."""
    root = Path(root)
    runs = {
        identity: read_run(study, root / "runs" / identity, run)
        for identity, run in study.run_table.items()
    }
    references = {name: _scored(root / "runs" / f"model-{name}", None) for name in study.references}
    results = Results(study, root, runs, references, read_stages(root / "benchmarks"))
    _same_documents(results.everything, root)
    return results
