"""Build the documents and task files of a study, once, for all of its runs.

`build_tasks` writes, below its output folder,

    data/<task>.jsonl    one document per line
    yaml/<task>.yaml     an lm-eval task; its data file is relative to the output folder
    probe.jsonl          other documents, for the accuracy along the distillation curve
    manifest.json        the concrete tasks: family, metrics, sub-task, length, prompts, tokens

Needs the tokenizer but neither torch nor transformers, unless prompts have a chat template.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from rad.evaluation.data import MissingData
from rad.evaluation.kinds import KINDS
from rad.evaluation.request import Concrete, Request
from rad.evaluation.sources import Count, Document, TaskError
from rad.evaluation.tokenizer import context_limit, counter, trained_context
from rad.files import digest, file_digest, write_json, write_text
from rad.settings import EvaluationSettings

SCHEMA = 2

# --- documents ------------------------------------------------------------------------------


def _requested(
    settings: EvaluationSettings,
    tokenizer: str,
    root: Path,
    count: Count,
    limit: int,
    ruler: Path | None,
) -> Iterable[Concrete]:
    """The concrete tasks of every configured one, missing data as a task without documents."""
    trained = trained_context(tokenizer)
    for task, options in settings.tasks.items():
        request = Request(
            task=task,
            settings=options,
            root=root,
            data=Path(settings.data),
            count=count,
            limit=limit,
            trained=trained,
            samples=settings.wanted(task),
            probes=settings.probe_samples,
            tokenizer=tokenizer,
            offline=settings.offline,
            chat_template=settings.chat_template,
            ruler=ruler,
        )
        try:
            found = KINDS[options.kind].build(request)
        except MissingData as error:
            if options.missing == "error":
                raise
            found = [Concrete(task, task, options, [], missing=str(error))]
        for concrete in found:
            if not concrete.documents and concrete.missing is None:
                raise TaskError(f"evaluation.tasks.{task}: {concrete.name} has no documents")
            yield concrete


def _prompt_tokens(document: Document, count: Count) -> int:
    """Tokens of a prompt; of a choice task with the longest choice behind it."""
    if "tokens" in document:
        return int(document["tokens"])
    if "choices" in document:
        contexts = document.get("contexts") or [document["prompt"]] * len(document["choices"])
        pairs = zip(contexts, document["choices"], strict=True)
        return max(count(f"{context} {choice}") for context, choice in pairs)
    return count(document["prompt"])


def _check_lengths(concrete: Concrete, count: Count, limit: int) -> list[int]:
    """Tokens of every prompt; raises `TaskError` when prompt and answer exceed the limit."""
    tokens = [_prompt_tokens(document, count) for document in concrete.documents]
    if concrete.missing is not None:
        return tokens
    kind = output_type(concrete)
    if kind == "loglikelihood_rolling":
        return [length + 1 for length in tokens]  # <s> in front
    longest = max(tokens)
    answer = concrete.settings.max_new_tokens if kind == "generate_until" else 0
    if longest + answer > limit:
        raise TaskError(
            f"evaluation.tasks.{concrete.task}: {concrete.name} has a prompt of {longest} tokens "
            f"and generates up to {answer}, {longest + answer} in all, but the limit "
            f"is {limit}; raise evaluation.max_length or shorten the task"
        )
    return tokens


# --- task files -----------------------------------------------------------------------------


class _Function(str):
    """A `!function` reference in a task YAML."""


class _Loader(yaml.SafeLoader):
    pass


class _Dumper(yaml.SafeDumper):
    pass


def _function(loader: _Loader, node: Any) -> _Function:
    return _Function(loader.construct_scalar(node))


_Loader.add_constructor("!function", _function)
_Dumper.add_representer(
    _Function, lambda dumper, data: dumper.represent_scalar("!function", str(data))
)


def template(name: str) -> dict[str, Any]:
    """A task YAML as shipped in `rad/evaluation/tasks`; functions stay references."""
    text = resources.files("rad.evaluation").joinpath("tasks", f"{name}.yaml").read_text("utf-8")
    content: dict[str, Any] = yaml.load(text, Loader=_Loader)
    return content


def _template(concrete: Concrete) -> dict[str, Any]:
    return template(concrete.template or concrete.settings.kind)


def output_type(concrete: Concrete) -> str:
    """lm-eval's kind of request: generate_until, multiple_choice, loglikelihood(_rolling)."""
    return str(_template(concrete)["output_type"])


def render(concrete: Concrete) -> str:
    """The lm-eval YAML of one concrete task."""
    content = _template(concrete)
    content["task"] = concrete.name
    content["dataset_kwargs"] = {"data_files": {"test": f"data/{concrete.name}.jsonl"}}
    if "generation_kwargs" in content:
        content["generation_kwargs"]["max_gen_toks"] = concrete.settings.max_new_tokens
        content["generation_kwargs"].update(concrete.generation)
    if concrete.repeats > 1:
        content["repeats"] = concrete.repeats
        # without a filter of its own lm-eval scores the first of several answers
        take = [{"function": "take_first_k", "k": concrete.repeats}]
        content["filter_list"] = [{"name": "all", "filter": take}]
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _lines(rows: Iterable[Document]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _entry(concrete: Concrete, tokens: list[int]) -> dict[str, Any]:
    """The manifest's record of one concrete task."""
    kind = KINDS[concrete.settings.kind]
    shared = {
        "name": concrete.name,
        "task": concrete.task,
        "kind": concrete.settings.kind,
        "family": concrete.settings.family or kind.family,
        "metric": kind.metrics[0],
        "metrics": list(kind.metrics),
        "higher_is_better": kind.higher_is_better,
        "subtask": concrete.subtask,
        "length": concrete.length,
    }
    if concrete.missing is not None:
        return {**shared, "status": "missing", "reason": concrete.missing}
    choices = [len(document.get("choices", [None])) for document in concrete.documents]
    return {
        **shared,
        "status": "ready",
        "samples": len(concrete.documents),
        "output_type": output_type(concrete),
        "repeats": concrete.repeats,
        "max_new_tokens": concrete.settings.max_new_tokens,
        # what the model reads: every answer and every choice has a prompt of its own
        "prompts": sum(choices) * concrete.repeats,
        "prompt_tokens": max(tokens),
        "prompt_tokens_total": sum(t * c for t, c in zip(tokens, choices, strict=True))
        * concrete.repeats,
        "version": _template(concrete)["metadata"]["version"],
        "facts": concrete.facts,
    }


def build_tasks(
    settings: EvaluationSettings,
    tokenizer_path: str,
    output: Path,
    external_root: Path = Path("."),
    ruler: Path | None = None,
) -> dict[str, Any]:
    """Write documents, task files, probe and manifest of all tasks below `output`.

    Returns the manifest. Data files of the settings are relative to `external_root`; `ruler` is a
    folder with documents that `rad ruler` made. Lengths are measured with the tokenizer of the
    folder `tokenizer_path`. Raises `TaskError` (a `ValueError`) with one line when a file is
    missing or a prompt does not fit the context; nothing is written before all tasks are known to
    be sound.
    """
    count = counter(tokenizer_path)
    limit = context_limit(settings, tokenizer_path)
    every = list(_requested(settings, tokenizer_path, external_root, count, limit, ruler))
    names = [concrete.name for concrete in every]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TaskError(f"evaluation.tasks: two tasks are called {min(twice)!r}")
    tokens = [_check_lengths(concrete, count, limit) for concrete in every]

    entries, probe = [], []
    for concrete, lengths in zip(every, tokens, strict=True):
        entry = _entry(concrete, lengths)
        if concrete.missing is None:
            path = output / "data" / f"{concrete.name}.jsonl"
            write_text(path, _lines(concrete.documents))
            write_text(output / "yaml" / f"{concrete.name}.yaml", render(concrete))
            entry["sha256"] = file_digest(path)
        entries.append(entry)
        # Nano answers end the text; other texts go on after theirs.
        ends = concrete.settings.kind.endswith("_nano")
        probe += [
            {"task": concrete.task, "prompt": item["prompt"], "target": item["target"], "end": ends}
            for item in concrete.probe
        ]
    write_text(output / "probe.jsonl", _lines(probe))
    manifest = {
        "schema": SCHEMA,
        "max_length": limit,
        "settings_sha256": digest(settings.model_dump(mode="json")),
        "tasks": entries,
    }
    write_json(output / "manifest.json", manifest)
    return manifest
