"""Build the documents and task files of a study, once, for all of its runs.

`build_tasks` writes, below its output folder,

    data/<task>.jsonl    one document per line
    yaml/<task>.yaml     an lm-eval task; its data file is relative to the output folder
    probe.jsonl          other documents, for the accuracy along the distillation curve
    manifest.json        the concrete tasks: family, metric, sub-task, length, samples, limits

Needs the tokenizer but neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rad.evaluation import ruler_text, sources
from rad.evaluation.sources import Count, Document, TaskError
from rad.files import digest, file_digest, read_json, write_json, write_text
from rad.settings import EvaluationSettings, TaskSettings

SCHEMA = 1
NANO_SUBTASKS: tuple[str, ...] = ("single", "multikey", "vt", "cwe")
# kind -> family, main metric, whether more is better
KINDS: dict[str, tuple[str, str, bool]] = {
    "gsm_nano": ("gsm", "exact_match", True),
    "gsm8k": ("gsm", "exact_match", True),
    "crux_nano": ("crux", "literal_match", True),
    "crux": ("crux", "literal_match", True),
    "ruler_nano": ("ruler", "exact_match", True),
    "ruler_text": ("ruler", "string_match", True),
    "perplexity": ("perplexity", "token_nll", False),
}
# The probe must not see test documents: another seed, far from any that a study would choose.
PROBE_SEED_OFFSET = 1_000_003


class Concrete(NamedTuple):
    """One lm-eval task: what a configured task stands for, or one (sub-task, length) of it."""

    name: str
    task: str
    settings: TaskSettings
    subtask: str | None
    length: int | None
    documents: list[Document]


# --- the tokenizer --------------------------------------------------------------------------


def counter(tokenizer_path: str) -> Count:
    """A function text -> number of tokens as the model will see them, `<s>` included.

    `tokenizer_path` is a checkpoint folder, or a hub id in the local cache.
    """
    file = Path(tokenizer_path) / "tokenizer.json"
    if file.is_file():
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(file))
        backend.no_truncation()
        return lambda text: len(backend.encode(text).ids)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    except (OSError, ValueError) as error:
        raise TaskError(
            f"no tokenizer at {tokenizer_path}: {str(error).splitlines()[0]}"
        ) from error
    return lambda text: len(tokenizer.encode(text))


def trained_context(tokenizer_path: str) -> int | None:
    """The context length that the checkpoint folder states, in tokens, or None."""
    for name, key in (
        ("config.json", "max_position_embeddings"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        file = Path(tokenizer_path) / name
        if file.is_file() and isinstance(value := read_json(file).get(key), int):
            return value
    return None


def context_limit(settings: EvaluationSettings, tokenizer_path: str) -> int:
    """Longest prompt plus answer in tokens: `max_length`, else what the checkpoint states."""
    limit = settings.max_length or trained_context(tokenizer_path)
    if limit is None:
        raise TaskError(
            f"evaluation.max_length: {tokenizer_path} does not say how long its context is; set it"
        )
    return limit


# --- documents ------------------------------------------------------------------------------


def _spread(total: int, parts: int) -> list[int]:
    """`total` divided into `parts` that differ by one at most, the larger ones first."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def _interleave(groups: Iterable[list[Document]]) -> list[Document]:
    """Round-robin, so that a prefix of the probe covers every sub-task and length."""
    left = [list(group) for group in groups]
    result = []
    while any(left):
        result += [group.pop(0) for group in left if group]
    return result


def _grid(task: str, settings: TaskSettings) -> list[tuple[str, int]]:
    """The (sub-task, length) pairs of a ruler task; raises `TaskError` on unknown ones or none."""
    known = NANO_SUBTASKS if settings.kind == "ruler_nano" else ruler_text.SUBTASKS
    chosen = settings.subtasks or list(known)
    for name in chosen:
        if name not in known:
            raise TaskError(
                f"evaluation.tasks.{task}.subtasks: unknown {name!r}; known: {', '.join(known)}"
            )
    if not settings.lengths:
        raise TaskError(f"evaluation.tasks.{task}.lengths: a ruler task needs at least one length")
    return [(name, length) for name in chosen for length in settings.lengths]


def _without(documents: list[Document], taken: set[str], most: int) -> list[Document]:
    return [item for item in documents if item["prompt"] not in taken][:most]


def _ruler(
    task: str, settings: TaskSettings, root: Path, probes: int, count: Count
) -> tuple[list[Concrete], list[Document]]:
    """The concrete tasks and the probe of a `ruler_nano` or `ruler_text` task."""
    grid = _grid(task, settings)
    hay = None
    if settings.kind == "ruler_text":
        hay = ruler_text.Haystack(sources.read_texts(task, settings.files, root))
        hay.check(task)

    def make(subtask: str, length: int, samples: int, seed: int) -> list[Document]:
        if hay is None:
            return sources.nano(task, settings, samples, seed, task=subtask, tokens=length)
        return ruler_text.documents(
            task,
            subtask,
            length,
            samples,
            hay=hay,
            seed=seed,
            new_tokens=settings.max_new_tokens,
            count=count,
        )

    concrete, groups = [], []
    for (subtask, length), share in zip(grid, _spread(probes, len(grid)), strict=True):
        documents = make(subtask, length, settings.samples, settings.seed)
        name = f"{task}_{subtask}_{length}"
        concrete.append(Concrete(name, task, settings, subtask, length, documents))
        if share:
            taken = {item["prompt"] for item in documents}
            others = make(subtask, length, share + 2, settings.seed + PROBE_SEED_OFFSET)
            groups.append(_without(others, taken, share))
    return concrete, _interleave(groups)


def _plain(
    task: str, settings: TaskSettings, root: Path, probes: int, count: Count, limit: int
) -> tuple[list[Document], list[Document]]:
    """(documents, probe documents) of word problems and output prediction."""
    if settings.kind in ("gsm_nano", "crux_nano"):
        documents = sources.nano(task, settings, settings.samples, settings.seed)
        if not probes:
            return documents, []
        taken = {item["prompt"] for item in documents}
        # Short functions repeat between seeds, so ask for more than needed.
        others = sources.nano(task, settings, 2 * probes, settings.seed + PROBE_SEED_OFFSET)
        return documents, _without(others, taken, probes)
    if settings.kind == "gsm8k":
        return sources.gsm8k(task, settings, root, probes, count, limit)
    if settings.kind == "crux":
        return sources.crux(task, settings, root, probes)
    raise TaskError(f"evaluation.tasks.{task}.kind: unknown kind {settings.kind!r}")


def _check_lengths(concrete: Concrete, count: Count, limit: int) -> int:
    """Longest prompt in tokens; raises `TaskError` when prompt and answer exceed the limit."""
    if concrete.settings.kind == "perplexity":
        return max(int(document["tokens"]) for document in concrete.documents) + 1
    longest = max(count(document["prompt"]) for document in concrete.documents)
    need = longest + concrete.settings.max_new_tokens
    if need > limit:
        raise TaskError(
            f"evaluation.tasks.{concrete.task}: {concrete.name} has a prompt of {longest} tokens "
            f"and generates up to {concrete.settings.max_new_tokens}, {need} in all, but the limit "
            f"is {limit}; raise evaluation.max_length or shorten the task"
        )
    return longest


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


def template(kind: str) -> dict[str, Any]:
    """The task YAML of a kind as shipped in `rad/evaluation/tasks`; functions stay references."""
    text = resources.files("rad.evaluation").joinpath("tasks", f"{kind}.yaml").read_text("utf-8")
    content: dict[str, Any] = yaml.load(text, Loader=_Loader)
    return content


def render(concrete: Concrete) -> str:
    """The lm-eval YAML of one concrete task."""
    content = template(concrete.settings.kind)
    content["task"] = concrete.name
    content["dataset_kwargs"] = {"data_files": {"test": f"data/{concrete.name}.jsonl"}}
    if "generation_kwargs" in content:
        content["generation_kwargs"]["max_gen_toks"] = concrete.settings.max_new_tokens
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _lines(rows: Iterable[Document]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _entry(concrete: Concrete, path: Path, prompt_tokens: int) -> dict[str, Any]:
    """The manifest's record of one concrete task."""
    family, metric, higher = KINDS[concrete.settings.kind]
    return {
        "name": concrete.name,
        "task": concrete.task,
        "kind": concrete.settings.kind,
        "family": family,
        "metric": metric,
        "higher_is_better": higher,
        "subtask": concrete.subtask,
        "length": concrete.length,
        "samples": len(concrete.documents),
        "max_new_tokens": concrete.settings.max_new_tokens,
        "prompt_tokens": prompt_tokens,
        "version": template(concrete.settings.kind)["metadata"]["version"],
        "sha256": file_digest(path),
    }


def build_tasks(
    settings: EvaluationSettings,
    tokenizer_path: str,
    output: Path,
    external_root: Path = Path("."),
) -> None:
    """Write documents, task files, probe and manifest of all tasks below `output`.

    Data files of the settings are relative to `external_root`. Lengths are measured with the
    tokenizer of the folder `tokenizer_path`. Raises `TaskError` (a `ValueError`) with one line when
    a file is missing or a prompt does not fit the context; nothing is written before all tasks are
    known to be sound.
    """
    count = counter(tokenizer_path)
    limit = context_limit(settings, tokenizer_path)
    every: list[Concrete] = []
    probe: list[Document] = []
    for task, options in settings.tasks.items():
        wanted = settings.probe_samples
        if options.kind in ("ruler_nano", "ruler_text"):
            found, others = _ruler(task, options, external_root, wanted, count)
        elif options.kind == "perplexity":
            # Blocks of the trained length, also where max_length lets long prompts run past it.
            block = min([limit, *options.lengths, trained_context(tokenizer_path) or limit])
            documents = sources.perplexity(task, options, external_root, count, block)
            found, others = [Concrete(task, task, options, None, None, documents)], []
        else:
            documents, others = _plain(task, options, external_root, wanted, count, limit)
            found = [Concrete(task, task, options, None, None, documents)]
        every += found
        # Nano answers end the text; other texts go on after theirs.
        ends = options.kind.endswith("_nano")
        probe += [
            {"task": task, "prompt": item["prompt"], "target": item["target"], "end": ends}
            for item in others
        ]
    names = [concrete.name for concrete in every]
    if twice := {name for name in names if names.count(name) > 1}:
        raise TaskError(f"evaluation.tasks: two tasks are called {min(twice)!r}")
    longest = [_check_lengths(concrete, count, limit) for concrete in every]

    entries = []
    for concrete, tokens in zip(every, longest, strict=True):
        path = output / "data" / f"{concrete.name}.jsonl"
        write_text(path, _lines(concrete.documents))
        write_text(output / "yaml" / f"{concrete.name}.yaml", render(concrete))
        entries.append(_entry(concrete, path, tokens))
    write_text(output / "probe.jsonl", _lines(probe))
    manifest = {
        "schema": SCHEMA,
        "max_length": limit,
        "settings_sha256": digest(settings.model_dump(mode="json")),
        "tasks": entries,
    }
    write_json(output / "manifest.json", manifest)
