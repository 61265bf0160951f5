"""Checks before any work that need the models' configurations and data files, but no weights.

Each fault is one line that names the key and what would be right. Local models need no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rad.evaluation.data import check_data, hub_places
from rad.evaluation.ruler import plan
from rad.evaluation.sources import TaskError
from rad.models.hub import Kind
from rad.models.sources import ModelError, describe
from rad.placement import BudgetError
from rad.settings import NEEDS
from rad.study import Study, StudyError

HEAD_WISE = ("retrieval_aware", "preset")  # a preset may be of heads: it says so itself


def check(study: Study) -> dict[str, dict[str, Any]]:
    """Model name -> its description; raises `StudyError` on the first fault.

    Hub ids are described by the workflow's first rule instead, because that needs the network.
    """
    records = {}
    for name, settings in study.models.items():
        try:
            record = describe(name, settings.model_dump(), weights=False, hub=False)
        except ModelError as error:
            raise StudyError(f"models.{name}: {error}") from error
        if record is not None:
            records[name] = record
    _check_vocabularies(study, records)
    _check_budgets(study, records)
    _check_files(study)
    _check_steps(study)
    return records


def _check_vocabularies(study: Study, records: dict[str, dict[str, Any]]) -> None:
    for run in study.run_table.values():
        base, teacher = records.get(run.base), records.get(run.teacher)
        if base and teacher and base["tokenizer_sha256"] != teacher["tokenizer_sha256"]:
            raise StudyError(
                f"teacher {run.teacher!r} has another vocabulary than base {run.base!r} "
                f"({teacher['vocab_size']} against {base['vocab_size']} tokens): distillation "
                "compares next-token distributions, so both need the same tokenizer"
            )


def _check_budgets(study: Study, records: dict[str, dict[str, Any]]) -> None:
    for run in study.run_table.values():
        record = records.get(run.base)
        if record is None:
            continue
        settings = study.selector_settings[run.selector]
        method = str(settings.method)  # type: ignore[attr-defined]
        layer_wise = method in NEEDS and method not in HEAD_WISE
        if getattr(settings, "unit", "layers") == "heads":
            layer_wise = False
        if run.budget.kv_bytes_per_token is not None:
            continue  # a limit: the most that fits
        try:
            run.budget.head_count(record["layers"], record["heads"])
            if layer_wise:
                run.budget.layer_count(record["layers"], record["heads"])
        except BudgetError as error:
            raise StudyError(f"run {run.id}: {error}") from error


def _check_steps(study: Study) -> None:
    """A stage of less than one step, or of rows longer than the corpus has, trains nothing."""
    stages = [
        (f"recipes.{name}", stage, study.corpora[study.corpus].context)
        for name in {run.recipe for run in study.run_table.values()}
        for stage in study.recipes[name].stages
    ]
    if study.alignment is not None:
        context = study.corpora[study.alignment.corpus].context
        stages.append(("alignment", study.alignment.stage(), context))
    for where, stage, context in stages:
        try:
            stage.steps(min(stage.context or context, context))
        except ValueError as error:
            raise StudyError(f"{where}: {error}") from error


def _check_files(study: Study) -> None:
    wanted = [
        (f"corpora.{name}.files", file)
        for name, corpus in study.corpora.items()
        for file in corpus.input_files
    ]
    if study.evaluation.chat_template:
        wanted.append(("evaluation.chat_template", study.evaluation.chat_template))
    for name, task in study.evaluation.tasks.items():
        wanted += [(f"evaluation.tasks.{name}.files", file) for file in task.files]
        for key in ("shot_files", "questions"):
            files = getattr(task, key, [])
            wanted += [(f"evaluation.tasks.{name}.{key}", file) for file in files]
    for name, corpus in study.corpora.items():
        for source in corpus.every_source:
            if source.source in ("text", "jsonl", "parquet") and not source.files:
                raise StudyError(
                    f"corpora.{name}.files: source `{source.source}` needs at least one file"
                )
            if source.source == "hub" and not source.dataset:
                raise StudyError(f"corpora.{name}.dataset: source `hub` needs a dataset")
    try:
        check_data(study.evaluation)
        plan.check(study.evaluation)
    except TaskError as error:  # questions that cannot be read, too
        raise StudyError(str(error)) from error
    for key, file in wanted:
        if not Path(file).exists():
            raise StudyError(f"{key}: no such file: {file}")


def repositories(study: Study) -> list[tuple[str, Kind, str, str | None]]:
    """(key, kind, source, revision) of every model, and of data sets that come from the hub."""
    found: list[tuple[str, Kind, str, str | None]] = [
        (f"models.{name}", "model", settings.source, settings.revision)
        for name, settings in study.models.items()
    ]
    for name, corpus in study.corpora.items():
        found += [
            (f"corpora.{name}", "dataset", str(source.dataset), source.revision)
            for source in corpus.every_source
            if source.source == "hub"
        ]
    asked: set[str] = set()
    for name, task in study.evaluation.tasks.items():
        for place in hub_places(study.evaluation, name):
            if place not in asked and task.missing == "error":
                asked.add(place)
                found.append((f"evaluation.tasks.{name}", "dataset", place, task.revision))
    return found
