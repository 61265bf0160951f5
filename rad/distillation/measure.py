"""Held-out figures along the curve: KL and agreement with base and teacher, cross entropy, probes.

Legend: R rows, B rows of a part, T context, n tokens of a chunk, E hidden size, V vocabulary.
Everything runs in the weights' own dtype, also where training has autocast: rounding would be of
the size of the divergences of a good student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rad.data.corpus import Corpus
from rad.distillation import losses, parallel
from rad.distillation.batches import held_out
from rad.distillation.chunked import chunk_tokens
from rad.distillation.targets import LogitHead, Targets, head_of, rows_hidden
from rad.distillation.teachers import LiveTeacher

MOST_TOKENS = 1024  # of a chunk: its logits stay in the cache of a CPU
FORWARD_TOKENS = 2**15  # of a forward pass: long rows are measured in smaller parts
Probe = Callable[[Any], dict[str, list[bool]]]  # task -> whether each document is right


class HeldOut:
    """A fixed held-out slice with the base's (and teacher's) final hidden states computed once.

    Keeps R*T*E values per model; logits are formed a few tokens at a time. `teacher` is a model or
    a `Teacher` (None or the base itself: none of its own), `vocabulary` the rows of the heads that
    count, `device` where figures are formed (default: the base's). Where several processes share
    the job, base and teacher are asked when the first figures are wanted: they are in pieces then,
    and no process ever needs the room for a whole one.
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
        vocabulary: int | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.batch = held_out(corpus, rows).to(torch.device(device or base.device))
        self.tokens, self.weight = self.batch.tokens, self.batch.weight
        most = max(1, min(batch_size, FORWARD_TOKENS // self.tokens.shape[1]))
        self.parts = list(self.batch.split(max(1, -(-len(self.tokens) // most))))
        self.probe, self.vocabulary = probe, vocabulary
        self._asked: tuple[Any, Any] | None = (base, None if teacher is base else teacher)
        self.base: list[Targets] = []
        self.teacher: list[Targets] | None = None
        if not parallel.active():
            self._ask()

    def _ask(self) -> None:
        """Hidden states of base and teacher, once."""
        if self._asked is not None:
            base, teacher = self._asked
            self.base = self._targets(base)
            self.teacher = None if teacher is None else self._targets(teacher)
            self._asked = None

    @torch.no_grad()
    def _targets(self, teacher: Any) -> list[Targets]:
        if parallel.active() and isinstance(teacher, nn.Module):
            found = parallel.inside(teacher, lambda: self._of_pieces(teacher))
            parallel.release(teacher)
            return found
        asked = LiveTeacher(teacher) if isinstance(teacher, nn.Module) else teacher
        return [
            asked.targets(part.tokens, part.rows, split="held_out", boundaries=part.boundaries)
            for part in self.parts
        ]

    def _of_pieces(self, teacher: nn.Module) -> list[Targets]:
        """Targets of a model in pieces, while its own weights are whole: the head is kept."""
        head = head_of(teacher).detach()
        bias = None if head.bias is None else head.bias.clone()
        head = replace(head, weight=head.weight.clone(), bias=bias)
        hidden = [rows_hidden(teacher, part.tokens, part.boundaries) for part in self.parts]
        return [Targets("hidden", hidden=each, head=head) for each in hidden]

    @torch.no_grad()
    def __call__(self, student: Any) -> dict[str, Any]:
        """`held_out_kl`, `held_out_teacher_kl`, `held_out_ce` (nats per token),
        `held_out_agreement` (share of tokens with the base's most likely one), `probe` and
        `probe_documents`.
        """
        self._ask()
        head = head_of(student)
        sums = dict.fromkeys(("kl", "agreement", "teacher_kl", "ce"), 0.0)
        for index, part in enumerate(self.parts):
            hidden = rows_hidden(student, part.tokens, part.boundaries)
            for name, value in self._figures(hidden, head, index).items():
                sums[name] += value
        count = self.weight[:, 1:].double().sum().clamp_min(1e-8).item()
        record: dict[str, Any] = {f"held_out_{name}": total / count for name, total in sums.items()}
        answers = self.probe(student) if self.probe else {}
        record["probe"] = {task: sum(marks) / len(marks) for task, marks in answers.items()}
        # which documents, as digits: the report resamples them
        record["probe_documents"] = {
            task: "".join(str(int(mark)) for mark in marks) for task, marks in answers.items()
        }
        return record

    def _figures(self, hidden: Tensor, head: LogitHead, index: int) -> dict[str, float]:
        """Weighted sums over one part's tokens: every model's logits are formed once per chunk."""
        part, base = self.parts[index], self.base[index]
        teacher = self.teacher[index] if self.teacher is not None else None
        # sums in double precision: shares of many tokens stay between 0 and 1
        weight = part.weight[:, 1:].flatten().double()
        ids = part.tokens[:, 1:].flatten()
        rows = head.vocabulary if self.vocabulary is None else self.vocabulary
        sums = dict.fromkeys(("kl", "agreement", "teacher_kl", "ce"), 0.0)
        if teacher is not None and teacher.kind != "hidden":
            values = losses.distillation_values(hidden, head, teacher, vocabulary=rows)
            sums["teacher_kl"] = (values.flatten() * weight).sum().item()
        size = min(MOST_TOKENS, chunk_tokens(rows, hidden.device))
        for start in range(0, len(weight), size):
            at = slice(start, start + size)
            mine = _log_probabilities(hidden, head, at, rows)
            theirs = _of(base, at, rows)
            kl = _kl(theirs, mine)
            sums["kl"] += (kl * weight[at]).sum().item()
            same = theirs.argmax(-1) == mine.argmax(-1)
            sums["agreement"] += (same * weight[at]).sum().item()
            label = mine.gather(-1, ids[at].unsqueeze(-1)).squeeze(-1)
            sums["ce"] -= (label * weight[at]).sum().item()
            if teacher is None:
                sums["teacher_kl"] += (kl * weight[at]).sum().item()
            elif teacher.kind == "hidden":
                kl = _kl(_of(teacher, at, rows), mine)
                sums["teacher_kl"] += (kl * weight[at]).sum().item()
        return sums


def _log_probabilities(hidden: Tensor, head: LogitHead, at: slice, rows: int) -> Tensor:
    """hidden (B,T,E) -> (n,V) of the tokens `at` among those that predict one."""
    logits = head.logits(hidden[:, :-1].flatten(0, 1)[at], rows)
    return torch.log_softmax(logits.float(), dim=-1)


def _of(targets: Targets, at: slice, rows: int) -> Tensor:
    assert targets.hidden is not None and targets.head is not None
    return _log_probabilities(targets.hidden, targets.head, at, rows)


def _kl(theirs: Tensor, mine: Tensor) -> Tensor:
    """Log-probabilities (n,V) twice -> KL(theirs || mine) (n,)."""
    return (theirs.exp() * (theirs - mine)).sum(-1)
