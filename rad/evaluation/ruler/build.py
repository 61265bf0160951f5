"""The concrete tasks of a configured `ruler` task: one per sub-task and length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rad.evaluation.data import DATASETS, MissingData, standard_file
from rad.evaluation.documents.grid import grid, interleave, spread
from rad.evaluation.request import Concrete, Request
from rad.evaluation.ruler import tasks
from rad.evaluation.ruler.generate import Builder
from rad.evaluation.ruler.haystack import TextFiles
from rad.evaluation.ruler.questions import QuestionFile, layout
from rad.evaluation.ruler.store import Store
from rad.evaluation.sources import Count, Document, TaskError
from rad.evaluation.tokenizer import tokenizer_digest

BOOKS = Path("text/gutenberg")  # below the data folder: the default haystack


def haystack_files(files: Sequence[str], root: Path, data: Path) -> list[str]:
    """The text files of a study: those named, else the books of the data folder."""
    return list(files) or sorted(
        str(data / BOOKS / p.name) for p in (root / data / BOOKS).glob("*.txt")
    )


def question_files(
    name: str, files: Sequence[str], root: Path, data: Path
) -> dict[str, QuestionFile]:
    """Data set -> file of the questions at hand: those named, else those of the data folder.

    Raises `TaskError` when a named file cannot be read.
    """
    found: dict[str, QuestionFile] = {}
    for dataset in ("squad", "hotpotqa", "xquad"):
        if (file := standard_file(dataset, root, data)) is not None:
            found[dataset] = QuestionFile(name, dataset, root / file)
    for each in files:
        path = root / each
        try:
            dataset = layout(path)
        except OSError as error:
            raise TaskError(
                f"evaluation.tasks.{name}.questions: cannot read {path} ({error.strerror})"
            ) from error
        found[dataset] = QuestionFile(name, dataset, path)
    return found


def available(subtask: str, found: dict[str, QuestionFile]) -> str:
    """The sub-task itself, or the stand-in for it where only that one's questions are at hand."""
    dataset = tasks.EVERY[subtask].dataset
    stand_in = tasks.EVERY[tasks.STAND_IN]
    if dataset in found or stand_in.stand_in != subtask or stand_in.dataset not in found:
        return subtask
    return tasks.STAND_IN


def missing(
    name: str, subtask: str, texts: Sequence[str], found: dict[str, QuestionFile], data: Path
) -> str | None:
    """Why a sub-task has no documents, and which file would give it some; None when it has."""
    task = tasks.EVERY[subtask]
    if task.dataset is not None and task.dataset not in found:
        return (
            f"evaluation.tasks.{name}: no data for {subtask}: put {task.dataset}'s file at "
            f"{data / DATASETS[task.dataset].file}, or name it in `questions`"
        )
    if task.essay and not texts:
        return (
            f"evaluation.tasks.{name}: no haystack for {subtask}: put text files (*.txt) into "
            f"{data / BOOKS}, or name them in `files`"
        )
    return None


def builder_of(
    name: str,
    count: Count,
    texts: Sequence[str],
    questions: Sequence[str],
    root: Path,
    data: Path,
    wrap: Callable[[str, str], str] | None = None,
) -> Builder:
    """A builder of the named files, or of those in their standard places."""
    files = TextFiles(name, haystack_files(texts, root, data), root)
    return Builder(name, count, files, question_files(name, questions, root, data), wrap)


def build(request: Request) -> list[Concrete]:
    """One concrete task per sub-task and length, `<task>_<subtask>_<length>`.

    Documents come from the files below `request.ruler` (see `store.py`), which are made where they
    are missing; without it they are made in memory. A sub-task without data is a task that says
    what is missing, or `MissingData` where the settings want an error.
    """
    settings, samples = request.settings, request.samples or request.settings.samples
    wrap = request.chat.wrap if settings.chat else None
    builder = builder_of(
        request.task,
        request.count,
        settings.files,
        settings.questions,
        request.root,
        request.data,
        wrap,
    )
    store = None
    if request.ruler is not None:
        store = Store(request.ruler / request.task, builder, tokenizer_digest(request.tokenizer))

    extra = [tasks.STAND_IN] * (tasks.STAND_IN in settings.subtasks)
    wanted = grid(request, [*tasks.TASKS, *extra])
    pairs = list(
        dict.fromkeys((available(subtask, builder.questions), length) for subtask, length in wanted)
    )
    built, probes = [], []
    for (subtask, length), share in zip(pairs, spread(request.probes, len(pairs)), strict=True):
        task = tasks.EVERY[subtask]
        # the number of generated tokens is part of the task
        own = settings.model_copy(update={"max_new_tokens": task.new_tokens})
        name = f"{request.task}_{subtask}_{length}"
        concrete = Concrete(name, request.task, own, [], [], subtask, length)
        built.append(concrete)
        concrete.missing = missing(
            request.task, subtask, builder.texts.files, builder.questions, request.data
        )
        if concrete.missing is not None:
            if settings.missing == "error":
                raise MissingData(concrete.missing)
            continue
        if store is None:
            concrete.documents, concrete.facts = builder.documents(
                subtask, length, samples, settings.seed
            )
        else:
            concrete.documents, concrete.facts, _ = store.ensure(
                subtask, length, samples, settings.seed
            )
        if share:
            probes.append(_probe(builder, concrete, share, settings.seed))
    built[0].probe = interleave(probes)
    return built


def _probe(builder: Builder, concrete: Concrete, share: int, seed: int) -> list[Document]:
    """Documents of another stream, none of which asks a question that is scored."""
    assert concrete.subtask is not None and concrete.length is not None
    asked: set[Any] = {document.get("question") for document in concrete.documents} - {None}
    others, _ = builder.documents(concrete.subtask, concrete.length, share, seed, stream="probe")
    return [document for document in others if document.get("question") not in asked]
