"""The chunked gated delta rule with its gradient written out, for CPUs.

As in `ssd_cached`, the work goes chunk by chunk in buffers that stay in a core's cache, and the
backward pass recomputes the Q x Q matrices. Within a chunk with entering state S_0, writes w_i and
decays D_ij = a_{j+1} ... a_i, D_i = a_1 ... a_i,

    w_i = beta_i (v_i - D_i S_0 k_i - sum_{j<i} D_ij (k_i . k_j) w_j)
    y_i = D_i S_0 q_i + sum_{j<=i} D_ij (q_i . k_j) w_j
    S_Q = D_Q S_0 + sum_j D_Qj w_j k_j^T

which is one unit lower triangular system per chunk. Legend: B batch, T time, H heads, h = B H,
P value channels per head, N key dim, Z chunks, Q chunk length; k over q means stacked in rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rad.kernels.chunks import Decays, grad_log_a, packed, row_blocks, rows_per_block


def _steps(t: Tensor, length: int) -> tuple[Tensor, ...]:
    """Views of t (B,T,H,D), one per chunk: (B,H,Q,D)."""
    split: Tensor = t.unflatten(1, (-1, length))
    return split.transpose(2, 3).unbind(1)


def _column(t: Tensor, length: int) -> tuple[Tensor, ...]:
    """t (B,T,H), one tensor per chunk: (h,Q,1)."""
    return tuple(t_z.flatten(0, 1) for t_z in _steps(t.unsqueeze(-1), length))


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    beta: Tensor,
    y: Tensor,
    states: Tensor,
    writes: Tensor,
    stateful: bool,
) -> None:
    """Fill y (B,T,H,P), states (Z+1,h,P,N), of which the first is given, writes (Z,h,Q,P)."""
    batch, time, heads, size = k.shape
    channels, chunks = v.shape[-1], len(writes)
    length, flat = time // chunks, batch * heads
    decays = Decays(log_a, length)
    keys = v.new_empty(flat, 2 * length, size)  # k over q
    k_z, q_z = keys.split(length, 1)
    pair = v.new_empty(flat, 2 * length, length)  # k k^T over q k^T, decayed
    both = pair.view(flat, 2, length, length)
    system, within = pair.split(length, 1)
    segment = v.new_empty(flat, 1, length, length)
    read = v.new_zeros(flat, 2 * length, channels)  # S_0 k over S_0 q, decayed
    read_both = read.view(flat, 2, length, channels)
    read_k, read_q = read.split(length, 1)
    right = v.new_empty(flat, length, channels)
    by_row = (batch, heads, length, -1)
    for z, (k_in, q_in, v_in, y_out, b, before, after, write) in enumerate(
        zip(
            *(_steps(t, length) for t in (k, q, v, y)),
            _column(beta, length),
            states[:-1].unbind(0),
            states[1:].unbind(0),
            writes.unbind(0),
            strict=True,
        )
    ):
        k_z.view(by_row).copy_(k_in)
        q_z.view(by_row).copy_(q_in)
        torch.bmm(keys, k_z.transpose(1, 2), out=pair)
        both.mul_(decays.segment(z, segment.squeeze(1)).unsqueeze(1))
        system.mul_(b)
        if z or stateful:
            torch.bmm(keys, before.transpose(1, 2), out=read)
            read_both.mul_(decays.from_start[z].unsqueeze(1))
        torch.sub(v_in, read_k.view(by_row), out=right.view(by_row)).mul_(b.view(by_row))
        torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True, out=write)
        torch.bmm(within, write, out=right)
        torch.add(right.view(by_row), read_q.view(by_row), out=y_out)
        k_z.mul_(decays.to_end[z])
        torch.bmm(write.transpose(1, 2), k_z, out=after)
        if z or stateful:
            after.addcmul_(before, decays.carry[z])


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    beta: Tensor,
    states: Tensor,
    writes: Tensor,
    grad_y: Tensor,
    grad_state: Tensor | None,
    stateful: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_a, beta and the first state; grad_state (h,P,N) is overwritten."""
    batch, time, heads, size = k.shape
    channels, chunks = v.shape[-1], len(writes)
    length, flat = time // chunks, batch * heads
    decays = Decays(log_a, length)
    grad_q, grad_k, grad_v = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)
    )
    grad_beta, grad_within = (v.new_empty(chunks, flat, length) for _ in range(2))
    grad_start, grad_end = (v.new_zeros(chunks, flat, length) for _ in range(2))
    grad_carry = v.new_zeros(chunks, flat)
    keys, grad_keys = (v.new_empty(flat, 2 * length, size) for _ in range(2))  # k over q
    k_z, q_z = keys.split(length, 1)
    gk_z, gq_z = grad_keys.split(length, 1)
    keyed = v.new_empty(flat, length, size)
    pair, grad_pair = (v.new_empty(flat, 2 * length, length) for _ in range(2))
    both, grad_both = (t.view(flat, 2, length, length) for t in (pair, grad_pair))
    pair_k, within = pair.split(length, 1)
    grad_pair_k, grad_pair_q = grad_pair.split(length, 1)
    segment, system = (v.new_empty(flat, length, length) for _ in range(2))
    read = v.new_empty(flat, 2 * length, channels)  # S_0 k over S_0 q, decayed
    read_k = read[:, :length]
    grad_read = torch.empty_like(read)
    grad_right, gy = grad_read.split(length, 1)
    grad_write, right = (v.new_empty(flat, length, channels) for _ in range(2))
    leaving = grad_state is not None
    if grad_state is None:
        grad_state = torch.empty_like(states[0])
    by_row = (batch, heads, length, -1)
    items = zip(
        range(chunks),
        *(_steps(t, length) for t in (k, q, v, grad_y, grad_k, grad_q, grad_v)),
        _column(beta, length),
        states[:-1].unbind(0),
        writes.unbind(0),
        strict=True,
    )
    for z, k_in, q_in, v_in, gy_in, gk_out, gq_out, gv_out, b, before, write in reversed(
        list(items)
    ):
        k_z.view(by_row).copy_(k_in)
        q_z.view(by_row).copy_(q_in)
        gy.view(by_row).copy_(gy_in)
        torch.bmm(keys, k_z.transpose(1, 2), out=pair)
        both.mul_(decays.segment(z, segment).unsqueeze(1))
        torch.mul(pair_k, b, out=system)

        # back from what was written to the right hand side of the system
        torch.bmm(within.transpose(1, 2), gy, out=grad_write)
        if leaving:
            torch.mul(k_z, decays.to_end[z], out=keyed)
            grad_write.baddbmm_(keyed, grad_state.transpose(1, 2))
        torch.linalg.solve_triangular(
            system.transpose(1, 2), grad_write, upper=True, unitriangular=True, out=right
        )
        torch.neg(right, out=grad_right)  # of what is subtracted
        torch.bmm(grad_read, write.transpose(1, 2), out=grad_pair)
        if z or stateful:
            torch.bmm(keys, before.transpose(1, 2), out=read)
            read.view(flat, 2, length, channels).mul_(decays.from_start[z].unsqueeze(1))
        else:
            read.zero_()
        # right = beta (v - read_k)
        seen = grad_write.view(by_row)
        torch.sub(v_in, read_k.view(by_row), out=seen)
        from_value = grad_write.mul_(right).sum(-1)
        grad_right.mul_(b)
        torch.neg(grad_right.view(by_row), out=gv_out)

        # the decayed products k k^T (strictly lower) and q k^T
        product = torch.mul(grad_pair_k, pair_k, out=system).tril_(-1)
        torch.add(product.sum(-1), from_value, out=grad_beta[z])
        product.mul_(b).addcmul_(grad_pair_q, within).tril_(-1)
        torch.sub(product.sum(2), product.sum(1), out=grad_within[z])
        grad_pair_k.mul_(b).tril_(-1)
        grad_both.mul_(segment.unsqueeze(1))
        torch.bmm(grad_pair, k_z, out=grad_keys)
        gk_z.baddbmm_(grad_pair.transpose(1, 2), keys)

        # the state that leaves
        if leaving:
            torch.bmm(write, grad_state, out=keyed)
            keyed.mul_(decays.to_end[z])
            gk_z.add_(keyed)
            torch.sum(keyed.mul_(k_z), -1, out=grad_end[z])
            grad_state.mul_(decays.carry[z])

        # the state that enters
        if z or stateful:
            start = (read.mul_(grad_read)).sum(-1).view(flat, 2, length)
            torch.sum(start, 1, out=grad_start[z])
            grad_read.view(flat, 2, length, channels).mul_(decays.from_start[z].unsqueeze(1))
            grad_keys.baddbmm_(grad_read, before)
            if leaving:
                torch.sum(grad_state * before, (1, 2), out=grad_carry[z])
                grad_state.baddbmm_(grad_read.transpose(1, 2), keys)
            else:
                torch.bmm(grad_read.transpose(1, 2), keys, out=grad_state)
                leaving = True
        gk_out.copy_(gk_z.view(by_row))
        gq_out.copy_(gq_z.view(by_row))
    change = grad_log_a(grad_within, grad_start, grad_end, grad_carry, batch)
    # (Z,h,Q) -> (B,T,H)
    grad_b = grad_beta.view(chunks, batch, heads, length).permute(1, 0, 3, 2)
    return grad_q, grad_k, grad_v, change, grad_b.reshape(beta.shape), grad_state


class CachedGatedDelta(torch.autograd.Function):
    """q, k (B,T,H,N), v (B,T,H,P), log_a, beta (B,T,H), state (B,H,P,N) or None -> y, last state.

    T must be a multiple of `length`, the chunk length.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_a: Tensor,
        beta: Tensor,
        state: Tensor | None,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        batch, time, heads, channels = v.shape
        chunks, size = time // length, k.shape[-1]
        y = torch.empty_like(v, memory_format=torch.contiguous_format)
        # the state that enters each chunk, and the last
        states = v.new_empty(chunks + 1, batch * heads, channels, size)
        if state is None:
            states[0].zero_()
        else:
            states[0].copy_(state.flatten(0, 1))
        writes = v.new_empty(chunks, batch * heads, length, channels)
        row = heads * length * max(length, channels, size)
        ctx.rows, ctx.stateful = rows_per_block(batch, row, v.device), state is not None
        for rows in row_blocks(batch, ctx.rows):
            flat = slice(rows.start * heads, rows.stop * heads)
            _forward(
                q[rows],
                k[rows],
                v[rows],
                log_a[rows],
                beta[rows],
                y[rows],
                states[:, flat],
                writes[:, flat],
                ctx.stateful,
            )
        ctx.save_for_backward(q, k, v, log_a, beta, states, writes)
        ctx.set_materialize_grads(False)
        return y, states[-1].view(batch, heads, channels, size).clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_a, beta, states, writes = ctx.saved_tensors
        grad_y, grad_last = grads
        if grad_y is None:
            grad_y = torch.zeros_like(v)
        grad_y = packed(grad_y)
        if grad_last is not None:
            grad_last = grad_last.reshape(states[0].shape).clone()
        batch, heads = v.shape[0], v.shape[2]
        results = []
        for rows in row_blocks(batch, ctx.rows):
            flat = slice(rows.start * heads, rows.stop * heads)
            results.append(
                _backward(
                    q[rows],
                    k[rows],
                    v[rows],
                    log_a[rows],
                    beta[rows],
                    states[:, flat],
                    writes[:, flat],
                    grad_y[rows],
                    None if grad_last is None else grad_last[flat],
                    ctx.stateful,
                )
            )
        *changes, state = (
            parts[0] if len(parts) == 1 else torch.cat(parts)
            for parts in zip(*results, strict=True)
        )
        first = state.view(batch, heads, *state.shape[1:]) if ctx.stateful else None
        return *changes, first, None
