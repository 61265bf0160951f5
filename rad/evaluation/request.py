"""What a kind of task is asked for, and what it answers: the contract of `documents/`.

A document is a mapping with `id`, `prompt` (exactly what the model continues) and `target`, or
`choices` and `gold`, or `text`; besides, what its scorer needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rad.evaluation.chat import Chat
from rad.evaluation.data import Rows, read_dataset
from rad.evaluation.sources import Count, Document, TaskError
from rad.task_settings import TaskSettings


@dataclass(frozen=True)
class Request:
    """One configured task of a study. Lengths are in tokens of the study's tokenizer."""

    task: str
    settings: Any  # the kind's own settings class
    root: Path  # what the settings' files are relative to
    data: Path  # folder with data files in their standard places
    count: Count
    limit: int  # longest prompt and answer
    trained: int | None  # context the checkpoint states
    samples: int | None  # documents wanted, None for all
    probes: int  # documents wanted for the curve
    tokenizer: str  # checkpoint folder or hub id
    offline: bool = False
    chat_template: str | None = None
    ruler: Path | None = None  # folder with documents of `rad ruler`, a folder per task

    def rows(self, dataset: str, files: list[str] | None = None) -> Rows:
        """The rows of a known data set: from `files`, the data folder or the hub.

        Raises `MissingData` when it is in neither place.
        """
        chosen = self.settings.files if files is None else files
        return read_dataset(
            self.task, dataset, chosen, self.root, self.data, self.offline, self.settings.revision
        )

    @cached_property
    def chat(self) -> Chat:
        """The tokenizer's chat template; raises `TaskError` when it has none."""
        return Chat(self.task, self.tokenizer, self.chat_template)

    def whole(
        self, documents: list[Document], probe: Sequence[Document] = (), **options: Any
    ) -> list[Concrete]:
        """The configured task as one concrete task; `options` are those of `Concrete`."""
        return [Concrete(self.task, self.task, self.settings, documents, list(probe), **options)]

    def error(self, key: str, text: str) -> TaskError:
        """An error about one key of the task's settings."""
        return TaskError(f"evaluation.tasks.{self.task}.{key}: {text}")


@dataclass
class Concrete:
    """One lm-eval task: what a configured task stands for, or one (sub-task, length) of it."""

    name: str
    task: str
    settings: TaskSettings
    documents: list[Document]
    probe: list[Document] = field(default_factory=list)
    subtask: str | None = None
    length: int | None = None
    template: str | None = None  # file in `tasks/`; default: the kind's name
    generation: dict[str, Any] = field(default_factory=dict)  # over the template's
    repeats: int = 1
    missing: str | None = None  # why there are no documents
    facts: dict[str, Any] = field(default_factory=dict)  # provenance, fill ratio, labels


@dataclass(frozen=True)
class Kind:
    """A kind of task: how documents are made, what is measured and how a response is scored."""

    family: str
    metrics: tuple[str, ...]  # the first is the headline
    build: Callable[[Request], list[Concrete]]
    score: Callable[..., dict[str, Any]]  # (document, responses) -> metrics
    higher_is_better: bool = True
