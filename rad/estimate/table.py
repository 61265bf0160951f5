"""An estimate as text and as JSON: one line per job, sums per stage, what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rad.estimate.hardware import GIB
from rad.estimate.jobs import Job
from rad.estimate.study import STAGES, Estimate

PARTS = ("weights", "gradients", "optimiser", "activations", "logits", "teacher")
HEADINGS = ("job", "tokens", "FLOPs", "GPU-h", "USD", "peak", *PARTS, "disk", "scratch", "")


def text(estimate: Estimate) -> str:
    """The whole table; memory and disk in GiB, memory per GPU."""
    hardware = estimate.hardware
    bf16, fp32 = hardware.gpu.bfloat16 / 1e12, hardware.gpu.float32 / 1e12
    lines = [
        f"{estimate.study.folder}: {len(estimate.study.run_table)} runs on {hardware.count} x "
        f"{hardware.gpu.title} ({hardware.gpu.memory / GIB:.1f} GiB each)",
        f"rate: {hardware.mfu:.0%} of {bf16:,.0f} TFLOP/s in bfloat16, of {fp32:,.0f} in float32; "
        f"{hardware.price:g} USD per GPU-hour; memory and disk in GiB, memory per GPU",
        "placements are taken evenly spaced; base and teacher are counted under `teacher`",
    ]
    for stage in STAGES:
        jobs = [job for job in estimate.jobs if job.stage == stage]
        if jobs:
            rows = [_row(job, hardware.price) for job in jobs]
            rows.append(_row(_sum(stage, jobs), hardware.price))
            lines += ["", f"{stage}", *_columns([list(HEADINGS), *rows])]
    total = _sum("all stages", estimate.jobs)
    hours, cost = total.gpu_hours, total.gpu_hours * hardware.price
    state = max((job.scratch for job in estimate.jobs), default=0.0)
    lines += [
        "",
        f"in all: {_short(total.tokens)} tokens, {total.flops:.3g} FLOPs, {_short(hours)} "
        f"GPU-hours, {_short(cost)} USD, {_gib(total.disk)} GiB of results, {_gib(state)} GiB for "
        "the largest state",
    ]
    host = max((job.host for job in estimate.jobs), default=0.0)
    if host:
        lines.append(
            f"a job on {hardware.count} GPUs loads at most {_gib(host)} GiB to the machine's own "
            "memory"
        )
    return "\n".join([*lines, *refusals(estimate)])


def refusals(estimate: Estimate) -> list[str]:
    """One line per job that does not fit."""
    room = estimate.hardware.gpu.memory / GIB
    lines = []
    for job in estimate.refused:
        assert job.memory is not None
        need = job.memory.total / GIB
        remedy = (
            f"it would with {job.remedy}"
            if job.remedy
            else (f"no setting helps: it needs a GPU of {need:.0f} GiB")
        )
        lines.append(
            f"does not fit: {job.stage} {job.name}: {need:.1f} GiB at {job.memory.phase}, the GPU "
            f"has {room:.1f}; {remedy}"
        )
    return lines


def as_dict(estimate: Estimate) -> dict[str, Any]:
    """The content of the JSON file."""
    hardware = estimate.hardware
    return {
        "schema": 1,
        "study": estimate.study.folder,
        "hardware": {**asdict(hardware.gpu), "count": hardware.count},
        "mfu": hardware.mfu,
        "price": hardware.price,
        "jobs": [_job(job, hardware.price) for job in estimate.jobs],
        "stages": {
            stage: _totals([job for job in estimate.jobs if job.stage == stage], hardware.price)
            for stage in STAGES
        },
        "total": _totals(estimate.jobs, hardware.price),
        "refused": refusals(estimate),
    }


def _job(job: Job, price: float) -> dict[str, Any]:
    memory = None
    if job.memory is not None:
        memory = {**job.memory.parts(), "total": job.memory.total, "phase": job.memory.phase}
    return {
        **{key: value for key, value in vars(job).items() if key != "memory"},
        "cost": job.gpu_hours * price,
        "memory": memory,
    }


def _totals(jobs: Sequence[Job], price: float) -> dict[str, float]:
    total = _sum("", jobs)
    return {
        "tokens": total.tokens,
        "flops": total.flops,
        "gpu_hours": total.gpu_hours,
        "cost": total.gpu_hours * price,
        "disk": total.disk,
        "peak_memory": max((job.memory.total for job in jobs if job.memory), default=0.0),
    }


def _sum(name: str, jobs: Sequence[Job]) -> Job:
    total = Job("", f"= {name}")
    for job in jobs:
        total.tokens += job.tokens
        total.flops += job.flops
        total.gpu_hours += job.gpu_hours
        total.disk += job.disk
    return total


def _row(job: Job, price: float) -> list[str]:
    memory = job.memory
    parts = [""] * (1 + len(PARTS))
    if memory is not None:
        parts = [_gib(memory.total), *(_gib(getattr(memory, part)) for part in PARTS)]
    return [
        job.name,
        _short(job.tokens),
        f"{job.flops:.2e}" if job.flops else "-",
        _short(job.gpu_hours),
        _short(job.gpu_hours * price),
        *parts,
        _gib(job.disk),
        _gib(job.scratch),
        "" if job.fits else "DOES NOT FIT",
    ]


def _gib(value: float) -> str:
    """Of GiB, with three digits where there are few."""
    size = value / GIB
    if not value:
        return "-"
    return f"{size:,.1f}" if size >= 1 else f"{size:.2g}" if size >= 1e-4 else "<0.0001"


def _short(value: float) -> str:
    if not value:
        return "-"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e4)):
        if value >= size:
            return f"{value / (1e3 if unit == 'k' else size):,.1f}{unit}"
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
