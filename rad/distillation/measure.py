"""Held-out figures along the curve: KL to base and teacher, cross entropy, task probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rad.data.corpus import Corpus
from rad.distillation.batches import slice_of
from rad.distillation.losses import ce_loss, kl_loss

Probe = Callable[[Any], dict[str, float]]


class HeldOut:
    """A fixed held-out slice with the base's (and teacher's) logits computed once.

    Legend: R rows, T context, V vocabulary; keeps R*T*V logits per model in memory.
    """

    def __init__(
        self,
        corpus: Corpus,
        base: Any,
        teacher: Any | None = None,
        *,
        rows: int = 64,
        batch_size: int = 32,
        probe: Probe | None = None,
    ) -> None:
        self.tokens, self.weight = slice_of(
            corpus.rows("held_out"), corpus.weights("held_out"), slice(0, rows)
        )
        self.batch_size, self.probe = batch_size, probe
        self.base = self._logits(base)
        self.teacher = None if teacher is None or teacher is base else self._logits(teacher)

    @torch.no_grad()
    def _logits(self, model: Any) -> Tensor:
        return torch.cat(
            [model(part, use_cache=False).logits for part in self.tokens.split(self.batch_size)]
        )

    @torch.no_grad()
    def __call__(self, student: Any) -> dict[str, Any]:
        """`held_out_kl`, `held_out_teacher_kl`, `held_out_ce` (nats per token) and `probe`."""
        logits = self._logits(student)
        record: dict[str, Any] = {
            "held_out_kl": kl_loss(self.base, logits, self.weight).item(),
            "held_out_ce": ce_loss(logits, self.tokens, self.weight).item(),
        }
        target = self.base if self.teacher is None else self.teacher
        record["held_out_teacher_kl"] = kl_loss(target, logits, self.weight).item()
        record["probe"] = self.probe(student) if self.probe else {}
        return record
