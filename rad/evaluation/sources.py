"""Reading text files for tasks, and the error of a task that cannot be built. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Document = dict[str, Any]
Count = Callable[[str], int]  # tokens of a text, with the <s> that the model will see


class TaskError(ValueError):
    """A task cannot be built from its settings; the message names the task and the remedy."""


# --- files ----------------------------------------------------------------------------------


def read_texts(task: str, files: Sequence[str], root: Path, key: str = "files") -> list[str]:
    """The contents of `files` (relative to `root`); raises `TaskError` naming task and file."""
    if not files:
        raise TaskError(f"evaluation.tasks.{task}.{key}: this kind of task needs at least one file")
    texts = []
    for name in files:
        path = root / name
        try:
            texts.append(path.read_text(encoding="utf-8").replace("\r\n", "\n"))
        except OSError as error:
            raise TaskError(
                f"evaluation.tasks.{task}.{key}: cannot read {path} ({error.strerror})"
            ) from error
        except UnicodeDecodeError as error:
            raise TaskError(f"evaluation.tasks.{task}.{key}: {path} is not UTF-8 text") from error
    return texts


# --- running text ---------------------------------------------------------------------------

_PARAGRAPH = re.compile(r"\n\s*\n")
# Project Gutenberg puts its own header and licence around a book.
_BOOK = re.compile(r"\*\*\* ?START OF.*?\*\*\*(.*)\*\*\* ?END OF", re.DOTALL)


def paragraphs(text: str) -> list[str]:
    """Paragraphs between empty lines, or the lines; without the wrapping of Project Gutenberg."""
    book = _BOOK.search(text)
    text = book.group(1) if book else text
    parts = [part for part in _PARAGRAPH.split(text) if part.strip()]
    chosen = parts if len(parts) > 1 else text.split("\n")
    return [part.strip("\n") for part in chosen if part.strip()]
