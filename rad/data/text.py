"""Running text: plain files (books) cut into documents, read line by line."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

_GUTENBERG_START = re.compile(r"\*\*\* ?START OF TH")
_GUTENBERG_END = re.compile(r"\*\*\* ?END OF TH")
DOCUMENT_CHARACTERS = 3000


def read_text(path: Path) -> str:
    """A text file with unified line ends and without the Project Gutenberg header and footer."""
    return "\n".join(_lines(Path(path))).strip()


def paragraphs(path: Path) -> Iterator[str]:
    """The paragraphs of a text file, each on one line; one of them is in memory at a time."""
    for blank, block in itertools.groupby(_lines(Path(path)), key=lambda line: not line.strip()):
        if not blank:
            yield " ".join(" ".join(block).split())


def text_documents(files: Iterable[Path]) -> Iterator[str]:
    """Documents of about `DOCUMENT_CHARACTERS`, never across files; paragraphs are not cut."""
    for file in files:
        waiting: list[str] = []
        size = 0
        for paragraph in paragraphs(file):
            waiting.append(paragraph)
            size += len(paragraph)
            if size >= DOCUMENT_CHARACTERS:
                yield "\n".join(waiting)
                waiting, size = [], 0
        if waiting:
            yield "\n".join(waiting)


def _lines(path: Path) -> Iterator[str]:
    """Lines without their ends, from after the header's mark to before the footer's."""
    if not path.is_file():
        raise ValueError(f"{path}: no such text file")
    # the marks are looked for first: whether there is a header decides what the first line is
    first, last = 0, None
    for number, line in enumerate(_raw_lines(path)):
        if not first and _GUTENBERG_START.match(line):
            first = number + 1
        elif _GUTENBERG_END.match(line):
            last = number
            break
    yield from itertools.islice(_raw_lines(path), first, last)


def _raw_lines(path: Path) -> Iterator[str]:
    # newline="\n": a lone carriage return does not end a line
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as stream:
        for line in stream:
            yield line.removesuffix("\n").removesuffix("\r")
