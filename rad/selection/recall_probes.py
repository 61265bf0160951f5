"""Prompts for the recall ablations: associative recall, with hops, tracing, common words.

The tasks are those of the KL-guided paper's layer ablations, in two
wordings, both our own: `text` for bases that read English, `nano` in the formats of `ruler_nano`.
Answers are unique strings; the wording says in which order several words are named.

Legend: B batch, T time, A answer tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rad.data.nouns import NOUNS
from rad.selection.base import SelectionError

ALIAS_SHARE, HOPS = 0.4, 2  # of AR-MH, as published
SUMMED = 3  # keys whose values AR adds up, as published


@dataclass(frozen=True)
class Question:
    """A prompt, its answer, and the accuracy of the best guess that reads no context."""

    prompt: str
    answer: str
    chance: float


@dataclass
class Answers:
    """Where the answers of a batch of tokens are: `asked` (B,T) marks their tokens."""

    tokens: Tensor
    asked: Tensor


def is_nano(tokenizer: Any) -> bool:
    """Whether a tokenizer is the nano family's."""
    from rad.data.nano.tokenizer import load

    return bool(tokenizer.get_vocab() == load().get_vocab())


def questions(
    task: str, style: str, tokenizer: Any, count: int, *, pairs: int, tokens: int, seed: int
) -> list[Question]:
    """`count` questions of `task` (ar, ar_mh, vt, cwe), the same for the same arguments.

    Raises `SelectionError` when there is no tokenizer or too few words for `pairs`.
    """
    if tokenizer is None:
        raise SelectionError(f"selector {task} needs the base's tokenizer")
    if style == "auto":
        style = "nano" if is_nano(tokenizer) else "text"
    rng = random.Random(f"recall/{task}/{style}/{seed}")
    if style == "nano":
        return [NANO[task](rng, tokens) for _ in range(count)]
    words = vocabulary_words(tokenizer) if task in ("ar", "ar_mh") else NOUNS
    if len(words) < pairs:
        raise SelectionError(
            f"{task}: {pairs} keys asked, but the tokenizer has {len(words)} words"
        )
    return [TEXT[task](rng, words, pairs) for _ in range(count)]


def vocabulary_words(tokenizer: Any) -> list[str]:
    """Tokens of at least three ASCII letters, the keys of the published AR task; sorted."""
    found = {token.lstrip("Ġ▁ ") for token in tokenizer.get_vocab()}
    return sorted(word for word in found if re.fullmatch(r"[A-Za-z]{3,}", word))


def _ar(rng: random.Random, words: Sequence[str], pairs: int) -> Question:
    keys = rng.sample(words, pairs)
    values = [rng.randrange(10) for _ in keys]
    asked = rng.sample(range(pairs), SUMMED)
    lines = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
    names = ", ".join(keys[i] for i in asked)
    end = f"The sum of the values of {names} is"
    total = sum(values[i] for i in asked)
    # 13 and 14 are the likeliest sums of three digits: 75 of 1000
    return Question("\n".join(["Read this list.", *lines, end]), f" {total}", 0.075)


def _aliased(rng: random.Random, count: int) -> tuple[list[int | None], list[int]]:
    """For each of `count` keys its parent, or None, and its depth; deeper parents are favoured."""
    aliases = max(1, round(ALIAS_SHARE * count))
    parents: list[int | None] = [None] * count
    depth = [0] * count
    for key in range(count - aliases, count):
        choices = [other for other in range(key) if depth[other] < HOPS]
        parent = rng.choices(choices, [1 + depth[other] for other in choices])[0]
        parents[key], depth[key] = parent, depth[parent] + 1
    return parents, depth


def _ar_mh(rng: random.Random, words: Sequence[str], pairs: int) -> Question:
    keys = rng.sample(words, pairs)
    parents, depth = _aliased(rng, pairs)
    values = [rng.randrange(10) for _ in keys]
    lines = [
        f"{key}: {values[i]}"
        if (parent := parents[i]) is None
        else f"{key}: same as {keys[parent]}"
        for i, key in enumerate(keys)
    ]
    rng.shuffle(lines)
    asked = rng.choice([i for i in range(pairs) if depth[i]])
    end = f"Answer with the value only. The value of {keys[asked]} is"
    root: int = asked
    while (above := parents[root]) is not None:
        root = above
    return Question("\n".join(["Read this list.", *lines, end]), f" {values[root]}", 0.1)


def _vt(rng: random.Random, words: Sequence[str], pairs: int) -> Question:
    """Two chains of two hops among as many noise lines, in any order, as published."""
    del pairs
    values = rng.sample(range(10_000, 100_000), 2)
    lines, chains = [], []
    for chain, value in enumerate(values):
        names = [f"X{chain * (HOPS + 1) + i + 1}" for i in range(HOPS + 1)]
        lines.append(f"VAR {names[0]} = {value}")
        lines += [f"VAR {b} = VAR {a}" for a, b in pairwise(names)]
        chains.append(names)
    lines += [f"The {rng.choice(words)} is near the {rng.choice(words)}." for _ in lines]
    rng.shuffle(lines)
    asked = rng.randrange(2)
    end = (
        f"The variables that hold {values[asked]}, first the one that was given it, then those "
        "that copy it in turn, are"
    )
    return Question("\n".join([*lines, end]), " " + ", ".join(chains[asked]), 0.5)


def _cwe(rng: random.Random, words: Sequence[str], pairs: int) -> Question:
    """Ten words that come twice among words that come once, as published."""
    chosen = rng.sample(words, min(len(words), 10 + 2 * pairs))
    common = chosen[:10]
    stream = common + chosen
    rng.shuffle(stream)
    ordered = sorted(common, key=stream.index)
    end = "The ten words that come twice, in the order in which they first come, are"
    return Question(f"Words: {', '.join(stream)}.\n{end}", " " + ", ".join(ordered), 0.0)


def _ruler(task: str) -> Callable[[random.Random, int], Question]:
    def build(rng: random.Random, tokens: int) -> Question:
        from rad.data.nano import ruler
        from rad.data.nano.example import split_of
        from rad.data.nano.tokenizer import token_length

        while True:
            example = ruler.build(rng, 0, length=token_length, task=task, tokens=tokens)
            if split_of(example.prompt) == "train":  # no test document is ever seen
                break
        words = re.findall(r" (\w+)", example.prompt)
        rivals = {
            # as many guesses as the format allows: values, ends of chains, or counted words
            "multikey": len(re.findall(r" \w+ \w+;", example.prompt)),
            "vt": max(2, tokens // 24),
            "cwe": len(set(words)) - 2,
        }[task]
        return Question(example.prompt, example.answer, 1 / max(1, rivals))

    return build


def _nano_hops(rng: random.Random, tokens: int) -> Question:
    """AR-MH in the format of `Trace:`: keys with a value and keys that name another key."""
    from rad.data.nano.tokenizer import token_length
    from rad.data.nano.words import ADJECTIVES
    from rad.data.nano.words import NOUNS as NAMES

    each = token_length(f" {NAMES[0]} {ADJECTIVES[0]};")
    count = min(max(4, (tokens - 16) // each), len(NAMES), len(ADJECTIVES))
    names = rng.sample(NAMES, count)
    parents, depth = _aliased(rng, count)
    values = rng.sample(ADJECTIVES, count)
    said: list[str] = []
    for i, name in enumerate(names):
        parent = parents[i]
        said.append(f" {name} {values[i] if parent is None else names[parent]};")
    asked = rng.choice([i for i in range(count) if depth[i]])
    way: list[str] = []
    step: int = asked
    while (above := parents[step]) is not None:
        way.append(names[above])
        step = above
    answer = "".join(f" {word}" for word in [*way, values[step]])
    return Question(f"Trace:{''.join(said)} ask {names[asked]}", answer, 1 / count)


TEXT: dict[str, Callable[[random.Random, Sequence[str], int], Question]] = {
    "ar": _ar,
    "ar_mh": _ar_mh,
    "vt": _vt,
    "cwe": _cwe,
}
NANO: dict[str, Callable[[random.Random, int], Question]] = {
    "ar": _ruler("multikey"),
    "ar_mh": _nano_hops,
    "vt": _ruler("vt"),
    "cwe": _ruler("cwe"),
}


def batches(
    tokenizer: Any, asked: Sequence[Question], batch_size: int, longest: int | None = None
) -> list[tuple[Tensor, Answers]]:
    """Right-padded tokens (B,T) of prompt and answer, with the answers' places.

    Raises `SelectionError` when a prompt is longer than `longest` tokens.
    """
    rows: list[tuple[list[int], int]] = []
    for question in asked:
        prompt: list[int] = tokenizer(question.prompt)["input_ids"]
        whole: list[int] = tokenizer(question.prompt + question.answer)["input_ids"]
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            # the tokenizer merges across the border: keep the prompt as the model will get it
            whole = prompt + tokenizer(question.answer, add_special_tokens=False)["input_ids"]
        if longest is not None and len(whole) > longest:
            raise SelectionError(
                f"a recall prompt has {len(whole)} tokens, the base takes {longest}; lower `pairs` "
                "or `tokens`"
            )
        rows.append((whole, len(prompt)))
    found = []
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        shape = (len(part), max(len(row) for row, _ in part))
        # padding follows the answer, where a causal model cannot see it: any token will do
        tokens, marks = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        for index, (row, start) in enumerate(part):
            tokens[index, : len(row)] = torch.tensor(row)
            marks[index, start : len(row)] = True
        found.append((tokens, Answers(tokens, marks)))
    return found
