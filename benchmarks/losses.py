"""Chunked KL from hidden states against full logits and `kl_div`: time and peak memory.

    python -m benchmarks.losses

Vocabulary 32,000, hidden size 256, 2,048 tokens, float32, one thread, forward and backward to the
student's hidden states (head frozen) and to its head as well (trained). The plain form builds both
models' logits, as a Hugging Face model returns them, and calls `kl_div`. Runs take turns in one
process for the times; each memory figure is the growth of the resident set, from inputs to peak,
in a process of its own.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rad.distillation.losses import distillation_loss
from rad.distillation.targets import LogitHead, Targets

VOCABULARY, HIDDEN, ROWS, LENGTH, REPEATS = 32_000, 256, 4, 512, 7
Step = Callable[[], Tensor]


def steps(trained: bool) -> dict[str, Step]:
    """`plain` and `chunked`: one forward and backward pass, returning the loss."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    student, teacher = normal(ROWS, LENGTH, HIDDEN).requires_grad_(), normal(ROWS, LENGTH, HIDDEN)
    head = (normal(VOCABULARY, HIDDEN) / 16).requires_grad_(trained)
    teacher_head = normal(VOCABULARY, HIDDEN) / 16
    weight = torch.ones(ROWS, LENGTH)
    targets = Targets("hidden", hidden=teacher, head=LogitHead(teacher_head))

    def plain() -> Tensor:
        with torch.no_grad():
            target = F.linear(teacher, teacher_head)[:, :-1].flatten(0, 1).log_softmax(-1)
        logits = F.linear(student, head)[:, :-1].flatten(0, 1).log_softmax(-1)
        return F.kl_div(logits, target, log_target=True, reduction="batchmean")

    def chunked() -> Tensor:
        return distillation_loss(student, LogitHead(head), targets, weight)

    def step(loss: Step) -> Step:
        def run() -> Tensor:
            student.grad = head.grad = None
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            return value.detach()

        return run

    return {"plain": step(plain), "chunked": step(chunked)}


def memory_mib(entry: str) -> float:
    """`VmRSS` (resident now) or `VmHWM` (its peak) of this process.

    Not getrusage: the peak that it reports is inherited from the parent process.
    """
    with open("/proc/self/status", encoding="ascii") as stream:
        lines = dict(line.split(":", 1) for line in stream)
    return int(lines[entry].split()[0]) / 1024  # from KiB


def growth_mib(name: str, trained: bool) -> float:
    """Peak memory of one step above that of its inputs, in this process, which must be fresh."""
    run = steps(trained)[name]
    before = memory_mib("VmRSS")
    run()
    return memory_mib("VmHWM") - before


def measure(trained: bool) -> dict[str, dict[str, float]]:
    """Seconds (median of turns), MiB and value of both forms."""
    runs = steps(trained)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    values: dict[str, float] = {}
    for turn in range(REPEATS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            values[name] = run().item()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    table = {}
    for name in runs:
        command = [sys.executable, "-m", "benchmarks.losses", "--memory", name]
        output = subprocess.run(
            command + (["--trained"] if trained else []), check=True, capture_output=True, text=True
        )
        table[name] = {
            "seconds": statistics.median(seconds[name]),
            "mib": float(json.loads(output.stdout)),
            "value": values[name],
        }
    return table


def main() -> None:
    """Print a table, or with `--memory` one figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--memory", choices=("plain", "chunked"), help=argparse.SUPPRESS)
    parser.add_argument("--trained", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        print(json.dumps(growth_mib(arguments.memory, arguments.trained)))
        return
    print(f"{'head':8} {'form':8} {'seconds':>8} {'MiB':>7} {'time':>6} {'memory':>7} {'loss':>10}")
    for trained in (False, True):
        table = measure(trained)
        plain = table["plain"]
        for name, row in table.items():
            time_ratio, memory = row["seconds"] / plain["seconds"], row["mib"] / plain["mib"]
            print(
                f"{'trained' if trained else 'frozen':8} {name:8} {row['seconds']:8.3f} "
                f"{row['mib']:7.0f} {time_ratio:5.2f}x {memory:6.2f}x {row['value']:10.6f}"
            )


if __name__ == "__main__":
    main()
