"""Resumable training state: safetensors and JSON, written to a temporary name and renamed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def save_state(
    folder: Path, model: Any, optimizer: torch.optim.Optimizer, record: dict[str, Any]
) -> None:
    """Write model, optimiser moments and `record` as one folder that appears at once."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    names = [name for name, _ in model.named_parameters()]
    save_file(
        {n: p.detach().contiguous() for n, p in model.named_parameters()},
        fresh / "model.safetensors",
    )
    moments: dict[str, torch.Tensor] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            moments[f"{names[index]}|{key}"] = torch.as_tensor(value).clone().contiguous()
    save_file(moments, fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The saved record, or None; a save interrupted between its two renames is completed."""
    old, fresh = (folder.with_name(folder.name + end) for end in (".old", ".new"))
    if not folder.exists() and old.exists():
        (fresh if (fresh / "state.json").exists() else old).rename(folder)
    path = folder / "state.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def load_state(folder: Path, model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Put saved parameters and optimiser moments back."""
    saved = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])
    names = [name for name, _ in model.named_parameters()]
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(folder / "optimizer.safetensors").items():
        name, _, what = key.rpartition("|")
        state.setdefault(names.index(name), {})[what] = value
    whole = optimizer.state_dict()
    whole["state"] = state
    optimizer.load_state_dict(whole)
