"""Accuracy along a distillation curve: is the whole answer the argmax under teacher forcing?

One forward pass per batch and no generation, so it can be taken at every logged point. For a
document whose answer ends the text this is exactly greedy exact match of the full answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Answers = dict[str, list[bool]]
Probe = Callable[[Any], Answers]


@dataclass(frozen=True)
class ProbeItem:
    """A document of `probe.jsonl`; `end` says that end of text belongs to the answer."""

    task: str
    prompt: str
    target: str
    end: bool


def build_probe(tasks: Path, samples: int) -> list[ProbeItem]:
    """The first `samples` probe documents of every task below `tasks`; no test document is one.

    Raises `ValueError` naming the file when the tasks were not built.
    """
    path = tasks / "probe.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise ValueError(f"{path}: cannot read ({error.strerror})") from error
    items: list[ProbeItem] = []
    taken: dict[str, int] = {}
    for line in filter(None, lines):
        item = ProbeItem(**json.loads(line))
        taken[item.task] = taken.get(item.task, 0) + 1
        if taken[item.task] <= samples:
            items.append(item)
    return items


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a prompt with the specials that the tokenizer adds, and never two `<s>`."""
    tokens: list[int] = tokenizer.encode(text)
    start = tokenizer.bos_token_id
    while start is not None and tokens[:2] == [start, start]:
        tokens = tokens[1:]  # the text (a chat template) brought its own
    return tokens


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str
) -> tuple[list[int], list[int]]:
    """Tokens of a prompt and of what follows it, cut where generation would start.

    Tokenised together when that leaves the prompt's tokens as they are, else apart.
    """
    before = encode(tokenizer, prompt)
    both = encode(tokenizer, prompt + target)
    if both[: len(before)] == before:
        return before, both[len(before) :]
    return before, tokenizer.encode(target, add_special_tokens=False)


def _rows(
    tokenizer: PreTrainedTokenizerBase, items: Sequence[ProbeItem]
) -> list[tuple[int, list[int], int]]:
    """(index, tokens, answer tokens) of every item, longest first."""
    rows = []
    for index, item in enumerate(items):
        before, after = encode_pair(tokenizer, item.prompt, item.target)
        if item.end and tokenizer.eos_token_id is not None:
            after = [*after, tokenizer.eos_token_id]
        rows.append((index, before + after, len(after)))
    return sorted(rows, key=lambda row: (-len(row[1]), row[0]))


def _correct(
    model: PreTrainedModel, rows: Sequence[tuple[int, list[int], int]], batch_size: int
) -> dict[int, bool]:
    """Item index -> whether every answer token is the argmax."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    correct: dict[int, bool] = {}
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        # Padded on the right: a causal model does not see it, so no mask is needed.
        tokens = pad_sequence([torch.tensor(row[:-1]) for _, row, _ in batch], batch_first=True)
        best = model(tokens.to(model.device), use_cache=False).logits.argmax(-1).cpu()
        for (index, row, count), guesses in zip(batch, best, strict=True):
            end = len(row) - 1
            goal = torch.tensor(row[end + 1 - count :])
            correct[index] = bool((guesses[end - count : end] == goal).all())
    return correct


def shares(answers: Answers) -> dict[str, float]:
    """Task -> share of right answers."""
    return {task: sum(marks) / len(marks) for task, marks in answers.items()}


def _answers(
    model: PreTrainedModel,
    items: Sequence[ProbeItem],
    rows: Sequence[tuple[int, list[int], int]],
    batch_size: int,
) -> Answers:
    """Task -> whether each item is right, in order; the model's training mode is restored."""
    import torch

    was_training = model.training
    model.eval()
    try:
        # no_grad and not inference_mode: rotary tables cached here are used by training later
        with torch.no_grad():
            correct = _correct(model, rows, batch_size)
    finally:
        model.train(was_training)
    answers: Answers = {}
    for index, item in enumerate(items):
        answers.setdefault(item.task, []).append(correct[index])
    return answers


def probe_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[ProbeItem],
    batch_size: int = 64,
) -> dict[str, float]:
    """Task -> share of its items whose whole answer is the argmax."""
    return shares(_answers(model, items, _rows(tokenizer, items), batch_size))


def probe_of(
    tasks: Path, samples: int, batch_size: int = 64
) -> Callable[[PreTrainedTokenizerBase], Probe]:
    """tokenizer -> (model -> answers per task), with the documents read and tokenised once."""
    items = build_probe(tasks, samples)

    def prepare(tokenizer: PreTrainedTokenizerBase) -> Probe:
        rows = _rows(tokenizer, items)
        return lambda model: _answers(model, items, rows, batch_size)

    return prepare
