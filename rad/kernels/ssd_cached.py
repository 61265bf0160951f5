"""The chunked state-space dual form with its gradient written out, for CPUs.

Memory, not arithmetic, bounds this computation on a CPU. So it goes chunk by chunk in buffers that
stay in a core's cache, keeps only its inputs and the state that enters each chunk, and recomputes
the Q x Q matrices in the backward pass. With D_ij = a_{j+1} ... a_i and D_i = a_1 ... a_i,

    y_i = sum_{j<=i} (c_i . b_j) D_ij x_j + D_i S_0 c_i
    S_Q = D_Q S_0 + sum_j D_Qj x_j b_j^T

Legend: B batch, T time, G groups that share b and c, R heads per group, P value channels per head,
N state dim, Z chunks, Q chunk length. Within a chunk b is called key and c query.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rad.kernels.chunks import Decays, grad_log_a, packed, row_blocks, rows_per_block


def _wide(t: Tensor, length: int) -> tuple[Tensor, ...]:
    """Views of t (B,T,G,R,P), one per chunk: (B,G,Q,R,P)."""
    split: Tensor = t.unflatten(1, (-1, length))
    return split.transpose(2, 3).unbind(1)


def _by_head(t: Tensor, length: int) -> Tensor:
    """t (B,T,G,R,P) -> (Z,B G R,Q,P), a view where B = 1."""
    split: Tensor = t.unflatten(1, (-1, length)).permute(1, 0, 3, 4, 2, 5)  # (Z,B,G,R,Q,P)
    return split.reshape(split.shape[0], -1, length, t.shape[-1])


def _by_group(t: Tensor, length: int) -> Tensor:
    """t (B,T,G,N) -> (Z,B G,Q,N)."""
    split: Tensor = t.unflatten(1, (-1, length)).permute(1, 0, 3, 2, 4)  # (Z,B,G,Q,N)
    return split.reshape(split.shape[0], -1, length, t.shape[-1])


def _forward(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, states: Tensor, y: Tensor, stateful: bool
) -> None:
    """Fill y (B,T,G,R,P) and states (Z+1,B G,R P,N), of which the first is given."""
    batch, time, groups, share, channels = x.shape
    chunks = states.shape[0] - 1
    length = time // chunks
    decays = Decays(log_a.flatten(2), length)
    by_step = (batch, groups, share, length)  # of what is kept by head
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
        if stateful or z:
            torch.bmm(q, before_t, out=flat)
            start = decays.from_start[z].view(*by_step, 1).transpose(2, 3)  # (B,G,Q,R,1)
            torch.addcmul(within_wide, wide, start, out=y_z)
        else:
            y_z.copy_(within_wide)
        torch.mul(x_z, decays.to_end[z].view(*by_step, 1).transpose(2, 3), out=wide)
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
    decays = Decays(log_a.flatten(2), length)
    by_step = (batch, groups, share, length)  # of what is kept by head
    keys, queries = _by_group(b, length), _by_group(c, length)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    grad_k, grad_q = torch.empty_like(keys), torch.empty_like(queries)
    # what the decays within the chunk, from its start, to its end and over all of it receive
    grad_within = x.new_empty(chunks, heads, length)
    grad_start, grad_end = (x.new_zeros(chunks, heads, length) for _ in range(2))
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

        # the state that leaves: S' = carry S + sum_j to_end_j x_j k_j^T
        if leaving:
            torch.bmm(k, grad_state_t, out=flat)
            end = decays.to_end[z].view(*by_step, 1).transpose(2, 3)  # (B,G,Q,R,1)
            wide.mul_(end)
            torch.add(inner_wide, wide, out=gx)
            torch.sum(wide.mul_(x_z), -1, out=grad_end[z].view(by_step).transpose(2, 3))
            torch.mul(x_z, end, out=wide)
            gk.baddbmm_(flat, grad_state)
        else:
            gx.copy_(inner_wide)
        if not (z or stateful):
            continue

        # the state that enters: y_i += from_start_i S q_i
        torch.mul(gy_z, decays.from_start[z].view(*by_step, 1).transpose(2, 3), out=wide)
        torch.bmm(flat, before, out=grad_read)
        gq.add_(grad_read)
        if share == 1:
            torch.sum(grad_read.mul_(q), -1, out=grad_start[z])
        else:
            torch.bmm(q, before_t, out=other_flat)
            torch.sum(other.mul_(wide), -1, out=grad_start[z].view(by_step).transpose(2, 3))
        if leaving:
            per_head.mul_(decays.carry[z])
            torch.mul(per_head, before.view(per_head.shape), out=product_state)
            torch.sum(product_state, (1, 2), out=grad_carry[z])
            grad_state.baddbmm_(flat.transpose(1, 2), q)
        else:
            torch.bmm(flat.transpose(1, 2), q, out=grad_state)
            leaving = True

    change = grad_log_a(grad_within, grad_start, grad_end, grad_carry, batch)

    def steps(t: Tensor) -> Tensor:
        """(Z,B G,Q,N) -> (B,T,G,N)."""
        t = t.view(chunks, batch, groups, length, -1).permute(1, 0, 3, 2, 4)
        return t.reshape(batch, time, groups, -1)

    return grad_x, change.view(log_a.shape), steps(grad_k), steps(grad_q), grad_state


class CachedSSD(torch.autograd.Function):
    """x (B,T,G,R,P), log_a (B,T,G,R), b, c (B,T,G,N), state (B,G,R P,N) or None -> y, last state.

    T must be a multiple of `length`, the chunk length.
    """

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
        row = groups * share * length * max(length, channels)
        ctx.rows = rows_per_block(batch, row, x.device)
        for rows in row_blocks(batch, ctx.rows):
            flat = slice(rows.start * groups, rows.stop * groups)
            given = state is not None
            _forward(x[rows], log_a[rows], b[rows], c[rows], states[:, flat], y[rows], given)
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
        grad_y = packed(grad_y)
        if grad_last is not None:
            grad_last = grad_last.reshape(states[0].shape).clone()
        results = []
        for rows in row_blocks(batch, ctx.rows):
            flat = slice(rows.start * groups, rows.stop * groups)
            results.append(
                _backward(
                    x[rows],
                    log_a[rows],
                    b[rows],
                    c[rows],
                    states[:, flat],
                    grad_y[rows],
                    None if grad_last is None else grad_last[flat],
                    ctx.stateful,
                )
            )
        *inputs, state = (
            parts[0] if len(parts) == 1 else torch.cat(parts)
            for parts in zip(*results, strict=True)
        )
        first = state.view(batch, groups, *state.shape[1:]) if ctx.stateful else None
        return *inputs, first, None
