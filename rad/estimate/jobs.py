"""What jobs of an estimate are made of: hardware, a job's record, and finding what would fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rad.estimate.hardware import GPU, GPUS, PRICES
from rad.estimate.memory import Memory, Step, peak


@dataclass(frozen=True)
class Hardware:
    """What the study is to run on, and how well it is used: `mfu` is a share of the peak rate."""

    gpu: GPU
    count: int = 1
    mfu: float = 0.4
    price: float = 0.0

    @classmethod
    def named(cls, gpu: str, count: int, mfu: float, price: float | None) -> Hardware:
        """Of a known GPU; raises `ValueError` on another, and on shares out of range."""
        if gpu not in GPUS:
            raise ValueError(f"--gpu {gpu}: known are {', '.join(GPUS)}")
        if count < 1 or not 0 < mfu <= 1 or (price is not None and price < 0):
            raise ValueError(
                "--count is at least 1, --mfu above 0 and at most 1, --price not below 0"
            )
        return cls(GPUS[gpu], count, mfu, PRICES[gpu] if price is None else price)

    def hours(self, work: float, bfloat16: bool) -> float:
        """GPU-hours of `work` FLOPs."""
        return work / (self.gpu.rate(bfloat16) * self.mfu) / 3600

    def reading(self, size: float) -> float:
        """GPU-hours of reading `size` bytes of the GPU's memory, at the same share of its peak."""
        return size / (self.gpu.bandwidth * self.mfu) / 3600


@dataclass
class Job:
    """One job: tokens that pass a model, FLOPs, memory of its worst moment, disk in bytes.

    `disk` stays, `scratch` is needed while the job runs, `host` is what the processes of a job on
    several GPUs load to the machine's own memory. `remedy` says what would make it fit.
    """

    stage: str
    name: str
    tokens: float = 0.0
    flops: float = 0.0
    gpu_hours: float = 0.0
    gpus: int = 1
    memory: Memory | None = None
    disk: float = 0.0
    scratch: float = 0.0
    host: float = 0.0
    users: list[str] = field(default_factory=list)
    fits: bool = True
    remedy: str = ""


@dataclass(frozen=True)
class Choice:
    """What may be changed to make a job fit; `said` names the settings in words."""

    checkpointing: bool
    stored: bool
    rows: int
    dtype: str
    count: int
    said: tuple[str, ...] = ()


def place(
    job: Job,
    room: float,
    start: Choice,
    choices: Iterable[Choice],
    memory: Callable[[Choice], Memory | Step],
) -> Choice:
    """Fill in the job's memory, whether it fits into `room` bytes, and what would: also returned.

    `start` when it fits or nothing helps.
    """

    def of(choice: Choice) -> Memory:
        found = memory(choice)
        return peak(found) if isinstance(found, Step) else found

    job.memory = of(start)
    job.fits = job.memory.total <= room
    if job.fits:
        return start
    for choice in choices:
        if of(choice).total <= room:
            job.remedy = " and ".join(choice.said)
            return choice
    return start


def halves(rows: int) -> list[int]:
    """rows / 2, rows / 4, ... down to 1."""
    found = []
    while rows > 1:
        rows = math.floor(rows / 2)
        found.append(rows)
    return found
