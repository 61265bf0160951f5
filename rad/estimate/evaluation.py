"""What scoring a model costs: prompts once, answers token by token, in the batches of the harness.

Answers are counted to their limit. A decoded token is taken to need its FLOPs or the reading of
weights, caches and states, whichever is longer: with few rows it is the reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rad.estimate import flops
from rad.estimate.activations import WIDE, Precision, kept
from rad.estimate.documents import CONTEXT, Documents, documents
from rad.estimate.jobs import Hardware, Job, halves
from rad.estimate.memory import Memory
from rad.estimate.shapes import BYTES, Model

TOKENS = tuple(2**power for power in range(18, 11, -1))  # tried as `batch_tokens`


@dataclass(frozen=True)
class Batches:
    """How requests are put together, and the dtype of what is scored."""

    rows: int
    tokens: int | None
    dtype: str

    def of(self, one: Documents) -> int:
        """Rows of a batch of the longest requests."""
        fit = self.rows
        if self.tokens is not None:
            fit = min(fit, self.tokens // (one.longest + one.answer))
        return max(1, fit)


def scored(settings: Any, hardware: Hardware, name: str, model: Model, dtype: str) -> Job:
    """The job that evaluates a model on all tasks; `dtype` of its weights as they are stored."""
    job = Job("evaluate", name, users=[name])
    limit = model.shape.max_positions
    limit = min(settings.max_length or limit or CONTEXT, limit or settings.max_length or CONTEXT)
    found = [
        each
        for key, task in settings.tasks.items()
        for each in documents(task, settings.wanted(key), limit)
    ]
    start = Batches(settings.batch_size, settings.batch_tokens, settings.dtype or dtype)
    for each in found:
        _work(job, each, model, start, hardware)
    job.memory = _worst(model, found, start)
    job.fits = job.memory.total <= hardware.gpu.memory
    if not job.fits:
        for choice, said in _choices(start):
            if _worst(model, found, choice).total <= hardware.gpu.memory:
                job.remedy = said
                break
    return job


def _work(job: Job, each: Documents, model: Model, batches: Batches, hardware: Hardware) -> None:
    """Add what a task's documents take."""
    count = each.count * each.requests
    narrow = batches.dtype != "float32"
    prompts = count * flops.forward(model, each.mean, head=False)
    # of scored positions; a generation wants the next token's alone
    head = 2.0 * model.shape.vocabulary * model.shape.hidden
    prompts += count * min(each.logits, each.mean) * head
    middle = each.mean + each.answer // 2
    answers = count * each.answer * flops.decode(model, middle) if each.answer else 0.0
    job.tokens += count * (each.mean + each.answer)
    job.flops += prompts + answers
    job.gpu_hours += hardware.hours(prompts, narrow)
    if each.answer:
        rows = batches.of(each)
        read = model.weight_bytes(batches.dtype) + rows * _cached(model, middle, batches.dtype)
        steps = math.ceil(count / rows) * each.answer
        job.gpu_hours += max(hardware.hours(answers, narrow), hardware.reading(steps * read))


def _cached(model: Model, tokens: int, dtype: str) -> float:
    """Bytes of keys, values and states of a row."""
    width = BYTES[dtype]
    per_token = sum(2 * layer.kv_heads * model.shape.head_dim * width for layer in model.layers)
    return tokens * per_token + sum(layer.state_bytes(width) for layer in model.layers)


def _worst(model: Model, found: list[Documents], batches: Batches) -> Memory:
    """The batch that needs most, of all tasks."""
    weights = float(model.weight_bytes(batches.dtype))
    most = max((_batch(model, each, batches) for each in found), key=lambda parts: sum(parts))
    return Memory(weights, 0.0, 0.0, most[0], most[1], 0.0, "prefill")


def _batch(model: Model, each: Documents, batches: Batches) -> tuple[float, float]:
    """(activations with caches, logits) of the batch of a task's longest requests."""
    rows, s, width = batches.of(each), model.shape, BYTES[batches.dtype]
    tokens = rows * each.longest
    active = tokens * (3 * width * s.hidden + max(3 * width * s.mlp, _mixing(model, each, batches)))
    if each.answer:
        active += rows * _cached(model, each.longest + each.answer, batches.dtype)
        if rows > 1:  # padded rows have a mask of their own, and its copy in the scores' dtype
            active += rows * each.longest**2 * (1 + width)
    # of the batch, and of one row in float32 twice
    logits = each.logits * s.vocabulary * (rows * width + (WIDE + (width < WIDE) * WIDE))
    return active, float(logits)


def _mixing(model: Model, each: Documents, batches: Batches) -> float:
    """Bytes per token of a mixer's forward pass: at most what training would keep of it."""
    precision, seen, most = Precision(batches.dtype), set(), 0.0
    for layer in model.layers:
        if id(layer) not in seen:
            seen.add(id(layer))
            one, _ = kept(layer, precision, each.longest, lambda name: False, True)
            most = max(most, one.mixing)
    return most


def _choices(start: Batches) -> Iterator[tuple[Batches, str]]:
    """One change, then both: (what it comes to, the settings in words)."""
    fewer = [n for n in TOKENS if start.tokens is None or n < start.tokens]
    narrow = start.dtype == "float32"
    said = "evaluation.dtype: bfloat16"
    for tokens in fewer:
        yield replace(start, tokens=tokens), f"evaluation.batch_tokens: {tokens}"
    if narrow:
        yield replace(start, dtype="bfloat16"), said
        for tokens in fewer:
            both = replace(start, tokens=tokens, dtype="bfloat16")
            yield both, f"evaluation.batch_tokens: {tokens} and {said}"
    for rows in halves(start.rows):
        yield replace(start, rows=rows), f"evaluation.batch_size: {rows}"
