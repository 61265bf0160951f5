"""What is trained, at which rate: parameter groups and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from rad.models.hybrid import HybridAttention
from rad.settings import StageSettings


def mixer_parameters(student: nn.Module) -> set[str]:
    """Names of the new parameters: mixers and the output projections of converted layers."""
    names = set()
    for prefix, module in student.named_modules():
        if isinstance(module, HybridAttention):
            for name, _ in module.named_parameters():
                if not name.startswith("softmax."):
                    names.add(f"{prefix}.{name}")
    return names


def set_trainable(student: nn.Module, stage: StageSettings) -> dict[str, nn.Parameter]:
    """Freeze what the stage does not train and return what it does, by name.

    Raises `ValueError` when nothing is left to train.
    """
    new = mixer_parameters(student)
    chosen = {}
    for name, parameter in student.named_parameters():
        wanted = stage.trainable == "all" or name in new
        if stage.loss == "align":
            wanted = wanted and name in new
        parameter.requires_grad_(wanted)
        if wanted:
            chosen[name] = parameter
    if not chosen:
        raise ValueError("nothing to train: no layer of the student was converted")
    return chosen


def build(student: nn.Module, stage: StageSettings) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW over the stage's parameters, and their names in optimiser order.

    Vectors (norms, biases, decays) get no weight decay; new mixers may have a rate of their own.
    """
    chosen = set_trainable(student, stage)
    new = mixer_parameters(student)
    groups: dict[tuple[bool, bool], list[str]] = {}
    for name, parameter in chosen.items():
        groups.setdefault((name in new, parameter.dim() >= 2), []).append(name)
    settings: list[dict[str, Any]] = []
    order: list[str] = []
    for (is_new, is_matrix), names in sorted(groups.items()):
        own = stage.mixer_learning_rate if is_new else None
        settings.append(
            {
                "params": [chosen[name] for name in names],
                "peak": own or stage.learning_rate,
                "weight_decay": stage.weight_decay if is_matrix else 0.0,
            }
        )
        order += names
    return torch.optim.AdamW(settings, lr=0.0, betas=stage.betas, fused=True), order


def rate(stage: StageSettings, step: int, steps: int) -> float:
    """Learning rate of a step (counted from 0) as a share of the peak."""
    warmup = math.ceil(stage.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, steps - warmup)
    if stage.schedule == "wsd":
        # warm-up, stable, then linear decay over the last tenth
        fall = max(0.0, (progress - 0.9) / 0.1)
        return 1.0 - (1.0 - stage.final_fraction) * fall
    return (
        stage.final_fraction + (1 - stage.final_fraction) * (1 + math.cos(math.pi * progress)) / 2
    )


def set_rate(
    optimiser: torch.optim.Optimizer, stage: StageSettings, step: int, steps: int
) -> float:
    """Apply the schedule to every group; returns the rate of the last (new mixers')."""
    share = rate(stage, step, steps)
    value = 0.0
    for group in optimiser.param_groups:
        value = group["peak"] * share
        group["lr"] = value
    return value
