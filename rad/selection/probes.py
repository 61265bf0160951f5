"""Retrieval probes: contexts whose answer has to be looked up, with the answers that are wrong.

`dictionary` is the text of the retrieval-aware paper (its word package is replaced by our own
list), `nano` the multi-key task of the nano family, `copy` repeated blocks of random tokens and
`repeat` of the corpus' text. Rows are padded on the right, so a causal model needs no mask.

Legend: N rows, T time, M answers, A answer tokens, R rivals.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rad.selection.base import SelectionContext, SelectionError, calibration_rows
from rad.settings import RetrievalAwareSettings

PAD = -1
COPY_ANSWERS = 16  # answers asked per `copy` row
COPY_BLOCK = (8, 24)  # length of a repeated block, in tokens


class ProbeTooLong(SelectionError):
    """A probe with more tokens than the base has positions."""


@dataclass
class Probe:
    """`tokens` (N, T); answer m is the tokens at `positions[m]` (A, padded -1) of row `rows[m]`.

    `rivals` (M, A, R), padded -1: tokens by which a wrong candidate first departs from the answer,
    at the answer token where it does. A candidate counts up to and including that token, which is
    all of it where answers are one token long; otherwise its log-probability is an upper bound.
    """

    tokens: Tensor
    rows: Tensor
    positions: Tensor
    rivals: Tensor

    def part(self, first: int, last: int) -> Probe:
        """The answers of rows `first` to `last` (exclusive)."""
        mine = (self.rows >= first) & (self.rows < last)
        return Probe(
            self.tokens[first:last],
            self.rows[mine] - first,
            self.positions[mine],
            self.rivals[mine],
        )

    def to(self, device: torch.device) -> Probe:
        """The same probe on `device`."""
        return Probe(
            self.tokens.to(device),
            self.rows.to(device),
            self.positions.to(device),
            self.rivals.to(device),
        )

    def chance(self) -> float:
        """Share of answers that a choice among the candidates at random gets right."""
        wrong = (self.rivals >= 0).flatten(1).sum(1)
        return float((1 / (1 + wrong.double())).mean())

    def score(self, log_probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Margins (M,) in nats and correctness (M,) from `log_probabilities` (M, A, vocabulary).

        Entry a of an answer holds the distribution that predicts its token a. The margin is the
        log-probability of the answer minus that of the likeliest wrong candidate (positive: chosen
        among the candidates); correct means that every token of the answer is the most likely one
        of the whole vocabulary.
        """
        asked = self.positions >= 0
        targets = self.tokens[self.rows[:, None], self.positions.clamp(min=0)]
        own = log_probabilities.gather(-1, targets[..., None])[..., 0].masked_fill(~asked, 0.0)
        rest = own.flip(1).cumsum(1).flip(1)  # log-probability of the answer from token a on
        wrong = log_probabilities.gather(-1, self.rivals.clamp(min=0))
        gaps = (rest[..., None] - wrong).masked_fill(self.rivals < 0, torch.inf)
        correct = (log_probabilities.argmax(-1) == targets) | ~asked
        return gaps.flatten(1).amin(1), correct.all(1)


def dictionary(context: SelectionContext, settings: RetrievalAwareSettings) -> Probe:
    """`key:value` lines and a question for one key, in the paper's words."""
    from rad.data.nouns import NOUNS

    if settings.pairs == "auto":
        raise SelectionError("a dictionary needs a number of pairs; `auto` is chosen beforehand")
    rng = random.Random(f"dictionary/{settings.seed}")
    items = []
    for _ in range(settings.samples):
        keys = rng.sample(NOUNS, settings.pairs)
        values = rng.sample(range(100), settings.pairs)
        lines = [f"{key}:{value}" for key, value in zip(keys, values, strict=True)]
        asked = rng.randrange(settings.pairs)
        question = f"The value of the key '{keys[asked]}' is"
        prompt = "\n".join(["Memorize the following dictionary:", *lines, question])
        wrong = [f" {value}" for index, value in enumerate(values) if index != asked]
        items.append((prompt, f" {values[asked]}", wrong))
    return _from_text(context, settings, items)


def nano(context: SelectionContext, settings: RetrievalAwareSettings) -> Probe:
    """Multi-key retrieval of `ruler_nano`, from its training split: no test document is seen."""
    from rad.data.nano import generate

    examples = generate(
        "ruler_nano",
        "train",
        settings.seed,
        settings.samples,
        task="multikey",
        tokens=settings.tokens,
    )
    items = []
    for example in examples:
        values = dict.fromkeys(re.findall(r" \w+( \w+);", example.prompt))
        wrong = [value for value in values if value != example.answer]
        items.append((example.prompt, example.answer, wrong))
    return _from_text(context, settings, items)


def copy(context: SelectionContext, settings: RetrievalAwareSettings) -> Probe:
    """Rows of one block of random tokens, repeated: needs no knowledge of any language."""
    special = set(getattr(context.tokenizer, "all_special_ids", ()) or ())
    size = int(context.need_model().config.vocab_size)
    ordinary = [token for token in range(size) if token not in special]
    if len(ordinary) < COPY_BLOCK[1]:
        raise SelectionError(
            f"probe copy draws blocks of up to {COPY_BLOCK[1]} different tokens, the base has "
            f"{len(ordinary)}: use probe repeat"
        )

    def block(rng: random.Random, length: int) -> list[int]:
        return rng.sample(ordinary, length)

    return _repeated(context, settings, block)


def repeat(context: SelectionContext, settings: RetrievalAwareSettings) -> Probe:
    """Rows of one piece of the corpus, repeated: for bases that copy text but not random tokens."""
    pieces = calibration_rows(context.need_corpus(), settings.samples, settings.seed).tolist()

    def block(rng: random.Random, length: int) -> list[int]:
        piece: list[int] = pieces[rng.randrange(len(pieces))]
        first = rng.randrange(max(1, len(piece) - length))
        return piece[first : first + length]

    return _repeated(context, settings, block)


ProbeBuilder = Callable[[SelectionContext, RetrievalAwareSettings], Probe]
PROBES: dict[str, ProbeBuilder] = {
    "dictionary": dictionary,
    "nano": nano,
    "copy": copy,
    "repeat": repeat,
}


def build(context: SelectionContext, settings: RetrievalAwareSettings) -> Probe:
    """The probe that the settings name; the same for the same settings and tokenizer.

    Raises `SelectionError` when the base lacks tokens that the probe needs, `ProbeTooLong` when it
    lacks positions.
    """
    probe = PROBES[settings.probe](context, settings)
    config = context.need_model().config
    limit, longest = getattr(config, "max_position_embeddings", None), probe.tokens.shape[1]
    if limit is not None and longest > limit:
        what = f"pairs (now {settings.pairs})" if settings.probe == "dictionary" else "tokens"
        raise ProbeTooLong(
            f"probe {settings.probe} is {longest} tokens long, the base has {limit} positions: "
            f"lower {what}"
        )
    highest = int(probe.tokens.max())
    if highest >= config.vocab_size:
        raise SelectionError(
            f"probe {settings.probe} has token {highest}, the base has {config.vocab_size}: this "
            "tokenizer is not the base's"
        )
    return probe


def _repeated(
    context: SelectionContext,
    settings: RetrievalAwareSettings,
    block_of: Callable[[random.Random, int], list[int]],
) -> Probe:
    """Rows of `settings.tokens` that repeat a block; tokens after a repeat's first are asked.

    The wrong candidates are the block's other tokens.
    """
    rng = random.Random(f"{settings.probe}/{settings.seed}")
    start = getattr(context.tokenizer, "bos_token_id", None)
    prefix = [] if start is None else [int(start)]
    shortest, longest = COPY_BLOCK
    longest = min(longest, (settings.tokens - len(prefix)) // 2)
    rows: list[list[int]] = []
    found: list[tuple[int, list[int], list[list[int]]]] = []
    for row in range(settings.samples):
        block = block_of(rng, rng.randint(min(shortest, longest), longest))
        text = (prefix + block * settings.tokens)[: settings.tokens]
        # The first token of the first repeat cannot be known to repeat.
        choices = range(len(prefix) + len(block) + 1, settings.tokens)
        rows.append(text)
        for position in sorted(rng.sample(choices, min(COPY_ANSWERS, len(choices)))):
            wrong = sorted({token for token in block if token != text[position]})
            if wrong:
                found.append((row, [position], [wrong]))
    return _assemble(rows, found)


def _ending(tokenizer: Any, prompt: str, prefix: list[int], answer: str) -> list[int]:
    """The tokens of `answer` after `prompt`, whose tokens are `prefix`."""
    whole: list[int] = tokenizer(prompt + answer)["input_ids"]
    if whole[: len(prefix)] == prefix:
        return whole[len(prefix) :]
    # The tokenizer merges across the border: keep the prompt as the model will be given it.
    alone: list[int] = tokenizer(answer, add_special_tokens=False)["input_ids"]
    return alone


def _from_text(
    context: SelectionContext,
    settings: RetrievalAwareSettings,
    items: list[tuple[str, str, list[str]]],
) -> Probe:
    """A probe from (prompt, answer, wrong answers)."""
    tokenizer = context.tokenizer
    if tokenizer is None:
        raise SelectionError(f"probe {settings.probe} is text: it needs the base's tokenizer")
    unknown = getattr(tokenizer, "unk_token_id", None)
    rows: list[list[int]] = []
    found: list[tuple[int, list[int], list[list[int]]]] = []
    for prompt, answer, wrong in items:
        prefix: list[int] = tokenizer(prompt)["input_ids"]
        truth = _ending(tokenizer, prompt, prefix, answer)
        if unknown is not None and unknown in prefix + truth:
            raise SelectionError(
                f"probe {settings.probe}: the base has no tokens for {(prompt + answer)[:60]!r} "
                "...: use probe copy or repeat"
            )
        rivals: list[list[int]] = [[] for _ in truth]
        for candidate in wrong:
            tokens = _ending(tokenizer, prompt, prefix, candidate)
            for index, (mine, other) in enumerate(zip(truth, tokens, strict=False)):
                if mine != other:
                    rivals[index].append(other)
                    break
        positions = [len(prefix) + index for index in range(len(truth))]
        if any(rivals):
            found.append((len(rows), positions, rivals))
            rows.append(prefix + truth)
    if not rows:
        raise SelectionError("no probe prompt has a wrong candidate that differs from its answer")
    return _assemble(rows, found)


def _assemble(rows: list[list[int]], found: list[tuple[int, list[int], list[list[int]]]]) -> Probe:
    """Right-padded tensors of token `rows` and of `found` (row, positions, rivals per token)."""
    length = max(len(row) for row in rows)
    width = max(len(positions) for _, positions, _ in found)
    count = max(len(tokens) for _, _, rivals in found for tokens in rivals)
    # Padding follows every answer, where a causal model cannot see it: any token will do.
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row)
    positions = torch.full((len(found), width), PAD)
    rivals = torch.full((len(found), width, count), PAD)
    for index, (_, where, wrong) in enumerate(found):
        positions[index, : len(where)] = torch.tensor(where)
        for place, others in enumerate(wrong):
            rivals[index, place, : len(others)] = torch.tensor(others)
    return Probe(tokens, torch.tensor([row for row, _, _ in found]), positions, rivals)
