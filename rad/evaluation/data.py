"""Where the data of a task come from: named files, the data folder, or the hub.

The same rows come out whatever the source is. Nothing is executed and no loading script is used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rad.data.records import first_line
from rad.evaluation.sources import Document, TaskError, read_texts
from rad.files import file_digest
from rad.models import hub
from rad.settings import EvaluationSettings


class MissingData(TaskError):
    """A data set is in none of its places; the message names them."""


class Place(NamedTuple):
    """Standard places of a data set."""

    file: str  # below the data folder
    fields: tuple[str, ...]  # what a row must have
    hub: str | None = None  # dataset id
    config: str | None = None
    split: str = "test"
    licence: str = "see its page"
    whole: bool = False  # one JSON or text file, not rows


@dataclass(frozen=True)
class Rows:
    """Rows of a data set (of a whole file: one row with `text`) and where they come from."""

    rows: list[Document]
    facts: dict[str, Any]


# name -> places; hub ids are those of lm-eval 0.4.13's tasks
DATASETS: dict[str, Place] = {
    "gsm8k": Place(
        "gsm8k/test.jsonl", ("question", "answer"), "openai/gsm8k", "main", licence="MIT"
    ),
    "gsm8k_train": Place(
        "gsm8k/train.jsonl", ("question", "answer"), "openai/gsm8k", "main", "train", "MIT"
    ),
    "cruxeval": Place(
        "cruxeval/cruxeval.jsonl",
        ("code", "input", "output"),
        "cruxeval-org/cruxeval",
        licence="MIT",
    ),
    "swde": Place(
        "swde/validation.jsonl",
        ("text", "key", "value"),
        "hazyresearch/based-swde-v2",
        split="validation",
    ),
    "fda": Place(
        "fda/validation.jsonl",
        ("text", "key", "value"),
        "hazyresearch/based-fda",
        split="validation",
    ),
    "squad_completion": Place(
        "squad_completion/validation.jsonl",
        ("text", "value"),
        "hazyresearch/based-squad",
        split="validation",
    ),
    "arc_easy": Place("arc_easy/test.jsonl", ("question",), "allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": Place(
        "arc_challenge/test.jsonl", ("question",), "allenai/ai2_arc", "ARC-Challenge"
    ),
    "hellaswag": Place(
        "hellaswag/validation.jsonl",
        ("ctx_a", "ctx_b", "activity_label"),
        "Rowan/hellaswag",
        split="validation",
    ),
    "piqa": Place(
        "piqa/validation.jsonl", ("goal", "sol1", "sol2"), "baber/piqa", split="validation"
    ),
    "winogrande": Place(
        "winogrande/validation.jsonl",
        ("sentence", "option1", "option2"),
        "allenai/winogrande",
        "winogrande_xl",
        "validation",
    ),
    "openbookqa": Place("openbookqa/test.jsonl", ("question_stem",), "allenai/openbookqa", "main"),
    "mmlu": Place("mmlu/test.jsonl", ("question", "subject"), "cais/mmlu", "all"),
    "pubmedqa": Place("pubmedqa/test.jsonl", ("QUESTION", "final_decision"), "bigbio/pubmed_qa"),
    "race": Place("race/test.jsonl", ("article", "problems"), "EleutherAI/race", "high"),
    "truthfulqa": Place(
        "truthfulqa/validation.jsonl",
        ("question",),
        "truthfulqa/truthful_qa",
        "multiple_choice",
        "validation",
    ),
    "lambada": Place("lambada/test.jsonl", ("text",), "EleutherAI/lambada_openai", "default"),
    "wikitext": Place(
        "text/wikitext-2/test.txt",
        ("page",),
        "EleutherAI/wikitext_document_level",
        "wikitext-2-raw-v1",
        licence="CC BY-SA 3.0",
        whole=True,
    ),
    "xquad": Place("ruler/xquad/xquad.en.json", (), licence="CC BY-SA 4.0", whole=True),
    "squad": Place("squad/dev-v2.0.json", (), licence="CC BY-SA 4.0", whole=True),
    "hotpotqa": Place(
        "hotpotqa/hotpot_dev_distractor_v1.json", (), licence="CC BY-SA 4.0", whole=True
    ),
}


def offline(setting: bool) -> bool:
    """Whether the hub must not be asked: by the settings or by either library's variable."""
    return setting or hub.offline("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")


def _parse(task: str, path: Path, text: str, fields: Sequence[str]) -> list[Document]:
    """The rows of a JSON Lines text; every error names file, line and field."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"evaluation.tasks.{task}.files: {path} line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskError(f"{where} is not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise TaskError(f"{where} is no object with the fields {', '.join(fields)}")
        for field in fields:
            if row.get(field) is None:
                raise TaskError(f"{where} lacks the field {field!r}")
        rows.append(row)
    return rows


def _from_files(task: str, place: Place, files: Sequence[str], root: Path) -> Rows:
    texts = read_texts(task, files, root)
    if place.whole:
        rows: list[Document] = [{"text": text} for text in texts]
    else:
        rows = [
            row
            for name, text in zip(files, texts, strict=True)
            for row in _parse(task, root / name, text, place.fields)
        ]
    if not rows:
        raise TaskError(f"evaluation.tasks.{task}.files: no rows in {', '.join(files)}")
    digests = [file_digest(root / name) for name in files]
    found = {"files": list(files), "sha256": digests, "licence": place.licence}
    return Rows(rows, found)


def _from_hub(task: str, dataset: str, place: Place, revision: str | None) -> Rows:
    # datasets is slow to import and wants the network: only when no file was found
    from datasets import load_dataset

    where = f"{place.hub}{f' ({place.config})' if place.config else ''}"
    try:
        loaded = load_dataset(place.hub, place.config, split=place.split, revision=revision)
    except (OSError, ValueError) as error:
        raise MissingData(
            f"evaluation.tasks.{task}: {dataset}: no file {place.file} in evaluation.data, and the "
            f"hub did not give {where}: {first_line(error)}"
        ) from error
    missing = [name for name in place.fields if name not in loaded.column_names]
    if missing:
        raise TaskError(
            f"evaluation.tasks.{task}: {where} lacks the field {missing[0]!r}; "
            f"it has {', '.join(loaded.column_names)}"
        )
    rows = [dict(row) for row in loaded]
    if place.whole:
        rows = [{"text": row[place.fields[0]]} for row in rows]
    content = json.dumps(rows, sort_keys=True, ensure_ascii=False, default=str)
    found = {
        "dataset": place.hub,
        "config": place.config,
        "split": place.split,
        "revision": revision,
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "licence": place.licence,
    }
    return Rows(rows, found)


def read_dataset(
    task: str,
    dataset: str,
    files: Sequence[str],
    root: Path,
    data: Path,
    no_hub: bool,
    revision: str | None,
) -> Rows:
    """Rows of a data set from `files`, else its place below `data`, else the hub.

    Raises `MissingData` when there is no such file and the hub may not be asked, does not have it
    or cannot be reached; `TaskError` when a file or a row is not as it should be.
    """
    place = DATASETS[dataset]
    if files:
        return _from_files(task, place, files, root)
    if (path := standard_file(dataset, root, data)) is not None:
        return _from_files(task, place, [str(path)], root)
    if place.hub is None or offline(no_hub):
        why = "it is on no hub" if place.hub is None else f"offline, so {place.hub} is not asked"
        raise MissingData(
            f"evaluation.tasks.{task}: no data for {dataset}: put {data / place.file} there, or "
            f"name it in `files` ({why})"
        )
    return _from_hub(task, dataset, place, revision)


def standard_file(dataset: str, root: Path, data: Path) -> Path | None:
    """The data set's file below the data folder, relative to `root`, if it is there."""
    path = data / DATASETS[dataset].file
    return path if (root / path).is_file() else None


# kind -> data sets that it reads, the others read files of the settings or none
NEEDS: dict[str, tuple[str, ...]] = {
    "gsm8k": ("gsm8k", "gsm8k_train"),
    "gsm8k_cot": ("gsm8k",),
    "gsm8k_cot_llama": ("gsm8k",),
    "gsm_zeroeval": ("gsm8k",),
    "crux": ("cruxeval",),
    "crux_zeroeval": ("cruxeval",),
    "cruxeval_output": ("cruxeval",),
    "cruxeval_input": ("cruxeval",),
    "swde": ("swde",),
    "fda": ("fda",),
    "squad_completion": ("squad_completion",),
    "qa_recall": ("xquad",),
    "truthfulqa_mc1": ("truthfulqa",),
    "truthfulqa_mc2": ("truthfulqa",),
    "perplexity": ("wikitext",),
    **{
        name: (name,)
        for name in (
            *("arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande"),
            *("openbookqa", "mmlu", "pubmedqa", "race", "lambada"),
        )
    },
}
# key of the settings -> the data set that its files stand for; `files` stand for the first
_KEYS = {"gsm8k_train": "shot_files"}


def _unnamed(
    settings: EvaluationSettings, name: str, root: Path
) -> Iterator[tuple[str, Path | None]]:
    """(data set, its standard file if it is there) of what a task needs and names no file for."""
    task = settings.tasks[name]
    for dataset in NEEDS.get(task.kind, ()):
        if not getattr(task, _KEYS.get(dataset, "files"), ()):
            yield dataset, standard_file(dataset, root, Path(settings.data))


def input_files(settings: EvaluationSettings, root: Path = Path(".")) -> list[str]:
    """The files that the tasks read: those of the settings, and those found in the data folder.

    What a `ruler` task is made from is not among them: its documents have a rule of their own.
    """
    found = {settings.chat_template} if settings.chat_template else set[str]()
    for name, task in settings.tasks.items():
        for key in ("files", "shot_files", "questions"):
            found.update(getattr(task, key, ()))
        found.update(str(path) for _, path in _unnamed(settings, name, root) if path is not None)
    return sorted(found)


def check_data(settings: EvaluationSettings, root: Path = Path(".")) -> None:
    """Raise `MissingData` for the first task whose data are nowhere and cannot be fetched."""
    for name, task in settings.tasks.items():
        if task.missing == "row":
            continue
        for dataset, file in _unnamed(settings, name, root):
            place = DATASETS[dataset]
            if file is None and (place.hub is None or offline(settings.offline)):
                raise MissingData(
                    f"evaluation.tasks.{name}: no data for {dataset}: put "
                    f"{Path(settings.data) / place.file} there, or name its file in the task's "
                    "settings"
                )


def hub_places(settings: EvaluationSettings, name: str, root: Path = Path(".")) -> list[str]:
    """Ids of the hub's data sets that a task will be made from, having no file."""
    unnamed = _unnamed(settings, name, root)
    return [place for dataset, file in unnamed if file is None and (place := DATASETS[dataset].hub)]
