"""What the workflow makes for a `ruler` task: which files, from which files, by which command.

Nothing is read but names: a study is planned before anything is made.
"""

from __future__ import annotations

from pathlib import Path

from rad.evaluation.data import MissingData
from rad.evaluation.ruler import tasks
from rad.evaluation.ruler.build import available, haystack_files, missing, question_files
from rad.task_settings import RulerSettings, TaskTable


def _settings(table: TaskTable, name: str) -> RulerSettings:
    settings = table.tasks[name]
    assert isinstance(settings, RulerSettings)
    return settings


def ruler_tasks(table: TaskTable) -> list[str]:
    """The names of a study's tasks of kind `ruler`."""
    return [name for name, each in table.tasks.items() if isinstance(each, RulerSettings)]


def planned(table: TaskTable, name: str) -> list[tuple[str, int]]:
    """The (sub-task, length) pairs that there are data for, the stand-in in its place.

    A sub-task of an unknown name is left to the task builder, which refuses it.
    """
    settings, root, data = _settings(table, name), Path(), Path(table.data)
    texts = haystack_files(settings.files, root, data)
    questions = question_files(name, settings.questions, root, data)
    found = [
        available(each, questions)
        for each in settings.subtasks or tasks.TASKS
        if each in tasks.EVERY
    ]
    return [
        (subtask, length)
        for subtask in dict.fromkeys(found)
        if missing(name, subtask, texts, questions, data) is None
        for length in settings.lengths
    ]


def check(table: TaskTable) -> None:
    """Raise `MissingData` for the first sub-task without data where that is an error."""
    data = Path(table.data)
    for name in ruler_tasks(table):
        settings = _settings(table, name)
        if settings.missing == "row":
            continue
        texts = haystack_files(settings.files, Path(), data)
        questions = question_files(name, settings.questions, Path(), data)
        for each in settings.subtasks or tasks.TASKS:
            if each in tasks.EVERY and (
                why := missing(name, available(each, questions), texts, questions, data)
            ):
                raise MissingData(why)


def input_files(table: TaskTable, name: str, subtask: str) -> list[str]:
    """The haystack or questions that a sub-task is made from, and a chat template of its own."""
    settings, root, data = _settings(table, name), Path(), Path(table.data)
    task = tasks.find(subtask)
    found = [table.chat_template] if settings.chat and table.chat_template else []
    if task.essay:
        found += haystack_files(settings.files, root, data)
    elif task.dataset is not None:
        questions = question_files(name, settings.questions, root, data)
        found.append(str(questions[task.dataset].path))
    return found


def options(table: TaskTable, name: str) -> list[str]:
    """Arguments of `rad ruler`, besides tokenizer, task, length and output."""
    settings = _settings(table, name)
    words = ["--name", name, "--data", table.data]
    words += ["--samples", str(table.wanted(name) or settings.samples)]
    words += ["--seed", str(settings.seed)]
    words += ["--haystack", *settings.files] if settings.files else []
    words += ["--questions", *settings.questions] if settings.questions else []
    if settings.chat:
        words.append("--chat")
        words += ["--chat-template", table.chat_template] if table.chat_template else []
    return words
