"""RULER-style retrieval built from running text, at lengths measured in the model's own tokens.

Wording, needles and answer prefixes are those of NVIDIA/RULER (Apache-2.0); the haystack is made
of sentences of the given files. What is smaller than there, so that short contexts work: the number
of keys, hops and common words is the largest of a fixed ladder that fits, and there is no worked
example in front of `vt` and `cwe`. A document's length is prompt plus `max_new_tokens`.
"""

from __future__ import annotations

import itertools
import random
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from rad.evaluation.ruler.tasks import CWE, NEEDLE, NIAH_ONE, VT
from rad.evaluation.sources import Count, Document, TaskError, paragraphs

SUBTASKS: tuple[str, ...] = ("single", "multikey", "vt", "cwe")
_SENTENCE = re.compile(r"(?<=[.!?])[\"'\u201d\u2019]?\s+(?=[\"'\u201c\u2018]?[A-Z])")

# RULER's texts before the answer and its prefixes, with numbers as needles
_NEEDLE = NEEDLE.replace("{kind}", "numbers")
_NIAH = "".join(NIAH_ONE).replace("{kind}", "number").replace("{query}", "{key}")
_VT, _CWE = "".join(VT), "".join(CWE)
_KEYS = (4, 3, 2)  # needles of multikey, one of them asked for
_HOPS = (4, 3, 2, 1)
# common words, how often they come, how often every other word comes; RULER: 10, 30 (6), 3 (1)
_CWE_LADDER = ((10, 30, 3), (10, 6, 1), (5, 6, 1), (3, 6, 1), (2, 4, 1), (1, 4, 1))


class Haystack:
    """Sentences (of 20 to 120 characters) and words of the texts; every document draws from it."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.sentences: list[str] = []
        for text in texts:
            for paragraph in paragraphs(text):
                flat = " ".join(paragraph.split())
                self.sentences += [part for part in _SENTENCE.split(flat) if 20 < len(part) <= 120]
        counts = Counter(
            word for sentence in self.sentences for word in re.findall(r"\b[a-z]{4,9}\b", sentence)
        )
        # Neither the most frequent words (that, with) nor rare ones.
        self.words = [word for word, _ in counts.most_common(4000)][100:]

    def check(self, task: str) -> None:
        """Raise `TaskError` when there is too little text to build from."""
        if len(self.sentences) < 50 or len(self.words) < 100:
            raise TaskError(
                f"evaluation.tasks.{task}.files: {len(self.sentences)} sentences and "
                f"{len(self.words)} words are too little text to hide anything in"
            )


def _grow(render: Callable[[int], str], fits: Callable[[str], bool], most: int) -> tuple[int, str]:
    """The largest size up to `most` whose rendering fits, and it; size 0 must fit."""
    low, high = 0, 1
    while high < most and fits(render(high)):
        low, high = high, min(most, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(render(middle)) else (low, middle)
    if high == most and fits(render(most)):
        low = most
    return low, render(low)


def _mix(
    rng: random.Random, hay: Haystack, needles: Sequence[str]
) -> tuple[Callable[[int], str], int]:
    """A context of n book sentences with the needles, in order, at fixed relative depths."""
    depths = sorted(rng.random() for _ in needles)
    start = rng.randrange(len(hay.sentences))
    most = len(hay.sentences)

    def context(size: int) -> str:
        pieces = [hay.sentences[(start + index) % most] for index in range(size)]
        for needle, depth in reversed(list(zip(needles, depths, strict=True))):
            pieces.insert(round(depth * size), needle)
        return " ".join(pieces)

    return context, most


def _niah(rng: random.Random, hay: Haystack, fits: Callable[[str], bool], keys: int) -> Document:
    names = rng.sample(hay.words, keys)
    values = [str(rng.randint(10**6, 10**7 - 1)) for _ in names]
    needles = [_NEEDLE.format(key=k, value=v) for k, v in zip(names, values, strict=True)]
    asked = rng.randrange(keys)
    context, most = _mix(rng, hay, needles)
    size, prompt = _grow(lambda n: _NIAH.format(context=context(n), key=names[asked]), fits, most)
    answer = values[asked]
    return {"prompt": prompt, "target": f" {answer}", "references": [answer], "fill": size}


def _vt(rng: random.Random, hay: Haystack, fits: Callable[[str], bool], hops: int) -> Document:
    letters = string.ascii_uppercase
    names: list[str] = []
    while len(names) <= hops:
        name = "".join(rng.choice(letters) for _ in range(5))
        if name not in names:
            names.append(name)
    value = str(rng.randint(10000, 99999))
    needles = [f"VAR {names[0]} = {value}"]
    needles += [f"VAR {new} = VAR {old}" for old, new in itertools.pairwise(names)]
    context, most = _mix(rng, hay, needles)
    size, prompt = _grow(
        lambda n: _VT.format(context=context(n), value=value, count=len(names)), fits, most
    )
    # The prompt ends in a space after the colon as in RULER; tokenizers want it with the answer.
    return {
        "prompt": prompt.rstrip(" "),
        "target": " " + " ".join(names),
        "references": names,
        "fill": size,
    }


def _cwe(
    rng: random.Random,
    hay: Haystack,
    fits: Callable[[str], bool],
    ladder: tuple[int, int, int],
) -> Document:
    common, often, seldom = ladder
    pool = list(hay.words)
    rng.shuffle(pool)
    head, tail = pool[:common], pool[common:]
    order = rng.random()

    def render(size: int) -> str:
        words = head * often + tail[:size] * seldom
        random.Random(f"{order}/{size}").shuffle(words)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))
        return _CWE.format(context=listed, count=common)

    size, prompt = _grow(render, fits, len(tail))
    return {"prompt": prompt, "target": " " + " ".join(head), "references": head, "fill": size}


def documents(
    task: str,
    subtask: str,
    length: int,
    samples: int,
    *,
    hay: Haystack,
    seed: int,
    new_tokens: int,
    count: Count,
) -> list[Document]:
    """`samples` documents of one sub-task with prompt + `new_tokens` of at most `length` tokens.

    Every document has a random generator of its own, seeded by (task, length, seed, index), so more
    samples or other tasks change nothing. Raises `TaskError` when `length` is too short.
    """

    def fits(prompt: str) -> bool:
        return count(prompt) + new_tokens <= length

    build: dict[str, list[Callable[[random.Random], Document]]] = {
        "single": [lambda rng: _niah(rng, hay, fits, 1)],
        "multikey": [lambda rng, k=k: _niah(rng, hay, fits, k) for k in _KEYS],  # type: ignore[misc]
        "vt": [lambda rng, h=h: _vt(rng, hay, fits, h) for h in _HOPS],  # type: ignore[misc]
        "cwe": [lambda rng, r=r: _cwe(rng, hay, fits, r) for r in _CWE_LADDER],  # type: ignore[misc]
    }
    result: list[Document] = []
    for index in range(samples):
        for rung in build[subtask]:
            document = rung(random.Random(f"ruler_text/{subtask}/{length}/{seed}/{index}"))
            if fits(document["prompt"]) and document["fill"] >= 1:
                break
        else:
            bare = count(document["prompt"])
            raise TaskError(
                f"evaluation.tasks.{task}.lengths: {subtask} does not fit into {length} tokens: "
                f"{bare} for the shortest prompt and {new_tokens} new ones; use a longer length"
            )
        del document["fill"]
        result.append(document)
    return result
