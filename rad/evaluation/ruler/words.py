"""Random keys, values and names, and the word lists that they come from.

The lists are those of wonderwords (MIT), as in the official builder: adjectives and nouns make the
keys of needles, all words together the vocabulary of `cwe`. Their digest is part of every sidecar:
another version of the package makes other documents.
"""

from __future__ import annotations

import functools
import hashlib
import string
import uuid
from importlib import metadata, resources
from random import Random

from rad.evaluation.sources import TaskError


class WordLists:
    """Adjectives, nouns and verbs, each sorted, and where they come from."""

    def __init__(self) -> None:
        try:
            folder = resources.files("wonderwords").joinpath("assets")
        except ModuleNotFoundError as error:
            raise TaskError(
                "RULER takes its words from the package wonderwords, which is not installed: "
                "pip install 'radbench[eval]' or pip install wonderwords==3.0.1"
            ) from error
        self.adjectives, self.nouns, self.verbs = (
            sorted({line.rstrip() for line in folder.joinpath(name).read_text("utf-8").split("\n")})
            for name in ("adjectivelist.txt", "nounlist.txt", "verblist.txt")
        )
        for words in (self.adjectives, self.nouns, self.verbs):
            if words and not words[0]:  # the end of the file
                del words[0]
        self.vocabulary = sorted({*self.adjectives, *self.nouns, *self.verbs})
        self.version = metadata.version("wonderwords")
        text = "\n".join([*self.adjectives, "", *self.nouns, "", *self.verbs])
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()

    def key(self, rng: Random) -> str:
        """An adjective and a noun, as `quick-fox`."""
        return f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"


@functools.cache
def word_lists() -> WordLists:
    """The lists of the installed package; raises `TaskError` when it is missing."""
    return WordLists()


def number(rng: Random, digits: int = 7) -> str:
    """A number of so many digits, the first not zero."""
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def make(kind: str, rng: Random) -> str:
    """A random `word`, `number` or `uuid`."""
    if kind == "word":
        return word_lists().key(rng)
    if kind == "number":
        return number(rng)
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def distinct(kind: str, wanted: int, rng: Random, taken: set[str] | None = None) -> list[str]:
    """So many different ones, none of `taken`, which they are added to."""
    seen = set() if taken is None else taken
    made: list[str] = []
    while len(made) < wanted:
        one = make(kind, rng)
        if one not in seen:
            seen.add(one)
            made.append(one)
    return made


def letters(
    wanted: int, size: int, rng: Random, alphabet: str = string.ascii_uppercase
) -> list[str]:
    """So many different names of `size` letters; never `VAR`, which introduces a name."""
    made: dict[str, None] = {}  # a set in the order of making
    while len(made) < wanted:
        name = "".join(rng.choices(alphabet, k=size))
        if name != "VAR":
            made[name] = None
    return list(made)
