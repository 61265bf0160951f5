"""Chunked recurrences against named peers: forward and backward, one thread, the same inputs.

    python -m benchmarks.ops [--only ssd delta gla scan crossover] [--repeats 7]

CPU time, the median of repeats in which the functions take turns, in one process. A ratio above 1
means that ours is faster. Ours runs at its own default chunk; a peer that takes a chunk length runs
at its default and at the best of a search.

Legend: B batch, T time, H heads, G groups that share b and c, D channels and state size per head.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from rad.kernels.delta import gated_delta_chunked
from rad.kernels.gla import gla_chunked, gla_recurrent
from rad.kernels.scan import selective_scan_chunked, selective_scan_recurrent
from rad.kernels.ssd import ssd_chunked

CHUNKS = (16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Row:
    """One comparison; seconds."""

    op: str
    shape: str
    ours: float
    peer: str
    theirs: float

    @property
    def ratio(self) -> float:
        return self.theirs / self.ours


def medians(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median CPU seconds of each function after one warm-up; they take turns."""
    for function in functions:
        function()
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, seconds in zip(functions, times, strict=True):
            start = time.process_time()
            function()
            seconds.append(time.process_time() - start)
    return [statistics.median(seconds) for seconds in times]


def training(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], *args: object
) -> Callable[[], object]:
    """A call that runs `function` forward and backward, to the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    grad = torch.randn_like(function(*leaves, *args))
    return lambda: torch.autograd.grad(function(*leaves, *args), leaves, grad)


def with_chunks(
    op: str,
    shape: str,
    ours: Callable[[], object],
    peer: str,
    theirs: Callable[[int], Callable[[], object]],
    default: int,
    repeats: int,
) -> list[Row]:
    """Against the peer's default chunk, and against its best if that is another one."""
    mine, *others = medians([ours, *(theirs(chunk) for chunk in CHUNKS)], repeats)
    found = dict(zip(CHUNKS, others, strict=True))
    best = min(found, key=found.__getitem__)
    rows = [Row(op, shape, mine, f"{peer}, chunk {default} (default)", found[default])]
    if best != default:
        rows.append(Row(op, shape, mine, f"{peer}, chunk {best} (best)", found[best]))
    return rows


def ssd_rows(repeats: int) -> list[Row]:
    """SSD against transformers' Mamba-2 scan, both from x, dt, b and c on."""
    rows = []
    shapes = [(1, 2048, 8, 1, 64), (1, 1024, 4, 4, 64), (1, 1024, 4, 1, 64), (16, 128, 4, 4, 32)]
    for batch, length, heads, groups, dim in shapes:
        x = torch.randn(batch, length, heads, dim)
        b, c = (torch.randn(batch, length, groups, dim) for _ in range(2))
        dt, a = torch.rand(batch, length, heads), -torch.rand(heads)

        def ours(x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor = a) -> Tensor:
            return ssd_chunked(x * dt.unsqueeze(-1), a * dt, b, c)[0]

        def theirs(
            x: Tensor, dt: Tensor, b: Tensor, c: Tensor, chunk: int, a: Tensor = a
        ) -> Tensor:
            return mamba2_chunk_scan(x, dt, a, b, c, chunk_size=chunk)

        inputs = (x, dt, b, c)
        rows += with_chunks(
            "ssd",
            f"B={batch} T={length} H={heads} G={groups} D={dim}",
            training(ours, inputs),
            "mamba2_chunk_scan",
            lambda chunk, f=theirs, inputs=inputs: training(f, inputs, chunk),
            256,
            repeats,
        )
    return rows


def delta_rows(repeats: int) -> list[Row]:
    """The gated delta rule against transformers' Qwen3-Next; keys are normalised beforehand."""

    def ours(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, beta: Tensor) -> Tensor:
        return gated_delta_chunked(q * q.shape[-1] ** -0.5, k, v, log_a, beta)[0]

    def theirs(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, beta: Tensor, chunk: int) -> Tensor:
        return torch_chunk_gated_delta_rule(q, k, v, log_a, beta, chunk_size=chunk)[0]

    rows = []
    for batch, length, heads, dim in [(1, 2048, 8, 64), (1, 2048, 4, 64), (8, 256, 4, 32)]:
        q, k, v = (torch.randn(batch, length, heads, dim) for _ in range(3))
        log_a, beta = (torch.rand(batch, length, heads) for _ in range(2))
        inputs = (q, F.normalize(k, dim=-1), v, -0.3 * log_a, beta)
        rows += with_chunks(
            "gated_delta",
            f"B={batch} T={length} H={heads} D={dim}",
            training(ours, inputs),
            "torch_chunk_gated_delta_rule",
            lambda chunk, inputs=inputs: training(theirs, inputs, chunk),
            64,
            repeats,
        )
    return rows


def gla_rows(repeats: int) -> list[Row]:
    """Gated linear attention against its own plain recurrence: transformers has none."""

    def chunked(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return gla_chunked(q, k, v, F.logsigmoid(gate) / 16)[0]

    def recurrent(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return gla_recurrent(q, k, v, F.logsigmoid(gate) / 16)[0]

    rows = []
    for batch, length, heads, dim in [(1, 2048, 4, 64), (8, 256, 4, 32)]:
        inputs = [torch.randn(batch, length, heads, dim) for _ in range(4)]
        mine, other = medians([training(chunked, inputs), training(recurrent, inputs)], repeats)
        shape = f"B={batch} T={length} H={heads} D={dim}"
        rows.append(Row("gla", shape, mine, "gla_recurrent (ours, plain)", other))
    return rows


def scan_rows(repeats: int) -> list[Row]:
    """The selective scan against transformers' Mamba, and against its own plain recurrence.

    Both go from dt, b, c and the hidden states on. The peer is timed on short rows only: every step
    of its backward pass writes a zero gradient of all steps.
    """

    def scan(form: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> Tensor:
        """hidden, dt (B,E,T), b, c (B,N,T), a (E,N), the peer's layout."""
        hidden, dt, b, c = (t.transpose(1, 2).unsqueeze(2).contiguous() for t in inputs[:4])
        dt = dt.unsqueeze(-1)  # (B,T,1,E,1)
        update = dt * b.unsqueeze(-2) * hidden.unsqueeze(-1)  # (B,T,1,E,N)
        y, _ = form((dt * inputs[4]).exp(), update, c)
        return y.squeeze(2).transpose(1, 2)

    def peer(hidden: Tensor, dt: Tensor, b: Tensor, c: Tensor, a: Tensor) -> Tensor:
        return mamba_selective_scan(hidden, dt, a, b, c)

    ours, plain = partial(scan, selective_scan_chunked), partial(scan, selective_scan_recurrent)
    rows = []
    for batch, length, channels, size in [(1, 128, 256, 16), (1, 1024, 256, 16), (8, 256, 256, 16)]:
        hidden, dt = torch.randn(batch, channels, length), torch.rand(batch, channels, length)
        b, c = (torch.randn(batch, size, length) for _ in range(2))
        inputs = (hidden, dt, b, c, -torch.rand(channels, size))
        short = length == 128
        other = training(peer if short else plain, inputs)
        mine, others = medians([training(ours, inputs), other], repeats)
        name = "mamba_selective_scan" if short else "selective_scan_recurrent (ours, plain)"
        shape = f"B={batch} T={length} E={channels} N={size}"
        rows.append(Row("selective_scan", shape, mine, name, others))
    return rows


def crossover_rows(repeats: int) -> list[Row]:
    """SSD against causal scaled dot-product attention of the same heads and head dimension."""

    def ssd(c: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return ssd_chunked(x, log_a, b, c)[0]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    rows = []
    for length in (128, 256, 512, 1024, 2048):
        inputs = [torch.randn(1, length, 4, 64) for _ in range(3)]
        log_a = -torch.rand(1, length, 4)
        mine, other = medians([training(ssd, inputs), training(attention, inputs)], repeats)
        rows.append(Row("ssd", f"B=1 T={length} H=4 G=4 D=64", mine, "causal SDPA", other))
    return rows


def crossover(rows: Sequence[Row]) -> str:
    """The first length from which ours stays faster."""
    first = None
    for row in reversed(rows):
        if row.ratio < 1:
            break
        first = row.shape
    if first is None:
        return "SSD does not overtake causal SDPA at these lengths"
    return f"SSD overtakes causal SDPA, and stays ahead, from {first} on"


SECTIONS: dict[str, Callable[[int], list[Row]]] = {
    "ssd": ssd_rows,
    "delta": delta_rows,
    "gla": gla_rows,
    "scan": scan_rows,
    "crossover": crossover_rows,
}


def show(rows: Sequence[Row]) -> None:
    """Print one line per row."""
    for row in rows:
        print(
            f"{row.op:<15}{row.shape:<31}{row.ours * 1e3:>9.2f}  {row.peer:<47}"
            f"{row.theirs * 1e3:>9.2f}{row.ratio:>7.2f}",
            flush=True,
        )


def main() -> None:
    """Print the table of all chosen sections."""
    parser = argparse.ArgumentParser(description="chunked recurrences against named peers")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print("forward + backward, ms of CPU time, one thread")
    print(f"{'op':<15}{'shape':<31}{'ours':>9}  {'peer':<47}{'peer ms':>9}{'ratio':>7}")
    for name in args.only:
        rows = SECTIONS[name](args.repeats)
        show(rows)
        if name == "crossover":
            print(crossover(rows))


if __name__ == "__main__":
    main()
