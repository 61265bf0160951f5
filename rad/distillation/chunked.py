"""Losses on logits that are formed a few tokens at a time and never kept.

    for each chunk of tokens:   logits = head(hidden)        (n,V), freed before the next chunk
                                values, d loss / d logits    one of the comparisons below
                                d hidden, d head             accumulated, in the forward pass

The backward pass only scales what the forward pass has accumulated, so the memory for a loss is a
few chunks of logits instead of several times all of them (performance notes, E9). Logits and
everything after them are in float32 (float64 stays); matrix products are in the dtype of the hidden
states, or autocast's. Legend: N tokens, n tokens of a chunk, E hidden size, V vocabulary, K stored
entries of a token, C classes compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rad.distillation.targets import LogitHead

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "ce_teacher"]
Compared = tuple[Tensor, Tensor]
# (scaled student logits (n,V), chunk) -> values (n,), gradient (n,V); the logits may be overwritten
Comparison = Callable[[Tensor, slice], Compared]
# Elements of a chunk's logits. CPU: large enough for the matrix product to read the head seldom.
CPU_ELEMENTS, GPU_ELEMENTS = 2**22, 2**27


def chunk_tokens(rows: int, device: torch.device) -> int:
    """Tokens per chunk for a vocabulary of `rows`: a function of these two alone."""
    elements = CPU_ELEMENTS if device.type == "cpu" else GPU_ELEMENTS
    return max(16, elements // rows)


def matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else that of the hidden states."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return hidden.dtype


@dataclass(frozen=True)
class Projection:
    """How hidden states become the logits that are compared: the first `rows` of `head`, over tau.

    `weight` (rows,E) and `bias` are in the dtype of the matrix product.
    """

    head: LogitHead
    weight: Tensor
    bias: Tensor | None
    temperature: float

    @staticmethod
    def of(head: LogitHead, rows: int, dtype: torch.dtype, temperature: float) -> Projection:
        """Cut and cast a head once, before the chunks."""
        bias = None if head.bias is None else head.bias.detach()[:rows].to(dtype)
        return Projection(head, head.weight.detach()[:rows].to(dtype), bias, temperature)

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden (n,E) -> logits / temperature (n,V), at least float32, memory of their own."""
        logits = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.head.softcap is None:
            divisor = self.head.scale * self.temperature
            return logits if divisor == 1 else logits.div_(divisor)
        logits.div_(self.head.scale * self.head.softcap).tanh_()
        return logits.mul_(self.head.softcap / self.temperature)

    def slope(self, scaled: Tensor) -> Tensor | None:
        """d softcapped / d raw (n,V) at the scaled logits, which the comparison may overwrite."""
        if self.head.softcap is None:
            return None
        return 1 - (scaled * (self.temperature / self.head.softcap)).square_()

    @property
    def factor(self) -> float:
        """d scaled logits / d (hidden @ weight^T), but for the softcap's slope."""
        return 1 / (self.head.scale * self.temperature)


# --- comparisons of two distributions -------------------------------------------------------


def divergence(kind: Divergence, log_p: Tensor, log_q: Tensor) -> Compared:
    """Values (n,) and g (n,C) with d value / d student logits = g - q * sum(g); log_p, log_q (n,C).

    p is the teacher, q the student. Jensen-Shannon: the mean of KL(p || m) and KL(q || m) with
    m = (p + q) / 2, between 0 and ln 2.
    """
    p, q = log_p.exp(), log_q.exp()
    if kind == "forward_kl":
        return (p * (log_p - log_q)).sum(-1), -p
    if kind == "ce_teacher":
        return -(p * log_q).sum(-1), -p
    if kind == "reverse_kl":
        g = q * (log_q - log_p)
        return g.sum(-1), g
    if kind == "jsd":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        g = 0.5 * q * (log_q - log_m)
        return 0.5 * (p * (log_p - log_m)).sum(-1) + g.sum(-1), g
    raise ValueError(f"unknown loss {kind!r}: forward_kl, reverse_kl, jsd or ce_teacher")


def log_normaliser(logits: Tensor, probabilities: Tensor) -> Tensor:
    """log sum exp (n,) of logits (n,V) whose softmax is known: one pass, no copy."""
    top, index = logits.max(-1, keepdim=True)
    return (top - probabilities.gather(-1, index).log()).squeeze(-1)


def dense(kind: Divergence, student: Tensor, teacher: Tensor) -> Compared:
    """Compare logits (n,V) with logits (n,V); overwrites both."""
    p, q = teacher.softmax(-1), student.softmax(-1)
    student_lse, teacher_lse = log_normaliser(student, q), log_normaliser(teacher, p)
    if kind == "forward_kl":
        values = teacher.sub_(student).mul_(p).sum(-1) + student_lse - teacher_lse
        return values, q.sub_(p)
    if kind == "ce_teacher":
        return student_lse - student.mul_(p).sum(-1), q.sub_(p)
    log_q, log_p = student.sub_(student_lse.unsqueeze(-1)), teacher.sub_(teacher_lse.unsqueeze(-1))
    values, g = divergence(kind, log_p, log_q)
    return values, g.addcmul_(q, g.sum(-1, keepdim=True), value=-1)


def labels(student: Tensor, ids: Tensor) -> Compared:
    """Cross entropy of logits (n,V) to ids (n,)."""
    q = student.softmax(-1)
    index = ids.unsqueeze(-1)
    values = log_normaliser(student, q) - student.gather(-1, index).squeeze(-1)
    return values, q.scatter_add_(-1, index, torch.full_like(index, -1, dtype=q.dtype))


def sampled(student: Tensor, ids: Tensor, weights: Tensor) -> Compared:
    """Estimated cross entropy -sum_k weights_k log q(ids_k): ids, weights (n,K)."""
    q = student.softmax(-1)
    log_q = student.gather(-1, ids) - log_normaliser(student, q).unsqueeze(-1)
    weights = weights.to(q.dtype)
    gradient = q.mul_(weights.sum(-1, keepdim=True)).scatter_add_(-1, ids, -weights)
    return -(weights * log_q).sum(-1), gradient


def renormalised(kind: Divergence, student: Tensor, ids: Tensor, log_probs: Tensor) -> Compared:
    """Compare with the K stored tokens as if they were all of the teacher's distribution."""
    if kind not in ("forward_kl", "ce_teacher"):
        raise ValueError(
            f"loss {kind!r} compares tokens that a renormalised top-k teacher does not have; use "
            "missing='bucket', or forward_kl"
        )
    q = student.softmax(-1)
    log_q = student.gather(-1, ids) - log_normaliser(student, q).unsqueeze(-1)
    values, g = divergence(kind, log_probs.to(q.dtype).log_softmax(-1), log_q)
    return values, q.scatter_add_(-1, ids, g)


def bucketed(kind: Divergence, student: Tensor, ids: Tensor, log_probs: Tensor) -> Compared:
    """Compare K + 1 classes: the stored tokens, and all others together."""
    if ids.shape[-1] == student.shape[-1]:  # nothing is missing: there is no other token
        q = student.softmax(-1)
        log_q = student.gather(-1, ids) - log_normaliser(student, q).unsqueeze(-1)
        values, g = divergence(kind, log_probs.to(q.dtype), log_q)
        return values, q.mul_(-g.sum(-1, keepdim=True)).scatter_add_(-1, ids, g)
    q = student.softmax(-1)
    lse = log_normaliser(student, q).unsqueeze(-1)
    kept = student.gather(-1, ids) - lse
    student.scatter_(-1, ids, -torch.inf)
    rest = student.softmax(-1)  # of the tokens that are not stored
    log_rest = log_normaliser(student, rest).unsqueeze(-1) - lse
    log_probs = log_probs.to(q.dtype)
    # rounding of stored values can bring their sum to 1 and above
    missing = (-log_probs.logsumexp(-1, keepdim=True).expm1()).clamp_min(1e-12)
    log_p = torch.cat([log_probs, missing.log()], dim=-1)  # (n,K+1)
    values, g = divergence(kind, log_p, torch.cat([kept, log_rest], dim=-1))
    gradient = q.mul_(-g.sum(-1, keepdim=True)).scatter_add_(-1, ids, g[:, :-1])
    return values, gradient.addcmul_(rest, g[:, -1:])


# --- the sum over chunks --------------------------------------------------------------------


class WeightedSum(torch.autograd.Function):
    """sum_i coefficients_i * value_i over N tokens, with gradients for hidden states and head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        coefficients: Tensor,
        project: Projection,
        compare: Comparison,
        chunk: int,
        gradients: bool,
    ) -> Tensor:
        """hidden (N,E), weight (V,E), bias (V,) or None, coefficients (N,) -> scalar."""
        device = hidden.device.type
        rows = len(project.weight)
        wide = torch.promote_types(coefficients.dtype, torch.float32)
        values = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        needs = [gradients and need for need in ctx.needs_input_grad[:3]]
        d_hidden = torch.empty_like(hidden) if needs[0] else None
        d_weight = weight.new_zeros(weight.shape, dtype=wide) if needs[1] else None
        d_bias = weight.new_zeros(len(weight), dtype=wide) if needs[2] else None
        with torch.no_grad(), torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), chunk):
                at = slice(start, min(start + chunk, len(hidden)))
                part = hidden[at]
                logits = project(part)
                slope = project.slope(logits) if any(needs) else None
                values[at], gradient = compare(logits, at)
                del logits
                if not any(needs):
                    continue
                scale = (coefficients[at] * project.factor).unsqueeze(-1).to(gradient.dtype)
                if slope is not None:
                    gradient.mul_(slope)
                if d_bias is not None:
                    d_bias[:rows] += (gradient * scale).sum(0)
                # scaled after the product where that is (n,E) instead of (n,V)
                narrow = gradient.to(project.weight.dtype)
                if d_hidden is not None:
                    d_hidden[at] = (narrow @ project.weight).mul_(scale)
                if d_weight is not None:
                    scaled = (part.to(wide) * scale).to(narrow.dtype)
                    if narrow.dtype == wide:
                        d_weight[:rows].addmm_(narrow.t(), scaled)
                    else:
                        d_weight[:rows] += narrow.t() @ scaled
        ctx.kept = (d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return (values * coefficients).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale, in place and so only once, the gradients that the forward pass accumulated."""
        if ctx.kept is None:
            raise RuntimeError("the gradients of a chunked loss can be asked for only once")
        kept, ctx.kept = ctx.kept, None
        scaled = [
            None if gradient is None else gradient.mul_(outputs[0]).to(dtype)
            for gradient, dtype in zip(kept, ctx.dtypes, strict=True)
        ]
        return (*scaled, None, None, None, None, None)


@torch.no_grad()
def token_values(hidden: Tensor, project: Projection, compare: Comparison, chunk: int) -> Tensor:
    """The values (N,) alone; `compare` may return anything as its gradient."""
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.cat(
            [
                compare(project(part), slice(start, start + len(part)))[0]
                for start, part in zip(
                    range(0, len(hidden), chunk), hidden.split(chunk), strict=True
                )
            ]
        )
