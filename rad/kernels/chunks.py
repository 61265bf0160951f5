"""What the chunked forms share: chunk lengths, decays within a chunk, blocks that fit in a cache.

Legend: B batch, T time, H heads, Z chunks, Q chunk length (T = Z Q after padding).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# elements of one buffer of a block: 256 KiB of float32, several fit in a second-level cache
_CACHED_ELEMENTS = 65536


def chunk_length(time: int, chunk: int) -> tuple[int, int]:
    """Length of equal chunks of at most `chunk` steps, and the steps of padding that they need."""
    if chunk < 1:
        raise ValueError(f"chunk {chunk} is no length: give at least 1")
    chunks = -(-time // chunk)
    length = -(-time // chunks)
    return length, chunks * length - time


def decay_floor(dtype: torch.dtype) -> float:
    """Where log decays are held before exp.

    CPUs take a hundred times longer where exp, or a product with it, is subnormal; what is lost is
    below 2e-35 (1e-304 in float64) of the values decayed.
    """
    return -700.0 if dtype == torch.float64 else -80.0


def packed(t: Tensor) -> Tensor:
    """t, copied where its last axis is strided, as behind a convolution over time."""
    return t if t.stride(-1) == 1 else t.contiguous()


def rows_per_block(batch: int, row: int, device: torch.device) -> int:
    """Rows of the batch to work on at a time, `row` elements each: all of them off the CPU."""
    return max(1, min(batch, _CACHED_ELEMENTS // row)) if device.type == "cpu" else batch


def row_blocks(batch: int, rows: int) -> Iterator[slice]:
    """Consecutive blocks of at most `rows` rows."""
    for start in range(0, batch, rows):
        yield slice(start, min(start + rows, batch))


class Decays:
    """exp of sums of log_a (B,T,H) between the steps of a chunk, one tensor per chunk and name."""

    def __init__(self, log_a: Tensor, length: int) -> None:
        dtype, floor = log_a.dtype, decay_floor(log_a.dtype)
        batch, time, heads = log_a.shape
        self._floor = floor
        steps = log_a.clamp(min=2 * floor).view(batch, time // length, length, heads)
        steps = steps.permute(1, 0, 3, 2)  # (Z,B,H,Q), finite where a is 0
        # float64, then a rounded part and its rest: under strong decay the sums grow large, and
        # their differences, the logs of what is still heard, would lose digits
        sums = steps.reshape(-1, batch * heads, length).double().cumsum(-1)  # (Z,B H,Q)
        from_start = sums.clamp(min=floor).exp_().to(dtype)
        self.from_start = from_start.unsqueeze(-1).unbind(0)  # (B H,Q,1), step i included
        to_end = (sums[..., -1:] - sums).clamp_(min=floor).exp_().to(dtype)
        self.to_end = to_end.unsqueeze(-1).unbind(0)  # (B H,Q,1), step j excluded
        self.carry = from_start[..., -1:, None].unbind(0)  # (B H,1,1), the whole chunk
        rounded = sums.to(dtype)
        rest = (sums - rounded).to(dtype)
        self._rows, self._row_rests = (t.unsqueeze(-1).unbind(0) for t in (rounded, rest))
        self._columns, self._column_rests = (t.unsqueeze(-2).unbind(0) for t in (rounded, rest))

    def segment(self, z: int, out: Tensor) -> Tensor:
        """From step j to step i of chunk z, zero where j > i, into `out` (B H,Q,Q)."""
        torch.sub(self._rows[z], self._columns[z], out=out)
        out.add_(self._row_rests[z]).sub_(self._column_rests[z])
        # the upper triangle would overflow in exp; it is masked only afterwards
        return out.clamp_(self._floor, -self._floor).exp_().tril_()


def decay_sums(log_a: Tensor) -> Tensor:
    """Sums of log decays from the start of a chunk on, finite where a is 0; (...,Q)."""
    return log_a.clamp(min=2 * decay_floor(log_a.dtype)).cumsum(-1)


def segment_of(sums: Tensor) -> Tensor:
    """As `Decays.segment`, differentiable: `decay_sums` (...,Q) -> (...,Q,Q)."""
    floor = decay_floor(sums.dtype)
    differences = sums.unsqueeze(-1) - sums.unsqueeze(-2)
    return differences.clamp(floor, -floor).exp().tril()


def grad_log_a(within: Tensor, start: Tensor, end: Tensor, carry: Tensor, batch: int) -> Tensor:
    """Gradient of log_a (B,T,H) from those of the log decays that span it.

    within (Z,B H,Q): d_i - d_j, summed over j for +i and over i for -j; start, end (Z,B H,Q): from
    the start to step i, from step j to the end; carry (Z,B H): the whole chunk.
    """
    # log_a_t is in the segment where j < t <= i, in the start's where i >= t, the end's where j < t
    until = (within + start).flip(-1).cumsum(-1).flip(-1)
    total = until + (end.cumsum(-1) - end) + carry.unsqueeze(-1)
    chunks, heads, length = total.shape
    total = total.view(chunks, batch, heads // batch, length).permute(1, 0, 3, 2)  # (B,Z,Q,H)
    return total.reshape(batch, chunks * length, -1)


class ChunkLoop(torch.autograd.Function):
    """One chunk after the other on a CPU, each recomputed in the backward pass.

    `function` maps v (I,Q,H,P), further inputs (I,Q,...) and the state (I,...) of I rows to y, like
    v, and the new state. It is differentiable, and its temporaries fit in a cache where `rows` and
    `length` are small. Kept are the inputs (B,T,...) and the state that enters each chunk.
    """

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., tuple[Tensor, Tensor]],
        length: int,
        rows: int,
        state: Tensor,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(inputs[0], memory_format=torch.contiguous_format)
        chunks = y.shape[1] // length
        states = state.new_empty(chunks + 1, *state.shape)
        states[0].copy_(state)
        for block in row_blocks(len(y), rows):
            for z in range(chunks):
                steps = slice(z * length, (z + 1) * length)
                parts = (t[block, steps] for t in inputs)
                y[block, steps], states[z + 1, block] = function(*parts, states[z, block])
        ctx.save_for_backward(states, *inputs)
        ctx.function, ctx.length, ctx.rows = function, length, rows
        return y, states[-1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        states, *inputs = ctx.saved_tensors
        grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
        grad_state = grad_state.clone()
        for block in row_blocks(len(grad_y), ctx.rows):
            carried = grad_state[block]
            for z in reversed(range(len(states) - 1)):
                steps = slice(z * ctx.length, (z + 1) * ctx.length)
                leaves = [t[block, steps].detach().requires_grad_() for t in inputs]
                leaves.append(states[z, block].detach().requires_grad_())
                with torch.enable_grad():
                    outputs = ctx.function(*leaves)
                *parts, carried = torch.autograd.grad(
                    outputs, leaves, (grad_y[block, steps], carried)
                )
                for grad, part in zip(grads, parts, strict=True):
                    grad[block, steps] = part
            grad_state[block] = carried
        return None, None, None, grad_state, *grads
