"""The largest context that fits a length: binary search, led by estimates, on exact counts.

Estimates only choose where to look. What is returned was counted as a whole with the tokenizer, and
`fill` raises when prompt and answer exceed the length or leave more than a tenth of it empty.
Source of the procedure: RULER's builders, which search the size of the haystack in the same way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from rad.evaluation.sources import Count

LEAST_FILL = 0.9  # of length - new tokens
_GUIDED = 6  # guesses led by estimates; halving from then on
_SLACK = 400  # a guess aims at 1/400 below the room, so that most first guesses fit
_ENOUGH = 100  # and the search ends within 1/100 of it
Render = Callable[[int, int], str]  # (size, extra) -> text before the answer prefix


class Unfit(ValueError):
    """No size of the context fits; `needed` tokens would be enough for the smallest."""

    def __init__(self, needed: int) -> None:
        super().__init__(f"{needed} tokens needed")
        self.needed = needed


class Coarse(ValueError):
    """Too much of the length stays empty."""


@dataclass
class Draft:
    """A document but for the size of its context: `size` units and, rarely, `extra` small ones."""

    render: Render
    prefix: str
    references: list[str]
    target: str
    least: int  # smallest size that makes sense
    most: int
    estimate: Callable[[int], int]  # tokens up to a size, plus any constant; grows with the size
    extras: Callable[[int], int] = field(default=lambda size: 0)  # how many small units, at most
    once: tuple[str, ...] = ()  # what the text must contain exactly once


class Filled(NamedTuple):
    """A context of the right size, its tokens, and how it came about."""

    text: str
    tokens: int  # of the whole prompt
    extra: int  # small units that fill the rest


class Meter:
    """Counts prompts exactly, and pieces of running text from memory."""

    def __init__(self, count: Count, wrap: Callable[[str, str], str] | None = None) -> None:
        self._count, self._wrap = count, wrap
        self._anchor = count("a")
        self._costs: dict[str, int] = {}
        self._words: dict[str, int] = {}
        self._numbered = [0]

    def prompt(self, text: str, prefix: str) -> str:
        """What the model continues: with the chat template, if there is one."""
        return self._wrap(text, prefix) if self._wrap else text + prefix

    def tokens(self, text: str, prefix: str) -> int:
        """Tokens of the prompt."""
        return self._count(self.prompt(text, prefix))

    def measure(self, piece: str) -> int:
        """Tokens that `piece` adds to a text."""
        return self._count(f"a{piece}") - self._anchor

    def cost(self, piece: str) -> int:
        """`measure`, remembered: for words and lines that come again."""
        known = self._costs.get(piece)
        if known is None:
            known = self._costs[piece] = self.measure(piece)
        return known

    def words(self, words: list[str]) -> list[int]:
        """Tokens of the first 0, 1, 2, ... of the words, each behind a space."""
        known = self._words
        for word in {word for word in words if word not in known}:
            known[word] = self.measure(f" {word}")
        return list(accumulate(map(known.__getitem__, words), initial=0))

    def numbered(self, items: int) -> int:
        """Tokens of the numbers and dots of a list ` 1. ... 2. ...` of so many items."""
        while len(self._numbered) <= items:
            self._numbered.append(self._numbered[-1] + self.measure(f" {len(self._numbered)}."))
        return self._numbered[items]


def _guess(
    estimate: Callable[[int], int], low: int, high: int, tokens: int, rate: float, room: int
) -> int:
    """The largest size between `low` (of so many tokens) and `high` that should fit into `room`."""
    base, budget = estimate(low), room - tokens
    first, last = low, high
    while last - first > 1:
        middle = (first + last) // 2
        if (estimate(middle) - base) * rate <= budget:
            first = middle
        else:
            last = middle
    return min(max(first, low + 1), high - 1)


def largest(
    count: Callable[[int], int],
    estimate: Callable[[int], int],
    least: int,
    most: int,
    room: int,
) -> tuple[int, int]:
    """(size, tokens) of the largest size in [least, most] with `count(size) <= room`, but for 1 %.

    `count` should grow with the size. The search also ends where the next unit would not fit by the
    estimate. Raises `Unfit` when `least` does not fit.
    """
    low, tokens, high, rate = least, count(least), most + 1, 1.0
    if tokens > room:
        raise Unfit(tokens)
    for step in range(64):
        if high - low <= 1 or tokens >= room - room // _ENOUGH:
            break
        if step < _GUIDED:
            middle = _guess(estimate, low, high, tokens, rate, room - room // _SLACK)
        else:
            middle = (low + high) // 2
        counted = count(middle)
        ahead = estimate(middle) - estimate(low)
        if ahead > 0:
            rate = (counted - tokens) / ahead
        if counted > room:
            high = middle
            continue
        low, tokens = middle, counted
        if low + 1 < high and tokens + (estimate(low + 1) - estimate(low)) * rate > room:
            break
    return low, tokens


def fill(draft: Draft, meter: Meter, length: int, new_tokens: int) -> Filled:
    """The draft at the largest size with prompt + `new_tokens` within `length`.

    Where whole units leave more than a tenth empty, small ones fill the rest. Raises `Unfit` when
    the smallest context does not fit, `Coarse` when too much stays empty all the same.
    """
    room = length - new_tokens
    if room <= 0:
        raise Unfit(meter.tokens(draft.render(draft.least, 0), draft.prefix))
    texts: dict[tuple[int, int], str] = {}

    def count(size: int, extra: int = 0) -> int:
        texts[size, extra] = draft.render(size, extra)
        return meter.tokens(texts[size, extra], draft.prefix)

    size, tokens = largest(count, draft.estimate, draft.least, draft.most, room)
    extra = 0
    if tokens < LEAST_FILL * room and (most := draft.extras(size)):
        each = max(1, (count(size, most) - tokens) // most)
        extra, tokens = largest(lambda n: count(size, n), lambda n: n * each, 0, most, room)
    if not LEAST_FILL * room <= tokens <= room:
        raise Coarse(
            f"the largest context that fits makes a prompt of {tokens} tokens where {room} are "
            f"wanted, and at least {LEAST_FILL:.0%} must be filled"
        )
    return Filled(texts[size, extra], tokens, extra)
