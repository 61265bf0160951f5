"""The selective scan with its gradient written out, for CPUs.

Step after step, as the recurrence, but without a graph of every step: chunk by chunk and in blocks
of channels, so that the states of a block stay in a core's cache, and with the states of a chunk
recomputed in the backward pass, which is the recurrence run backwards,

    g_t = dy_t c_t^T + a_{t+1} g_{t+1},   du_t = g_t,   da_t = g_t S_{t-1},   dc_t = S_t^T dy_t

Nothing is divided by a, which may be 0. Kept are the inputs and the state that enters each chunk.
Legend: B batch, T time, H heads, P value channels per head, N state dim, Z chunks, Q chunk length.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rad.kernels.chunks import row_blocks

# elements of one state of a block: enough that a step takes longer than its call
_STATE_ELEMENTS = 16384


def _blocks(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    """Rows of the batch and channels to work on at a time; shape (B,T,H,P,N)."""
    batch, _, heads, channels, size = shape
    rows = max(1, min(batch, _STATE_ELEMENTS // (heads * channels * size)))
    width = max(1, min(channels, _STATE_ELEMENTS // (rows * heads * size)))
    for block in row_blocks(batch, rows):
        for part in row_blocks(channels, width):
            yield block, part


def _run(a: Tensor, u: Tensor, states: tuple[Tensor, ...]) -> None:
    """Fill states[1:] from states[0]; a, u (I,Q,H,P,N), each state (I,H,P,N)."""
    for a_t, u_t, before, after in zip(
        a.unbind(1), u.unbind(1), states[:-1], states[1:], strict=True
    ):
        torch.addcmul(u_t, a_t, before, out=after)


class CachedScan(torch.autograd.Function):
    """a, u (B,T,H,P,N), c (B,T,H,N), state (B,H,P,N) -> y (B,T,H,P), last state (B,H,P,N)."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, u: Tensor, c: Tensor, state: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        y = u.new_empty(u.shape[:-1])
        spans = list(row_blocks(u.shape[1], chunk))
        entering = u.new_empty(len(spans), *state.shape)
        last = torch.empty_like(state, memory_format=torch.contiguous_format)
        for rows, part in _blocks(u.shape):
            now = state[rows, :, part]
            buffer = u.new_empty(min(chunk, u.shape[1]) + 1, *now.shape)  # (Q+1,I,H,P,N)
            slots = buffer.unbind(0)
            for z, span in enumerate(spans):
                steps = span.stop - span.start
                slots[0].copy_(now)
                entering[z, rows, :, part] = now
                _run(a[rows, span, :, part], u[rows, span, :, part], slots[: steps + 1])
                c_z = c[rows, span].transpose(0, 1).unsqueeze(-1)  # (Q,I,H,N,1)
                y_z = torch.matmul(buffer[1 : steps + 1], c_z).squeeze(-1)
                y[rows, span, :, part] = y_z.transpose(0, 1)
                now = slots[steps]
            last[rows, :, part] = now
        ctx.save_for_backward(a, u, c, entering)
        ctx.spans = spans
        return y, last

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor, grad_last: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        a, u, c, entering = ctx.saved_tensors
        grad_a, grad_u = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (a, u)
        )
        grad_c = torch.zeros_like(c, memory_format=torch.contiguous_format)
        grad_state = torch.empty_like(entering[0])
        most = ctx.spans[0].stop
        for rows, part in _blocks(u.shape):
            carried = grad_last[rows, :, part].clone(memory_format=torch.contiguous_format)
            buffer = u.new_empty(most + 1, *carried.shape)
            change = u.new_empty(most, *carried.shape)
            slots, changes = buffer.unbind(0), change.unbind(0)  # each (I,H,P,N)
            for z in reversed(range(len(ctx.spans))):
                span = ctx.spans[z]
                steps = span.stop - span.start
                a_z = a[rows, span, :, part]
                slots[0].copy_(entering[z, rows, :, part])
                _run(a_z, u[rows, span, :, part], slots[: steps + 1])
                c_z = c[rows, span].transpose(0, 1).unsqueeze(-2)  # (Q,I,H,1,N)
                gy_z = grad_y[rows, span, :, part].transpose(0, 1).unsqueeze(-1)  # (Q,I,H,P,1)
                torch.mul(gy_z, c_z, out=change[:steps])
                a_t = a_z.unbind(1)
                changes[steps - 1].add_(carried)
                for t in range(steps - 1, 0, -1):
                    changes[t - 1].addcmul_(a_t[t], changes[t])
                torch.mul(a_t[0], changes[0], out=carried)
                g, states = change[:steps].transpose(0, 1), buffer[: steps + 1].transpose(0, 1)
                grad_u[rows, span, :, part] = g
                torch.mul(g, states[:, :-1], out=grad_a[rows, span, :, part])
                read = torch.matmul(gy_z.transpose(-1, -2), buffer[1 : steps + 1])  # (Q,I,H,1,N)
                grad_c[rows, span] += read.squeeze(-2).transpose(0, 1)
            grad_state[rows, :, part] = carried
        return grad_a, grad_u, grad_c, grad_state, None
