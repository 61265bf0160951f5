"""Running text as haystack: sentences and words of the given files, in their order.

A document reads from a random paragraph on; after the last it goes on with the first, as often as
needed (the official builder repeats its essays too). Paragraphs are cut into sentences when they
are first read, so that a haystack of books costs nothing before it is used.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rad.evaluation.sources import TaskError, paragraphs, read_texts
from rad.files import file_digest

# A sentence ends at . ! or ?, with its closing quote, before a capital; not after a title.
_SENTENCE = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"'\u201d\u2019]))(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)"
    r"\s+(?=[\"'\u201c\u2018]?[A-Z])"
)
FEWEST_WORDS = 200  # a shorter text would be repeated until nothing else is in the context


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph, each on one line."""
    return _SENTENCE.split(" ".join(paragraph.split()))


class Passage(NamedTuple):
    """Consecutive words, and the index of the word after the end of each sentence."""

    words: list[str]
    ends: list[int]


class Haystack:
    """The paragraphs of some texts; raises `TaskError` when they are too short for a haystack."""

    def __init__(self, task: str, texts: Sequence[str]) -> None:
        self.paragraphs = [part for text in texts for part in paragraphs(text)]
        self._cut: dict[int, list[list[str]]] = {}
        self.words = sum(len(part.split()) for part in self.paragraphs)
        if self.words < FEWEST_WORDS:
            raise TaskError(
                f"evaluation.tasks.{task}.files: {self.words} words are too little text for a "
                f"haystack; at least {FEWEST_WORDS} are needed"
            )

    def _sentences(self, index: int) -> list[list[str]]:
        if index not in self._cut:
            found = sentences(self.paragraphs[index])
            self._cut[index] = [words for each in found if (words := each.split())]
        return self._cut[index]

    def passage(self, start: int, wanted: int) -> Passage:
        """At least `wanted` words from paragraph `start` on."""
        words: list[str] = []
        ends: list[int] = []
        index = start
        while len(words) < wanted:
            for sentence in self._sentences(index % len(self.paragraphs)):
                words += sentence
                ends.append(len(words))
            index += 1
        return Passage(words, ends)


class TextFiles:
    """Files that a haystack is made of when it is first needed."""

    def __init__(self, task: str, files: Sequence[str], root: Path) -> None:
        self.task, self.files, self.root = task, list(files), root
        self._haystack: Haystack | None = None
        self._facts: list[dict[str, str]] | None = None

    def facts(self) -> list[dict[str, str]]:
        """Name and sha256 of every file; raises `TaskError` when one cannot be read."""
        if self._facts is None:
            self._require()
            try:
                self._facts = [
                    {"file": Path(name).name, "sha256": file_digest(self.root / name)}
                    for name in self.files
                ]
            except OSError as error:
                raise TaskError(
                    f"evaluation.tasks.{self.task}.files: cannot read {error.filename} "
                    f"({error.strerror})"
                ) from error
        return self._facts

    def load(self) -> Haystack:
        """The haystack; raises `TaskError` when there is no file or too little text."""
        if self._haystack is None:
            self._require()
            self._haystack = Haystack(self.task, read_texts(self.task, self.files, self.root))
        return self._haystack

    def _require(self) -> None:
        if not self.files:
            raise TaskError(
                f"evaluation.tasks.{self.task}.files: this task hides its needles in running text "
                "and no text file is named; put books into text/gutenberg of the data folder, or "
                "name files"
            )
