"""State-space duality: the recurrence behind Mamba-2 and its chunked, matmul-rich form.

    S_t = a_t S_{t-1} + x_t b_t^T          S in R^{P x N}, a_t in (0, 1] one scalar per head
    y_t = S_t c_t

Dao & Gu 2024 (arXiv 2405.21060), section 6. The caller folds the time step into x and adds the
skip D x. Legend: B batch, T time, H heads, P value channels per head, N state dim, G groups of
heads that share b and c, R = H / G heads per group, Z chunks, Q chunk length, I block of rows of
the batch.

The chunked form has its gradient written out: it recomputes the Q x Q matrices instead of keeping
them, and works chunk by chunk in buffers that stay in a core's cache, because memory and not
arithmetic bounds it on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# elements per buffer of one work item on a CPU: 256 KiB of float32, a few fit in a second-level cache
_CACHED_ELEMENTS = 65536


def decay_floor(dtype: torch.dtype) -> float:
    """Where log decays are held: exp of less is (almost) subnormal, a hundred times slower on CPUs."""
    return -700.0 if dtype == torch.float64 else -80.0


def _per_head(t: Tensor, heads: int) -> Tensor:
    """Repeat grouped b or c (..., G, N) to (..., H, N); head h reads group h // (H // G)."""
    groups = t.shape[-2]
    if heads % groups:
        raise ValueError(f"{groups} groups do not divide {heads} heads: choose a divisor")
    return t if groups == heads else t.repeat_interleave(heads // groups, dim=-2)


def ssd_step(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: x (B,H,P), log_a (B,H), b (B,G,N), c (B,G',N), state (B,H,P,N) -> y (B,H,P), S."""
    heads = x.shape[-2]
    b, c = _per_head(b, heads), _per_head(c, heads)
    update = x.unsqueeze(-1) * b.unsqueeze(-2)  # (B,H,P,N)
    state = torch.addcmul(update, log_a.exp()[..., None, None], state)
    return (state @ c.unsqueeze(-1)).squeeze(-1), state


def ssd_recurrent(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The plain recurrence: x (B,T,H,P), log_a (B,T,H), b (B,T,G,N), c (B,T,G',N) -> y, S.

    y (B,T,H,P), S (B,H,P,N). Raises ValueError where the groups of b or c do not divide the heads.
    """
    if state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[-1])
    outputs = []
    # unbind, not x[:, t]: indexing writes a full-size zero gradient at every step
    for step in zip(*(t.unbind(1) for t in (x, log_a, b, c)), strict=True):
        y, state = ssd_step(*step, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def ssd_chunked(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Equal to `ssd_recurrent` in values, gradients and final state; quadratic only within a chunk.

    Shapes and errors as there. T need not be a multiple of `chunk`, the greatest chunk length.
    """
    batch, time, heads, channels = x.shape
    if b.shape[2] != c.shape[2] or heads % b.shape[2]:
        b, c = _per_head(b, heads), _per_head(c, heads)
    groups, size = b.shape[2:]
    chunks = -(-time // chunk)
    length = -(-time // chunks)  # chunks of equal length need the least padding
    pad = chunks * length - time
    if pad:
        # a padded step with x = 0 and log a = 0 leaves the state as it is
        x, b, c = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, b, c))
        log_a = F.pad(log_a, (0, 0, 0, pad))
    shared = (batch, time + pad, groups, heads // groups)
    if state is not None:
        state = state.reshape(batch, groups, -1, size)  # (B,G,R P,N)
    y, last = _ChunkedSSD.apply(
        x.reshape(*shared, channels), log_a.reshape(shared), b, c, state, length
    )
    y = y.view(batch, time + pad, heads, channels)
    return y[:, :time], last.view(batch, heads, channels, size)


class _Plan:
    """What forward and backward share: the order of work and the decays; x (B,T,G,R,P), T = Z Q."""

    def __init__(self, x: Tensor, log_a: Tensor, length: int) -> None:
        batch, time, groups, share, channels = x.shape
        self.batch, self.groups, self.length, self.chunks = batch, groups, length, time // length
        self.heads = groups * share
        per_row = self.heads * length * max(length, channels)
        fitting = max(1, _CACHED_ELEMENTS // per_row)
        self.block = min(batch, fitting) if x.device.type == "cpu" else batch
        self.floor = decay_floor(x.dtype)
        steps = log_a.reshape(batch, self.chunks, length, groups, share).cumsum(2)
        steps = steps.permute(0, 1, 3, 2, 4)  # (B,Z,G,Q,R)
        last = steps[..., -1:, :]
        self.decay = steps.transpose(-1, -2).contiguous()  # (B,Z,G,R,Q)
        self.from_start = steps.clamp(min=self.floor).exp_().unsqueeze(-1)  # (B,Z,G,Q,R,1)
        self.to_end = (last - steps).clamp_(min=self.floor).exp_().unsqueeze(-1)
        self.carry = last.clamp(min=self.floor).exp_().view(batch, self.chunks, -1)  # (B,Z,H)

    def items(self, reverse: bool = False) -> Iterator[tuple[slice, slice, int]]:
        """Rows of the batch, the same rows in an axis of rows times groups, chunk."""
        for first in range(0, self.batch, self.block):
            rows = slice(first, min(first + self.block, self.batch))
            flat = slice(rows.start * self.groups, rows.stop * self.groups)
            order = range(self.chunks)
            for z in reversed(order) if reverse else order:
                yield rows, flat, z

    def segment(self, rows: slice, z: int, out: Tensor) -> Tensor:
        """exp(d_i - d_j) on and below the diagonal, zero above, into `out` (I H,Q,Q)."""
        decay = self.decay[rows, z].flatten(0, 2)  # (I H,Q)
        torch.sub(decay.unsqueeze(-1), decay.unsqueeze(-2), out=out)
        # zero before exp, where the upper triangle would overflow; again after it, as the mask
        return out.tril_().clamp_(min=self.floor).exp_().tril_()

    def carried(self, rows: slice, z: int) -> Tensor:
        """The decay of the state over chunk z: (I H,1,1)."""
        return self.carry[rows, z].reshape(-1, 1, 1)

    def part(self, t: Tensor, rows: slice, z: int) -> Tensor:
        """Steps of chunk z of t (B,T,G,R,P): (I,G,Q,R,P)."""
        return t[rows, z * self.length : (z + 1) * self.length].transpose(1, 2)

    def steps(self, z: int) -> slice:
        return slice(z * self.length, (z + 1) * self.length)


class _ChunkedSSD(torch.autograd.Function):
    """x (B,T,G,R,P), log_a (B,T,G,R), b, c (B,T,G,N), state (B,G,R P,N) or None -> y, last state."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        log_a: Tensor,
        b: Tensor,
        c: Tensor,
        state: Tensor | None,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        batch, _, groups, share, channels = x.shape
        size = b.shape[-1]
        plan = _Plan(x, log_a, length)
        keys, queries = (t.transpose(1, 2).flatten(0, 1) for t in (b, c))  # (B G,T,N)
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        # the state that enters each chunk, and the last
        states = x.new_empty(plan.chunks + 1, batch * groups, share * channels, size)
        if state is None:
            states[0].zero_()
        else:
            states[0].copy_(state.flatten(0, 1))
        most = plan.block
        weights_ = x.new_empty(most * plan.heads, length, length)
        scores_ = x.new_empty(most * groups, length, length)
        within_ = x.new_empty(most * plan.heads, length, channels)
        wide_ = x.new_empty(most, groups, length, share, channels)
        for rows, flat, z in plan.items():
            count = rows.stop - rows.start
            steps = plan.steps(z)
            x_z = plan.part(x, rows, z)
            k_z, q_z = keys[flat, steps], queries[flat, steps]
            weights, within, wide = (
                weights_[: count * plan.heads],
                within_[: count * plan.heads],
                wide_[:count],
            )
            scores = torch.bmm(q_z, k_z.transpose(1, 2), out=scores_[: count * groups])
            plan.segment(rows, z, weights)
            weights.view(count * groups, share, length, length).mul_(scores.unsqueeze(1))
            torch.bmm(weights, _by_head(x_z), out=within)
            inner = within.view(count, groups, share, length, channels).transpose(2, 3)
            if z or state is not None:
                flat_wide = wide.view(count * groups, length, -1)
                torch.bmm(q_z, states[z, flat].transpose(1, 2), out=flat_wide)
                torch.addcmul(inner, wide, plan.from_start[rows, z], out=plan.part(y, rows, z))
            else:
                plan.part(y, rows, z).copy_(inner)
            torch.mul(x_z, plan.to_end[rows, z], out=wide)
            update = states[z + 1, flat]
            torch.bmm(wide.view(count * groups, length, -1).transpose(1, 2), k_z, out=update)
            if z or state is not None:
                per_head = update.view(count * plan.heads, channels, size)
                per_head.addcmul_(states[z, flat].view(per_head.shape), plan.carried(rows, z))
        ctx.save_for_backward(x, log_a, b, c, states)
        ctx.length, ctx.has_state = length, state is not None
        ctx.set_materialize_grads(False)
        return y, states[-1].view(batch, groups, -1, size).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, log_a, b, c, states = ctx.saved_tensors
        grad_y, grad_last = grads
        batch, time, groups, share, channels = x.shape
        size, length = b.shape[-1], ctx.length
        if grad_y is None:
            grad_y = torch.zeros_like(x)
        plan = _Plan(x, log_a, length)
        keys, queries = (t.transpose(1, 2).flatten(0, 1) for t in (b, c))  # (B G,T,N)
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_k, grad_q = torch.empty_like(keys), torch.empty_like(queries)
        # of the cumulated decays, and what every step of a chunk adds to
        grad_d = x.new_empty(batch, plan.chunks, groups, length, share)
        grad_end = x.new_zeros(batch, plan.chunks, groups, 1, share)
        most = plan.block
        segment_, grad_w_ = (x.new_empty(most * plan.heads, length, length) for _ in range(2))
        scores_, grad_s_ = (x.new_empty(most * groups, length, length) for _ in range(2))
        inner_ = x.new_empty(most * plan.heads, length, channels)
        wide_, other_ = (x.new_empty(most, groups, length, share, channels) for _ in range(2))
        grad_state_ = x.new_empty(batch * groups, share * channels, size)
        product_ = x.new_empty(most * plan.heads, channels, size)
        known = grad_last is not None
        if grad_last is not None:
            grad_state_.copy_(grad_last.flatten(0, 1))
        for rows, flat, z in plan.items(reverse=True):
            count = rows.stop - rows.start
            heads, steps = count * plan.heads, plan.steps(z)
            entered = z > 0 or ctx.has_state
            leaves = z < plan.chunks - 1 or known
            x_z, gy_z = plan.part(x, rows, z), plan.part(grad_y, rows, z)
            k_z, q_z = keys[flat, steps], queries[flat, steps]
            gk_z, gq_z = grad_k[flat, steps], grad_q[flat, steps]
            segment, grad_w, inner = segment_[:heads], grad_w_[:heads], inner_[:heads]
            wide, other = wide_[:count], other_[:count]
            flat_wide = wide.view(count * groups, length, -1)
            scores, grad_s = scores_[: count * groups], grad_s_[: count * groups]
            grad_state = grad_state_[flat]
            shared = (count * groups, share, length, length)

            # within the chunk: y_i = sum_j scores_ij segment_ij x_j
            torch.bmm(q_z, k_z.transpose(1, 2), out=scores)
            plan.segment(rows, z, segment)
            gy_h = _by_head(gy_z)
            torch.bmm(gy_h, _by_head(x_z).transpose(1, 2), out=grad_w)
            grad_w.mul_(segment)
            torch.sum(grad_w.view(shared), 1, out=grad_s)
            torch.bmm(grad_s, k_z, out=gq_z)
            torch.bmm(grad_s.transpose(1, 2), q_z, out=gk_z)
            grad_w.view(shared).mul_(scores.unsqueeze(1))
            grad_w.diagonal(dim1=-2, dim2=-1).zero_()  # d_i - d_i has no gradient
            change = (grad_w.sum(2) - grad_w.sum(1)).view(count, groups, share, length)
            gd_z = grad_d[rows, z].copy_(change.transpose(2, 3))
            segment.view(shared).mul_(scores.unsqueeze(1))
            torch.bmm(segment.transpose(1, 2), gy_h, out=inner)
            gx = inner.view(count, groups, share, length, channels).transpose(2, 3)

            # the state that leaves: S' = carry S + sum_j to_end_j x_j k_j^T
            if leaves:
                torch.bmm(k_z, grad_state.transpose(1, 2), out=flat_wide)
                wide.mul_(plan.to_end[rows, z])
                torch.add(gx, wide, out=plan.part(grad_x, rows, z))
                ends = wide.mul_(x_z).sum(-1)  # (I,G,Q,R)
                gd_z.sub_(ends)
                grad_end[rows, z] = ends.sum(2, keepdim=True)
                torch.mul(x_z, plan.to_end[rows, z], out=wide)
                gk_z.baddbmm_(flat_wide, grad_state)
            else:
                plan.part(grad_x, rows, z).copy_(gx)
            if not entered:
                continue

            # the state that enters: y_i += from_start_i S q_i
            before = states[z, flat]
            torch.mul(gy_z, plan.from_start[rows, z], out=wide)
            gq_z.baddbmm_(flat_wide, before)
            torch.bmm(q_z, before.transpose(1, 2), out=other.view(flat_wide.shape))
            gd_z.add_(other.mul_(wide).sum(-1))
            if not leaves:
                torch.bmm(flat_wide.transpose(1, 2), q_z, out=grad_state)
                continue
            per_head = grad_state.view(heads, channels, size)
            per_head.mul_(plan.carried(rows, z))
            product = torch.mul(per_head, before.view(per_head.shape), out=product_[:heads])
            grad_end[rows, z] += product.sum((1, 2)).view(count, groups, 1, share)
            grad_state.baddbmm_(flat_wide.transpose(1, 2), q_z)
        # d is the cumulated log_a of its chunk
        grad_d = grad_d.flip(3).cumsum(3).flip(3).add_(grad_end)
        grad_log_a = grad_d.transpose(2, 3).reshape(log_a.shape)
        grad_b, grad_c = (
            t.view(batch, groups, time, size).transpose(1, 2) for t in (grad_k, grad_q)
        )
        grad_s0 = grad_state_.view(batch, groups, -1, size) if ctx.has_state else None
        return grad_x, grad_log_a, grad_b, grad_c, grad_s0, None


def _by_head(t: Tensor) -> Tensor:
    """(I,G,Q,R,P) -> (I G R,Q,P), a view for one row."""
    count, groups, length, share, channels = t.shape
    return t.transpose(2, 3).reshape(count * groups * share, length, channels)
