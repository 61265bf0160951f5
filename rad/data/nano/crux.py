"""crux_nano: short Python functions whose return value is predicted."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from rad.data.nano.example import Example
from rad.data.nano.words import NOUNS

FAMILY = "crux_nano"
Maker = Callable[[random.Random], str]

# Expressions over a list of digits: those that give such a list, and those that end a function.
_LIST_TO_LIST: tuple[Maker, ...] = (
    lambda r: "xs[::-1]",
    lambda r: "sorted(xs)",
    lambda r: "xs[1:]",
    lambda r: "xs[:-1]",
    lambda r: f"xs[:{r.randint(1, 3)}]",
    lambda r: f"xs + [{r.randint(0, 9)}]",
    lambda r: f"[{r.randint(0, 9)}] + xs",
    lambda r: f"[x for x in xs if x > {r.randint(2, 7)}]",
)
_LIST_TO_ANY: tuple[Maker, ...] = (
    lambda r: "len(xs)",
    lambda r: f"xs[{r.randint(0, 2)}]",
    lambda r: "xs[-1]",
    lambda r: "max(xs)",
    lambda r: "min(xs)",
    lambda r: "xs[0] + xs[1]",
    lambda r: f"{r.randint(0, 9)} in xs",
    lambda r: f"xs.count({r.randint(0, 9)})",
)
_LIST_HARD: tuple[Maker, ...] = (
    lambda r: "[x + 1 for x in xs]",
    lambda r: "[x for x in xs if x % 2 == 0]",
    lambda r: "sum(xs)",
    lambda r: "sorted(xs)[::-1]",
    lambda r: "max(xs) - min(xs)",
    lambda r: "xs[::2]",
)
_TEXT: tuple[Maker, ...] = (
    lambda r: "s.split()",
    lambda r: f"s.split()[{r.choice((0, 1, -1))}]",
    lambda r: "len(s.split())",
    lambda r: f"s + ' {r.choice(NOUNS)}'",
    lambda r: f"'{r.choice(NOUNS)} ' + s",
    lambda r: "s.split()[::-1]",
    lambda r: "s.split()[1:]",
)
_TEXT_HARD: tuple[Maker, ...] = (
    lambda r: "' '.join(s.split()[::-1])",
    lambda r: "sorted(s.split())",
    lambda r: "' '.join(s.split()[1:])",
    lambda r: "s.split() * 2",
)
_NUMBER: tuple[Maker, ...] = (
    lambda r: f"n + {r.randint(1, 9)}",
    lambda r: "n * 2",
    lambda r: f"n > {r.randint(3, 16)}",
    lambda r: f"max(n, {r.randint(3, 16)})",
    lambda r: "n % 2",
    lambda r: "[n, n + 1]",
)


def _digits(rng: random.Random, low: int, high: int) -> list[int]:
    return [rng.randint(0, 9) for _ in range(rng.randint(low, high))]


def _easy(rng: random.Random) -> tuple[str, list[str], Any]:
    """Parameter name, body lines and argument of a one- or two-step function."""
    kind = rng.random()
    if kind < 0.6:
        two = rng.random() < 0.25
        body = [f"xs = {rng.choice(_LIST_TO_LIST)(rng)}"] if two else []
        last = rng.choice(_LIST_TO_LIST + _LIST_TO_ANY)(rng)
        return "xs", [*body, f"return {last}"], _digits(rng, 3, 4)
    if kind < 0.85:
        return "s", [f"return {rng.choice(_TEXT)(rng)}"], " ".join(rng.sample(NOUNS, 3))
    return "n", [f"return {rng.choice(_NUMBER)(rng)}"], rng.randint(1, 20)


def _hard(rng: random.Random) -> tuple[str, list[str], Any]:
    """Two to three steps, longer arguments, and expressions that `_easy` does not use."""
    if rng.random() < 0.75:
        steps = rng.randint(1, 2)
        body = [f"xs = {rng.choice(_LIST_TO_LIST + _LIST_HARD[:2])(rng)}" for _ in range(steps)]
        last = rng.choice(_LIST_TO_LIST + _LIST_TO_ANY + _LIST_HARD)(rng)
        return "xs", [*body, f"return {last}"], _digits(rng, 4, 7)
    words = " ".join(rng.sample(NOUNS, rng.randint(3, 6)))
    return "s", [f"return {rng.choice(_TEXT + _TEXT_HARD)(rng)}"], words


def run(source: str, argument: Any) -> Any:
    """What our generated function returns; raises what it raises."""
    scope: dict[str, Any] = {}
    exec(source, scope)  # the source comes from the tables above only
    return scope["f"](argument)


def _again(rng: random.Random, argument: Any) -> Any:
    """Another argument of the same kind and size."""
    if isinstance(argument, list):
        return _digits(rng, len(argument), len(argument))
    if isinstance(argument, str):
        return " ".join(rng.sample(NOUNS, len(argument.split())))
    return rng.randint(1, 20)


def _turns(rng: random.Random, source: str, argument: Any, count: int) -> list[list[str]]:
    """Up to `count` further calls of the function with their results."""
    found: list[list[str]] = []
    for _ in range(count):
        other = _again(rng, argument)
        try:
            value = run(source, other)
        except (IndexError, ValueError):
            continue
        found.append([f"assert f({other!r}) == ", repr(value)])
    return found


def build(rng: random.Random, level: int, turns: int = 1) -> Example:
    """A function and a call; the answer is the literal it evaluates to when really run.

    Training documents ask for up to `turns` calls of the same function.
    """
    while True:
        name, body, argument = _hard(rng) if level else _easy(rng)
        source = f"def f({name}):\n" + "\n".join(f"    {line}" for line in body) + "\n"
        try:
            value = run(source, argument)
        except (IndexError, ValueError):
            continue  # an index past a shortened list
        prompt = f"{source}assert f({argument!r}) == "
        meta: dict[str, Any] = {"source": source, "argument": repr(argument), "steps": len(body)}
        if turns > 1:
            meta["turns"] = _turns(rng, source, argument, turns - 1)
        return Example(FAMILY, prompt, repr(value), meta)
