"""The resumable state of a training job: weights, optimiser, position, records, and whose it is.

One folder per save, written under a temporary name and renamed, the last two kept; safetensors and
JSON. A resumed job continues bit for bit, because data order and learning rate are functions of the
step. A state with another digest belongs to another spec and is refused.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rad.files import read_json, write_json

KEPT = 2
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


class StateError(ValueError):
    """A state that cannot be used; the message names the folder and the remedy."""


def save(
    folder: Path,
    student: nn.Module,
    optimiser: torch.optim.Optimizer | None,
    names: list[str],
    meta: dict[str, Any],
) -> Path:
    """Write one state; `meta` must hold `digest`, `stage` and `step`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {
        f"model.{name}": tensor.detach() for name, tensor in _own(student).items()
    }
    if optimiser is not None:
        for name, parameter in _named(optimiser, names):
            for moment, value in optimiser.state[parameter].items():
                tensors[f"optimiser.{name}.{moment}"] = torch.as_tensor(value)
    tensors["rng"] = torch.get_rng_state()
    temporary = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, temporary / "tensors.safetensors"
        )
        write_json(temporary / "meta.json", meta)
        final = folder / f"stage{meta['stage']:02d}-step{meta['step']:09d}"
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _saved(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def latest(folder: Path, digest: str) -> dict[str, Any] | None:
    """The newest state's meta with its `path`, or None; raises `StateError` on a foreign one."""
    found = _saved(folder)
    if not found:
        return None
    path = found[-1]
    try:
        meta: dict[str, Any] = read_json(path / "meta.json")
    except ValueError as error:
        raise StateError(f"{path}: unreadable state ({error}); delete the folder") from error
    if meta.get("digest") != digest:
        raise StateError(
            f"{folder}: the saved state belongs to another specification "
            f"({str(meta.get('digest'))[:12]}, this job is {digest[:12]}); "
            "delete the folder to start anew"
        )
    return {**meta, "path": path}


def restore(
    path: Path, student: nn.Module, optimiser: torch.optim.Optimizer | None, names: list[str]
) -> None:
    """Load tensors into student and optimiser; raises `StateError` when they do not fit."""
    try:
        tensors = load_file(str(path / "tensors.safetensors"))
        own = _own(student)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[f"model.{name}"])
        if optimiser is not None:
            for name, parameter in _named(optimiser, names):
                optimiser.state[parameter] = {
                    moment: tensors[f"optimiser.{name}.{moment}"] for moment in MOMENTS
                }
        torch.set_rng_state(tensors["rng"])
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise StateError(f"{path}: corrupt state ({error}); delete the folder") from error


def discard(folder: Path) -> None:
    """Remove the state of a finished job."""
    shutil.rmtree(folder, ignore_errors=True)


def _own(student: nn.Module) -> dict[str, Tensor]:
    # named_parameters names a tied weight once, which is what safetensors needs
    return {name: parameter.data for name, parameter in student.named_parameters()}


def _named(
    optimiser: torch.optim.Optimizer, names: list[str]
) -> list[tuple[str, torch.nn.Parameter]]:
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    return list(zip(names, parameters, strict=True))


def _saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("stage*-step*")) if folder.is_dir() else []
