"""What selection methods cost: tokens and FLOPs of a job, by method. Legend: L layers, H heads.

Each figure follows the method's own loop (`rad.selection`); where a number is only known once the
job runs (accepted drafts, prompts that fit a base, early stops) the most it can be is taken. A
change of one layer runs the layers above it: half of the model on average.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rad.estimate import flops
from rad.estimate.shapes import Model

PAIR_TOKENS = 12  # tokens of a `key: value` pair of a text prompt
AUTO_PAIRS = 50  # pairs when the method tunes them itself


@dataclass(frozen=True)
class Work:
    """Tokens through any model, those trained on among them, FLOPs.

    `students` alive at once; `variants` of a batch in one pass; `full_logits`: of every position,
    `chunked`: only so many at once; `gates` of every layer are learned; `time`: tokens of a row, 0:
    the corpus's.
    """

    tokens: float = 0.0
    trained: float = 0.0
    flops: float = 0.0
    students: int = 0
    variants: int = 1
    full_logits: bool = False
    chunked: bool = False
    gates: bool = False
    time: int = 0


@dataclass(frozen=True)
class Case:
    """A selection job: settings, base, its all-linear student (None: no mixer), row length, K."""

    settings: Any
    base: Model
    linear: Model | None
    time: int
    kept: int

    @property
    def layers(self) -> int:
        """L."""
        return self.base.shape.layers

    def forward(self, tokens: float, time: int | None = None) -> float:
        """FLOPs of passes of the base over `tokens` tokens in rows of `time`."""
        time = time or self.time
        return tokens * flops.forward(self.base, time) / time

    def passes(self, tokens: float, count: float, time: int | None = None) -> Work:
        """`count` whole passes over `tokens` tokens."""
        work = self.forward(tokens * count, time)
        return Work(tokens * count, 0.0, work, time=time or self.time)


def _nothing(case: Case) -> Work:
    return Work()


def _sweep(case: Case, tokens: float, time: int | None = None) -> Work:
    """One intact pass, and one with every layer changed in turn."""
    return case.passes(tokens, 1 + (case.layers + 1) / 2, time)


def _rad(case: Case) -> Work:
    s = case.settings
    length = s.prompt_tokens + s.new_tokens
    text = s.prompts * length
    if s.objective == "matchness":
        return case.passes(text, s.evaluations, length)
    # drafts of `max_draft` tokens from every position, or decoded one after the other
    return case.passes(s.prompts * s.new_tokens, s.evaluations * s.max_draft, length)


def _kl_guided(case: Case) -> Work:
    s = case.settings
    held = s.held_out_rows * case.time
    swap = replace(case.passes(held, 3 + (case.layers + 1) / 2), full_logits=True, chunked=True)
    if s.variant == "swap":
        return swap
    if s.variant.endswith("_s1"):
        return case.passes(held, 2)
    rounds = case.kept if s.greedy == "sequential" else 1
    if s.greedy == "sequential" and s.variant.startswith("gr"):
        rounds = case.layers - case.kept
    moves = 2 if s.variant.startswith("avg") else 1
    candidates = moves * sum(case.layers - done for done in range(rounds))
    student = case.linear or case.base
    names = set(student.parameters)
    head = flops.chunked_loss(
        student, case.time, teacher_hidden=None, rows=student.shape.vocabulary, head_trained=True
    )
    step = flops.training(student, case.time, names).total + head.total
    trained = float(candidates * s.tokens)
    seen = rounds * s.tokens
    base = case.forward(seen)
    return Work(
        trained + seen + swap.tokens,
        trained,
        trained * step / case.time + base + swap.flops,
        students=moves * case.layers,
        full_logits=True,
    )


def _retrieval(case: Case) -> Work:
    s = case.settings
    if s.control == "random":
        return Work()
    pairs = AUTO_PAIRS if s.pairs == "auto" else int(s.pairs)
    time = s.tokens if s.probe in ("nano", "copy", "repeat") else pairs * PAIR_TOKENS
    rows = s.samples * s.seeds
    share = 1.0 if s.prefilter is None else s.prefilter
    heads = case.layers * case.base.shape.heads * share
    filtering = 0.0 if s.prefilter is None else 3 * 3
    work = case.passes(rows * time, 2 + filtering + heads / 2, time)
    # on a GPU a whole layer's heads are ablated in one pass
    return replace(work, variants=s.head_batch or case.base.shape.heads)


def _text(case: Case) -> Work:
    return replace(_sweep(case, case.settings.rows * case.time), full_logits=True)


def _recall(case: Case) -> Work:
    s = case.settings
    time = s.pairs * PAIR_TOKENS
    if s.scoring == "generated":
        return case.passes(s.samples * (time + s.max_new_tokens), 1 + case.layers, time)
    return _sweep(case, s.samples * time, time)


def _halo(case: Case) -> Work:
    s = case.settings
    prompts = _sweep(case, s.samples * s.pairs * PAIR_TOKENS * len(s.recall))
    text = _text(case)
    tokens, work = prompts.tokens + text.tokens, prompts.flops + text.flops
    return Work(tokens, 0.0, work, full_logits=True)


def _leave_one_out(case: Case) -> Work:
    s = case.settings
    ranking = _text(case)
    if s.mode == "one_shot":
        return ranking
    left = case.layers - case.kept
    rounds = -(-round(left * (1 - s.first_share)) // s.per_round)
    step = s.batch_size * case.time
    trained = step * rounds * (s.steps * (case.layers + case.kept) / 2 + s.distil_steps)
    return Work(
        ranking.tokens + 2 * trained,
        trained,
        ranking.flops + 4 * case.forward(trained),
        1,
        full_logits=True,
    )


def _flash_morph(case: Case) -> Work:
    tokens = case.settings.tokens
    # attention and linear branch side by side: two forward passes and gradients of activations
    time = case.settings.prompt_tokens
    return Work(2.0 * tokens, tokens, 4 * case.forward(tokens, time), gates=True, time=time)


METHODS: dict[str, Callable[[Case], Work]] = {
    "uniform": _nothing,
    "random": _nothing,
    "preset": _nothing,
    "rad": _rad,
    "kl_guided": _kl_guided,
    "retrieval_aware": _retrieval,
    "smart": _text,
    "halo": _halo,
    "ar": _recall,
    "ar_mh": _recall,
    "vt": _recall,
    "cwe": _recall,
    "lm_ppl": _text,
    "activation_mse": _text,
    "leave_one_out": _leave_one_out,
    "flash_morph": _flash_morph,
}
