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


class _Decays:
    """Decays within chunks, log_a (B,T,G,R), T = Z Q; each a list over the chunks."""

    def __init__(self, log_a: Tensor, length: int) -> None:
        batch, _, groups, share = log_a.shape
        self.floor = decay_floor(log_a.dtype)
        steps = log_a.reshape(batch, -1, length, groups, share).cumsum(2)
        steps = steps.permute(1, 0, 3, 2, 4)  # (Z,B,G,Q,R)
        last = steps[..., -1:, :]
        held = steps.clamp(min=self.floor).exp_().unsqueeze(-1)
        self.from_start = held.unbind(0)  # (B,G,Q,R,1)
        self.to_end = (last - steps).clamp_(min=self.floor).exp_().unsqueeze(-1).unbind(0)
        self.carry = held[..., -1:, :, :].reshape(-1, batch * groups * share, 1, 1).unbind(0)
        by_head = steps.transpose(-1, -2).reshape(-1, batch * groups * share, length)
        self._rows = by_head.unsqueeze(-1).unbind(0)  # (B H,Q,1)
        self._columns = by_head.unsqueeze(-2).unbind(0)

    def segment(self, z: int, out: Tensor) -> Tensor:
        """exp(d_i - d_j) on and below the diagonal, zero above, into `out` (B H,Q,Q)."""
        torch.sub(self._rows[z], self._columns[z], out=out)
        # zero before exp, where the upper triangle would overflow; again after it, as the mask
        return out.tril_().clamp_(min=self.floor).exp_().tril_()


def _wide(t: Tensor, length: int) -> tuple[Tensor, ...]:
    """Views of t (B,T,G,R,P), one per chunk: (B,G,Q,R,P)."""
    return t.unflatten(1, (-1, length)).transpose(2, 3).unbind(1)


def _by_head(t: Tensor, length: int) -> Tensor:
    """t (B,T,G,R,P) -> (Z,B G R,Q,P), a view where B = 1."""
    split = t.unflatten(1, (-1, length)).permute(1, 0, 3, 4, 2, 5)  # (Z,B,G,R,Q,P)
    return split.reshape(split.shape[0], -1, length, t.shape[-1])


def _by_group(t: Tensor, length: int) -> Tensor:
    """t (B,T,G,N) -> (Z,B G,Q,N)."""
    split = t.unflatten(1, (-1, length)).permute(1, 0, 3, 2, 4)  # (Z,B,G,Q,N)
    return split.reshape(split.shape[0], -1, length, t.shape[-1])


def _rows_per_block(x: Tensor, length: int) -> int:
    """Rows of the batch to work on at a time: as many as the cache has room for."""
    batch, _, groups, share, channels = x.shape
    fitting = _CACHED_ELEMENTS // (groups * share * length * max(length, channels))
    return max(1, min(batch, fitting)) if x.device.type == "cpu" else batch


def _forward(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, states: Tensor, y: Tensor, stateful: bool
) -> None:
    """Fill y (B,T,G,R,P) and states (Z+1,B G,R P,N), of which the first is given."""
    batch, time, groups, share, channels = x.shape
    chunks = states.shape[0] - 1
    length = time // chunks
    decays = _Decays(log_a, length)
    keys, queries = _by_group(b, length), _by_group(c, length)
    scores = x.new_empty(batch * groups, length, length)
    weights = x.new_empty(batch * groups * share, length, length)
    weights_grouped = weights.view(batch * groups, share, length, length)
    within = x.new_empty(batch * groups * share, length, channels)
    within_wide = within.view(batch, groups, share, length, channels).transpose(2, 3)
    wide = x.new_empty(batch, groups, length, share, channels)
    flat = wide.view(batch * groups, length, -1)
    for z, (x_z, x_h, k, k_t, q, y_z, before, before_t, after) in enumerate(
        zip(
            _wide(x, length),
            _by_head(x, length).unbind(0),
            keys.unbind(0),
            keys.transpose(-1, -2).unbind(0),
            queries.unbind(0),
            _wide(y, length),
            states[:-1].unbind(0),
            states[:-1].transpose(-1, -2).unbind(0),
            states[1:].unbind(0),
            strict=True,
        )
    ):
        torch.bmm(q, k_t, out=scores)
        decays.segment(z, weights)
        weights_grouped.mul_(scores.unsqueeze(1))
        torch.bmm(weights, x_h, out=within)
        y_z.copy_(within_wide)
        if stateful or z:
            torch.bmm(q, before_t, out=flat)
            y_z.addcmul_(wide, decays.from_start[z])
        torch.mul(x_z, decays.to_end[z], out=wide)
        torch.bmm(flat.transpose(1, 2), k, out=after)
        if stateful or z:
            per_head = (-1, channels, b.shape[-1])
            after.view(per_head).addcmul_(before.view(per_head), decays.carry[z])


def _backward(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    states: Tensor,
    grad_y: Tensor,
    grad_state: Tensor | None,
    stateful: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_a, b, c and the first state; grad_state (B G,R P,N) is overwritten."""
    batch, time, groups, share, channels = x.shape
    size = b.shape[-1]
    chunks = states.shape[0] - 1
    length = time // chunks
    heads = batch * groups * share
    decays = _Decays(log_a, length)
    keys, queries = _by_group(b, length), _by_group(c, length)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_k, grad_q = torch.empty_like(keys), torch.empty_like(queries)
    # what the decays within the chunk, from its start, to its end and over all of it receive
    grad_within = x.new_empty(chunks, heads, length)
    grad_start = x.new_zeros(chunks, batch, groups, length, share)
    grad_end = torch.zeros_like(grad_start)
    grad_carry = x.new_zeros(chunks, heads)
    scores = x.new_empty(batch * groups, length, length)
    weights, grad_w, product = (x.new_empty(heads, length, length) for _ in range(3))
    weights_grouped, grad_w_grouped = (
        t.view(batch * groups, share, length, length) for t in (weights, grad_w)
    )
    product_grouped = product.view(grad_w_grouped.shape)
    inner = x.new_empty(heads, length, channels)
    inner_wide = inner.view(batch, groups, share, length, channels).transpose(2, 3)
    wide, other = (x.new_empty(batch, groups, length, share, channels) for _ in range(2))
    flat, other_flat = wide.view(batch * groups, length, -1), other.view(batch * groups, length, -1)
    grad_read = torch.empty_like(keys[0])
    leaving = grad_state is not None
    if grad_state is None:
        grad_state = torch.empty_like(states[0])
    grad_state_t = grad_state.transpose(1, 2)
    per_head = grad_state.view(heads, channels, size)
    product_state = torch.empty_like(per_head)
    for z, (x_z, x_t, gx, gy_z, gy, k, k_t, q, gk, gq, before, before_t) in reversed(
        list(
            enumerate(
                zip(
                    _wide(x, length),
                    _by_head(x, length).transpose(-1, -2).unbind(0),
                    _wide(grad_x, length),
                    _wide(grad_y, length),
                    _by_head(grad_y, length).unbind(0),
                    keys.unbind(0),
                    keys.transpose(-1, -2).unbind(0),
                    queries.unbind(0),
                    grad_k.unbind(0),
                    grad_q.unbind(0),
                    states[:-1].unbind(0),
                    states[:-1].transpose(-1, -2).unbind(0),
                    strict=True,
                )
            )
        )
    ):
        # within the chunk: y_i = sum_j scores_ij segment_ij x_j
        torch.bmm(q, k_t, out=scores)
        decays.segment(z, weights)
        torch.bmm(gy, x_t, out=grad_w)
        grad_w.mul_(weights)
        torch.mul(grad_w_grouped, scores.unsqueeze(1), out=product_grouped)
        product.tril_(-1)  # d_i - d_i has no gradient
        torch.sub(product.sum(2), product.sum(1), out=grad_within[z])
        grad_scores = grad_w if share == 1 else grad_w_grouped.sum(1)
        torch.bmm(grad_scores, k, out=gq)
        torch.bmm(grad_scores.transpose(1, 2), q, out=gk)
        weights_grouped.mul_(scores.unsqueeze(1))
        torch.bmm(weights.transpose(1, 2), gy, out=inner)
        gx.copy_(inner_wide)

        # the state that leaves: S' = carry S + sum_j to_end_j x_j k_j^T
        if leaving:
            torch.bmm(k, grad_state_t, out=flat)
            wide.mul_(decays.to_end[z])
            gx.add_(wide)
            torch.sum(wide.mul_(x_z), -1, out=grad_end[z])
            torch.mul(x_z, decays.to_end[z], out=wide)
            gk.baddbmm_(flat, grad_state)
        if not (z or stateful):
            continue

        # the state that enters: y_i += from_start_i S q_i
        torch.mul(gy_z, decays.from_start[z], out=wide)
        torch.bmm(flat, before, out=grad_read)
        gq.add_(grad_read)
        if share == 1:
            torch.sum(grad_read.mul_(q), -1, out=grad_start[z].view(heads, length))
        else:
            torch.bmm(q, before_t, out=other_flat)
            torch.sum(other.mul_(wide), -1, out=grad_start[z])
        if leaving:
            per_head.mul_(decays.carry[z])
            torch.mul(per_head, before.view(per_head.shape), out=product_state)
            torch.sum(product_state, (1, 2), out=grad_carry[z])
            grad_state.baddbmm_(flat.transpose(1, 2), q)
        else:
            torch.bmm(flat.transpose(1, 2), q, out=grad_state)
            leaving = True

    # log_a_t is in every decay that spans it: d_i - d_j with j < t <= i, the start's with i >= t,
    # the end's with j < t
    split = (chunks, batch, groups, share, length)
    until = grad_within.view(split).transpose(-1, -2) + grad_start
    total = until.flip(3).cumsum(3).flip(3) + (grad_end.cumsum(3) - grad_end)
    total += grad_carry.view(split[:-1]).unsqueeze(3)  # (Z,B,G,Q,R)

    def steps(t: Tensor) -> Tensor:
        """(Z,B G,Q,.) or (Z,B,G,Q,.) -> (B,T,G,.)."""
        t = t.reshape(chunks, batch, groups, length, -1).permute(1, 0, 3, 2, 4)
        return t.reshape(batch, time, groups, -1)

    return grad_x, steps(total), steps(grad_k), steps(grad_q), grad_state


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
        batch, time, groups, share, channels = x.shape
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        # the state that enters each chunk, and the last
        shape = (time // length + 1, batch * groups, share * channels, b.shape[-1])
        states = x.new_empty(shape)
        if state is None:
            states[0].zero_()
        else:
            states[0].copy_(state.flatten(0, 1))
        ctx.block = _rows_per_block(x, length)
        for rows, flat in _blocks(batch, groups, ctx.block):
            parts = (t[rows] for t in (x, log_a, b, c))
            _forward(*parts, states[:, flat], y[rows], stateful=state is not None)
        ctx.save_for_backward(x, log_a, b, c, states)
        ctx.stateful = state is not None
        ctx.set_materialize_grads(False)
        return y, states[-1].view(batch, groups, -1, shape[-1]).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x, log_a, b, c, states = ctx.saved_tensors
        grad_y, grad_last = grads
        batch, _, groups = x.shape[:3]
        if grad_y is None:
            grad_y = torch.zeros_like(x)
        if grad_last is not None:
            grad_last = grad_last.reshape(states[0].shape).clone()
        results = []
        for rows, flat in _blocks(batch, groups, ctx.block):
            parts = (t[rows] for t in (x, log_a, b, c))
            last = None if grad_last is None else grad_last[flat]
            results.append(_backward(*parts, states[:, flat], grad_y[rows], last, ctx.stateful))
        *inputs, state = (
            parts[0] if len(parts) == 1 else torch.cat(parts)
            for parts in zip(*results, strict=True)
        )
        first = state.view(batch, groups, *state.shape[1:]) if ctx.stateful else None
        return *inputs, first, None


def _blocks(batch: int, groups: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of rows, and the same in an axis of rows times groups."""
    for start in range(0, batch, size):
        stop = min(start + size, batch)
        yield slice(start, stop), slice(start * groups, stop * groups)
