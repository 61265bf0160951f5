"""What the chunked forms share: chunk lengths, decays within a chunk, blocks that fit in a cache.

Legend: B batch, T time, H heads, Z chunks, Q chunk length (T = Z Q after padding).
"""

from __future__ import annotations

from collections.abc import Iterator

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
        floor = decay_floor(log_a.dtype)
        batch, time, heads = log_a.shape
        self._floor = floor
        sums = log_a.view(batch, time // length, length, heads).permute(1, 0, 3, 2)
        sums = sums.reshape(-1, batch * heads, length).cumsum(-1)  # (Z,B H,Q)
        from_start = sums.clamp(min=floor).exp_()
        self.from_start = from_start.unsqueeze(-1).unbind(0)  # (B H,Q,1), step i included
        to_end = (sums[..., -1:] - sums).clamp_(min=floor).exp_()
        self.to_end = to_end.unsqueeze(-1).unbind(0)  # (B H,Q,1), step j excluded
        self.carry = from_start[..., -1:, None].unbind(0)  # (B H,1,1), the whole chunk
        self._rows = sums.unsqueeze(-1).unbind(0)
        self._columns = sums.unsqueeze(-2).unbind(0)

    def segment(self, z: int, out: Tensor) -> Tensor:
        """From step j to step i of chunk z, zero where j > i, into `out` (B H,Q,Q)."""
        torch.sub(self._rows[z], self._columns[z], out=out)
        # zero before exp, where the upper triangle would overflow; again after it, as the mask
        return out.tril_().clamp_(min=self._floor).exp_().tril_()


def segment_of(sums: Tensor) -> Tensor:
    """As `Decays.segment`, differentiable: cumulated log decays (...,Q) -> (...,Q,Q)."""
    differences = (sums.unsqueeze(-1) - sums.unsqueeze(-2)).tril()
    return differences.clamp(min=decay_floor(sums.dtype)).exp().tril()


def grad_log_a(
    within: Tensor, start: Tensor, end: Tensor, carry: Tensor, batch: int
) -> Tensor:
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
