"""gsm_nano: one- to five-step word problems with a worked answer ending in `#### n`."""

from __future__ import annotations

import random

from rad.data.nano.example import Example
from rad.data.nano.words import NAMES

FAMILY = "gsm_nano"
_THINGS = ("hat", "cap", "cup", "pot", "pan", "bag", "net", "pen", "map", "nut", "toy", "key")
_GAIN = ("gets", "buys", "finds")
_LOSS = ("loses", "sells", "drops")


def _step(rng: random.Random, name: str, total: int, level: int) -> tuple[str, str, int]:
    """One event: its sentence, its worked equation, and the new total."""
    limit, operand = ((20, 9), (60, 19), (99, 49))[level]
    kinds = []
    if total < limit:
        kinds += ["gain"] * 2
    if total > 1:
        kinds += ["loss"] * 2
    if 1 < total <= limit // 2:
        kinds.append("double")
    kind = rng.choice(kinds)
    if kind == "double":
        return f" {name} doubles that.", f"{total} * 2 = {2 * total}.", 2 * total
    if kind == "gain":
        amount = rng.randint(1, operand)
        new = total + amount
        return f" {name} {rng.choice(_GAIN)} {amount}.", f"{total} + {amount} = {new}.", new
    amount = rng.randint(1, min(operand, total))
    new = total - amount
    return f" {name} {rng.choice(_LOSS)} {amount}.", f"{total} - {amount} = {new}.", new


def build(rng: random.Random, level: int) -> Example:
    """A problem of 1-2, 3-4 or 4-5 steps; from level 1 on with a distractor half of the time."""
    name, other = rng.sample(NAMES, 2)
    thing, thing2 = rng.sample(_THINGS, 2)
    steps = rng.randint(*((1, 2), (3, 4), (4, 5))[level])
    total = rng.randint(*((2, 20), (10, 50), (20, 90))[level])
    sentences = [f"{name} has {total} {thing}s."]
    worked: list[str] = []
    for _ in range(steps):
        sentence, equation, total = _step(rng, name, total, level)
        sentences.append(sentence)
        worked.append(equation)
    if level and rng.random() < 0.5:
        # Somebody else's things must not be counted.
        place = rng.randint(1, len(sentences))
        sentences.insert(place, f" {other} has {rng.randint(2, 50)} {thing2}s.")
    prompt = "".join(sentences) + f" How many {thing}s has {name}?\n"
    answer = " ".join(worked) + f"\n#### {total}"
    return Example(FAMILY, prompt, answer, {"steps": steps, "value": total})
