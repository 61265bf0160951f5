"""Read `results/<study>/` into typed records; every fault is one `ValueError` naming the file.

Formats are those of `docs/contracts.md`. Nothing is computed here beyond checking that all runs
were scored on the same documents, which paired differences rely on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rad.placement import Placement
from rad.reporting.records import json_object, number, optional, records, value_of
from rad.reporting.samples import Samples, Task, missing_tasks, read_samples
from rad.study import Run, Study, training_digest


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
    decode_tokens_per_second: float | None


@dataclass(frozen=True)
class Efficiency:
    """Sizes and speeds of a model."""

    parameters: int
    kv_bytes_per_token: float
    state_bytes: float
    flops_per_token: float | None
    points: tuple[EfficiencyPoint, ...]
    record: Mapping[str, Any] = field(default_factory=dict)  # the file, with all that was probed


@dataclass(frozen=True)
class RunResult:
    """Everything a finished run, or a reference model, left behind."""

    id: str
    run: Run | None  # None for a reference model
    samples: Samples
    missing: Mapping[str, Task]  # tasks without data, which no model was scored on
    efficiency: Efficiency
    evaluation: Mapping[str, Any]  # the key `rad` of evaluation.json
    lm_eval: Mapping[str, Any] = field(default_factory=dict)  # what lm-eval says about itself
    placement: Placement | None = None
    curve: tuple[CurvePoint, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tasks(self) -> Mapping[str, Task]:
        """The tasks that were scored."""
        return self.samples.tasks

    @property
    def scores(self) -> Mapping[str, Mapping[int, float]]:
        """Task -> document -> score."""
        return self.samples.scores

    @property
    def weights(self) -> Mapping[str, Mapping[int, float]]:
        """Tokens of documents, for tasks that have them."""
        return self.samples.weights


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

    @property
    def missing(self) -> dict[str, Task]:
        """Tasks of the study that have no data, the same for every model."""
        for result in self.everything:
            return dict(result.missing)
        return {}


def read_curve(path: Path) -> tuple[CurvePoint, ...]:
    """The logged points of a `curve.jsonl`, by tokens."""
    points = []
    for where, record in records(path):
        probe = record.get("probe") or {}
        if not isinstance(probe, dict):
            raise ValueError(f"{where}: probe is not an object")
        points.append(
            CurvePoint(
                step=int(number(record, "step", where)),
                tokens=int(number(record, "tokens", where)),
                held_out_kl=optional(record, "held_out_kl", where),
                probe={name: number(probe, name, where) for name in probe},
                agreement=optional(record, "held_out_agreement", where),
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


def read_efficiency(path: Path) -> Efficiency:
    """The sizes and speeds of an `efficiency.json`."""
    content = json_object(path)
    points = [
        EfficiencyPoint(
            context=int(number(point, "context", path)),
            cache_bytes=number(point, "cache_bytes", path),
            decode_tokens_per_second=optional(point, "decode_tokens_per_second", path),
        )
        for point in value_of(content, "points", path)
    ]
    return Efficiency(
        parameters=int(number(content, "parameters", path)),
        kv_bytes_per_token=number(content, "kv_bytes_per_token", path),
        state_bytes=number(content, "state_bytes", path),
        flops_per_token=optional(content, "flops_per_token", path),
        points=tuple(sorted(points, key=lambda point: point.context)),
        record=content,
    )


class Scored(NamedTuple):
    """The content of a folder's `evaluation.json` and `samples.jsonl`."""

    evaluation: dict[str, Any]
    described: dict[str, Any]  # the key `rad` of it
    missing: dict[str, Task]
    samples: Samples


def read_scored(folder: Path) -> Scored:
    """What a model answered, and the tasks that it could not be asked."""
    path = folder / "evaluation.json"
    evaluation = json_object(path)
    described = value_of(evaluation, "rad", path)
    missing = missing_tasks(evaluation, path)
    samples = read_samples(
        folder / "samples.jsonl", described.get("tasks", {}), may_be_empty=bool(missing)
    )
    return Scored(evaluation, described, missing, samples)


def _scored(folder: Path, run: Run | None, **fields: Any) -> RunResult:
    """The files that runs and reference models share, plus `fields`."""
    found = read_scored(folder)
    # lm-eval repeats every prompt in its samples; only what it says about itself is kept
    about = {key: value for key, value in found.evaluation.items() if isinstance(value, str)}
    return RunResult(
        id=folder.name,
        run=run,
        samples=found.samples,
        missing=found.missing,
        efficiency=read_efficiency(folder / "efficiency.json"),
        evaluation=found.described,
        lm_eval=about,
        **fields,
    )


def check_spec(study: Study, path: Path, run: Run) -> None:
    """Raise `ValueError` unless the `spec.json` of a run is the study's."""
    if training_digest(json_object(path)) != study.spec_digest(run.id):
        raise ValueError(
            f"{path}: this run was made from another configuration; run the workflow again"
        )


def read_run(study: Study, folder: Path, run: Run) -> RunResult:
    """A run of the grid; raises `ValueError` when it was made from another configuration."""
    check_spec(study, folder / "spec.json", run)
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
        training=json_object(folder / "training.json"),
    )


def read_stages(folder: Path) -> tuple[StageTime, ...]:
    """Wall time per stage from Snakemake's `benchmark:` records; empty when there are none."""
    stages = []
    for stage in sorted(path for path in folder.glob("*") if path.is_dir()):
        seconds, memory = [], []
        for path in sorted(stage.rglob("*.jsonl")):
            for where, record in records(path):
                seconds.append(number(record, "s", where))
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
        if result.missing.keys() != first.missing.keys():
            odd = sorted(result.missing.keys() ^ first.missing.keys())
            raise ValueError(
                f"{path.with_name('evaluation.json')}: task {odd[0]} has no data in this run or in "
                f"{first.id}, not in both; evaluate again"
            )
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
