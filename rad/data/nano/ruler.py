"""ruler_nano: finding, tracing and counting in a context of a given number of tokens.

Four tasks: `single` (one pair in running text), `multikey` (many pairs, one asked), `vt`
(variables that point at variables) and `cwe` (the most common word).
"""

from __future__ import annotations

import random
from collections.abc import Callable

from rad.data.nano import text
from rad.data.nano.example import Example
from rad.data.nano.words import ADJECTIVES, NOUNS

FAMILY = "ruler_nano"
TASKS: tuple[str, ...] = ("single", "multikey", "vt", "cwe")
Length = Callable[[str], int]
Turn = tuple[str, str]


def _fill(
    rng: random.Random, pieces: list[str], nouns: list[str], room: int, length: Length
) -> list[str]:
    """`pieces` in their order with filler sentences put between them until `room` is used up."""
    used = sum(length(piece) for piece in pieces)
    fillers: list[str] = []
    misses = 0
    while misses < 12:
        candidate = text.sentence(rng, nouns)
        cost = length(candidate)
        if used + cost > room:
            misses += 1
            continue
        fillers.append(candidate)
        used += cost
    slots = sorted(rng.randint(0, len(pieces)) for _ in fillers)
    mixed: list[str] = []
    for index in range(len(pieces) + 1):
        mixed += [f for f, slot in zip(fillers, slots, strict=True) if slot == index]
        mixed += pieces[index : index + 1]
    return mixed


def _pairs(rng: random.Random, count: int) -> list[Turn]:
    keys = rng.sample(NOUNS, count)
    return [(key, rng.choice(ADJECTIVES)) for key in keys]


def _lookup(rng: random.Random, task: str, hard: bool, tokens: int) -> tuple[list[str], list[Turn]]:
    """Statements ` key value;` and the questions they answer, for `single` and `multikey`."""
    if task == "single":
        count = 2 if hard else 1
    else:
        count = min(len(NOUNS) - 4, tokens // 5 if hard else tokens // 8)
    pairs = _pairs(rng, max(count, 2 if task == "multikey" else 1))
    statements = [f" {key} {value};" for key, value in pairs]
    return statements, [(f" ask {key}", f" {value}") for key, value in pairs]


def _path(chain: int, names: list[str], links: int, values: list[str]) -> str:
    """What follows from the last variable of a chain down to the value."""
    way = names[chain * links : (chain + 1) * links - 1][::-1]
    return "".join(f" {word}" for word in [*way, values[chain]])


def _trace(rng: random.Random, level: int, tokens: int, trace: str) -> tuple[list[str], list[Turn]]:
    """Chains ` a red; b a; c b;`, interleaved, and what is asked of them.

    `path`: the last variable of each chain, answered by the way to its value (` b a red`);
    `end`: the value alone; `every`: the value alone, of every variable.
    """
    links = rng.randint(*((2, 2), (3, 4), (5, 6))[level]) if level else 2
    chains = max(2, tokens // (24, 32, 42)[level])
    chains = min(chains, (len(NOUNS) - 4) // links)
    names = rng.sample(NOUNS, chains * links)
    values = rng.sample(ADJECTIVES, chains)
    chain_of = {name: i // links for i, name in enumerate(names)}
    waiting = [names[i * links : (i + 1) * links] for i in range(chains)]
    before = list(values)
    order = [i for i in range(chains) for _ in range(links)]
    rng.shuffle(order)
    statements: list[str] = []
    for chain in order:
        name = waiting[chain].pop(0)
        statements.append(f" {name} {before[chain]};")
        before[chain] = name
    ends = [(f" ask {before[i]}", f" {values[i]}") for i in range(chains)]
    if trace == "path":
        return statements, [
            (question, _path(i, names, links, values)) for i, (question, _) in enumerate(ends)
        ]
    if trace == "every":
        return statements, [(f" ask {name}", f" {values[i]}") for name, i in chain_of.items()]
    return statements, ends


def _common(rng: random.Random, hard: bool, size: int) -> tuple[list[str], str]:
    """`size` words, one of which leads every other by at least three (hard: by one), and it."""
    margin = 1 if hard else 3
    winner, *rest = rng.sample(NOUNS, max(3, min(24, size // 3)))
    top = -(-(size + len(rest) * margin) // (len(rest) + 1))
    words = [winner] * top
    counts = dict.fromkeys(rest, 0)
    while len(words) < size:
        word = rng.choice([w for w, seen in counts.items() if seen < top - margin])
        counts[word] += 1
        words.append(word)
    rng.shuffle(words)
    return words, winner


def build(
    rng: random.Random,
    level: int,
    *,
    length: Length,
    task: str = "multikey",
    tokens: int = 128,
    turns: int = 1,
    trace: str = "path",
) -> Example:
    """At most `tokens` tokens, `<s>` and `</s>` counted, asking up to `turns` questions."""
    if task not in TASKS:
        raise ValueError(f"unknown ruler_nano task {task!r}; known: {', '.join(TASKS)}")
    if tokens < 32:
        raise ValueError(f"ruler_nano needs at least 32 tokens, not {tokens}")
    meta: dict[str, object] = {"task": task, "tokens": tokens}
    if task == "cwe":
        # Every noun has the same length in tokens.
        each = length(" " + NOUNS[0])
        room = tokens - 2 - length("Count:") - length(" ask most") - each
        words, winner = _common(rng, level > 0, room // each)
        prompt = "Count:" + "".join(f" {word}" for word in words) + " ask most"
        return Example(FAMILY, prompt, f" {winner}", meta)
    header = "Trace:" if task == "vt" else "Look:"
    if task == "vt":
        statements, asked = _trace(rng, level, tokens, trace)
    else:
        statements, asked = _lookup(rng, task, level > 0, tokens)
    rng.shuffle(asked)
    used = 1 + length(header) + sum(length(s) for s in statements)
    kept: list[Turn] = []
    for question, answer in asked[:turns]:
        cost = length(question) + length(answer) + 1  # and its </s>
        if kept and used + cost > tokens:
            break
        used += cost
        kept.append((question, answer))
    mentioned = {word.strip(" ;") for s in statements for word in s.split()}
    free = [noun for noun in NOUNS if noun not in mentioned]
    room = tokens - used + sum(length(s) for s in statements)
    body = _fill(rng, statements, free, room, length)
    question, answer = kept[0]
    if turns > 1:
        meta["turns"] = [list(turn) for turn in kept[1:]]
    return Example(FAMILY, header + "".join(body) + question, answer, meta)
