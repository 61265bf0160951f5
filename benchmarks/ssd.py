"""Chunked SSD against transformers' PyTorch path: forward + backward, one thread, same inputs.

    python benchmarks/ssd.py

Legend: B batch, T time, H heads, D head dim and state dim, Q chunk.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from rad.kernels import ssd_chunked

SHAPES = [(16, 128, 4, 32, 64), (8, 256, 8, 16, 32), (1, 1024, 4, 64, 64), (1, 2048, 4, 64, 64)]
REPEATS = 7


def seconds(step: Callable[[], None]) -> float:
    """Median CPU seconds of `step` after one warm-up."""
    step()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return statistics.median(times)


def ours(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int) -> None:
    """Forward and backward of this package's form."""
    y, _ = ssd_chunked(x * dt.unsqueeze(-1), a * dt, b, c, chunk=chunk)
    y.sum().backward()


def theirs(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, chunk: int) -> None:
    """Forward and backward of the peer."""
    y = mamba2_chunk_scan(x, dt, a, b, c, chunk_size=chunk)
    (y[0] if isinstance(y, tuple) else y).sum().backward()


def main() -> None:
    """Print one line per shape; a ratio above 1 means that ours is faster."""
    torch.set_num_threads(1)
    print(f"{'B, T, H, D, Q':>22} {'ours ms':>9} {'theirs ms':>10} {'ratio':>6}")
    for batch, length, heads, dim, chunk in SHAPES:
        torch.manual_seed(0)
        x, b, c = (torch.randn(batch, length, heads, dim, requires_grad=True) for _ in range(3))
        dt = torch.rand(batch, length, heads, requires_grad=True)
        a = -torch.rand(heads)

        inputs = (x, dt, a, b, c, chunk)
        mine, other = seconds(partial(ours, *inputs)), seconds(partial(theirs, *inputs))
        shape = f"{batch}, {length}, {heads}, {dim}, {chunk}"
        print(f"{shape:>22} {mine * 1e3:9.2f} {other * 1e3:10.2f} {other / mine:6.2f}")


if __name__ == "__main__":
    main()
