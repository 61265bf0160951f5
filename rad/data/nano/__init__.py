"""Seeded generators of the four nano families, their tokenizer and their training mixture."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from rad.data.nano import crux, gsm, ruler, text
from rad.data.nano.example import SPLITS, Example, split_of

FAMILIES: tuple[str, ...] = ("gsm_nano", "crux_nano", "ruler_nano", "text_nano")

__all__ = ["FAMILIES", "SPLITS", "Example", "generate", "split_of", "training_documents"]


def _build(family: str, rng: random.Random, level: int, options: dict[str, Any]) -> Example:
    if family == ruler.FAMILY:
        from rad.data.nano.tokenizer import token_length

        return ruler.build(rng, level, length=token_length, **options)
    builder = {gsm.FAMILY: gsm.build, crux.FAMILY: crux.build, text.FAMILY: text.build}[family]
    if options:
        raise ValueError(f"{family} takes no options, got {', '.join(sorted(options))}")
    return builder(rng, level)


def generate(family: str, split: str, seed: int, count: int, **options: Any) -> list[Example]:
    """`count` examples of one family and split; the same arguments give the same examples.

    `train` mixes the levels of difficulty as the training mixture does; `test` is the lowest,
    `hard` the highest. Prompts of different splits never meet, and within test and
    hard no prompt comes twice. `ruler_nano` takes `task` and `tokens`.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown nano family {family!r}; known: {', '.join(FAMILIES)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    from rad.data.nano.mixture import HARD_SHARE, TOP_SHARE

    rng = random.Random(f"nano/{family}/{split}/{seed}/{sorted(options.items())}")
    found: list[Example] = []
    seen: set[str] = set()
    for _ in range(2000 + 400 * count):
        if len(found) == count:
            return found
        level = 2 if split == "hard" else 0
        if split == "train" and rng.random() < HARD_SHARE:
            level = 2 if rng.random() < TOP_SHARE else 1
        example = _build(family, rng, level, options)
        if split_of(example.prompt) != split or (split != "train" and example.prompt in seen):
            continue
        seen.add(example.prompt)
        found.append(example)
    if len(found) == count:
        return found
    raise ValueError(f"{family} {split} has too few different prompts for {count}")


def training_documents(seed: int) -> Iterator[Example]:
    """The endless training mixture of all families."""
    from rad.data.nano.mixture import training_documents as documents

    return documents(seed)
