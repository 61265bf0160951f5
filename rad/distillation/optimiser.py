"""What is trained, at which rate: trainable sets by name, parameter groups, AdamW."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from rad.distillation import schedules
from rad.distillation.schedules import rate
from rad.models.hybrid import HybridAttention
from rad.recipe_settings import StageSettings

__all__ = ["build", "learning_rates", "mixer_parameters", "rate", "set_rate", "set_trainable"]


def mixer_parameters(student: nn.Module) -> set[str]:
    """Names of the new parameters: mixers and the output projections of converted layers."""
    names = set()
    for prefix, module in student.named_modules():
        if isinstance(module, HybridAttention):
            for name, _ in module.named_parameters():
                if not name.startswith("softmax."):
                    names.add(f"{prefix}.{name}")
    return names


def matching(student: nn.Module, which: str | list[str]) -> set[str]:
    """Names of the parameters in a trainable set: `all`, `mixers`, `attention`, patterns.

    Raises `ValueError` naming a pattern that matches nothing.
    """
    names = [name for name, _ in student.named_parameters()]
    chosen: set[str] = set()
    for entry in which if isinstance(which, list) else [which]:
        if entry == "all":
            found = set(names)
        elif entry == "mixers":
            found = mixer_parameters(student)
        elif entry == "attention":
            found = {name for name in names if ".self_attn." in name}
        else:
            found = {name for name in names if fnmatchcase(name, entry)}
            if not found:
                raise ValueError(
                    f"trainable: no parameter matches {entry!r}; they are named like {names[-1]!r}"
                )
        chosen |= found
    return chosen


def set_trainable(student: nn.Module, stage: StageSettings) -> dict[str, nn.Parameter]:
    """Freeze what the stage does not train and return what it does, by name.

    Layer-wise stages reach what is inside their unit only: the new parameters, or all of the
    converted layers. Raises `ValueError` when nothing is left to train.
    """
    wanted = matching(student, stage.trainable)
    new = mixer_parameters(student)
    if stage.loss in ("align", "orientation"):
        if stage.loss == "align" and stage.unit == "layer":
            layers = tuple({name.split(".self_attn.")[0] + "." for name in new})
            wanted = {name for name in wanted if name.startswith(layers)}
        else:
            wanted &= new
    chosen = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in wanted)
        if name in wanted:
            chosen[name] = parameter
    if not chosen:
        why = "" if new else ": no layer of the student was converted"
        raise ValueError(f"stage {stage.title}: nothing to train{why}")
    return chosen


def build(student: nn.Module, stage: StageSettings) -> tuple[torch.optim.AdamW, list[str]]:
    """AdamW over the stage's parameters, and their names in optimiser order.

    The first of `groups` that matches a parameter decides its rate. Vectors (norms, biases, decay
    rates) get no weight decay unless the stage says so.
    """
    chosen = set_trainable(student, stage)
    new = mixer_parameters(student)
    sets = [matching(student, group.match) for group in stage.groups]
    groups: dict[tuple[str, bool], list[str]] = {}
    for name, parameter in chosen.items():
        title = next((str(i) for i, names in enumerate(sets) if name in names), "")
        title = title or ("new" if name in new else "kept")
        groups.setdefault((title, parameter.dim() >= 2), []).append(name)
    settings: list[dict[str, Any]] = []
    order: list[str] = []
    for (title, is_matrix), names in sorted(groups.items(), key=_order):
        peak, final, decay = _of_group(stage, title)
        settings.append(
            {
                "params": [chosen[name] for name in names],
                "title": _titles(stage).get(title, title),
                "peak": peak,
                "final": final,
                "weight_decay": decay if is_matrix or stage.decay_vectors else 0.0,
            }
        )
        order += names
    adamw = torch.optim.AdamW(settings, lr=0.0, betas=stage.betas, eps=stage.eps, fused=True)
    return adamw, order


def _order(item: tuple[tuple[str, bool], list[str]]) -> tuple[bool, str, bool]:
    # the new parameters come last: `set_rate` returns their rate
    (title, is_matrix), _ = item
    return title == "new", title, is_matrix


def _titles(stage: StageSettings) -> dict[str, str]:
    """What the curve calls each group."""
    titles = {"new": "mixers", "kept": "rest"}
    for index, group in enumerate(stage.groups):
        match = group.match if isinstance(group.match, str) else "+".join(group.match)
        titles[str(index)] = match
    return titles


def _of_group(stage: StageSettings, title: str) -> tuple[float, float, float]:
    """(peak rate, final rate, weight decay) of a group."""
    decay = stage.weight_decay
    if title in ("new", "kept"):
        own = stage.mixer_learning_rate if title == "new" else None
        peak, final = own or stage.learning_rate, stage.final_learning_rate
    else:
        group = stage.groups[int(title)]
        peak, final = group.learning_rate, group.final_learning_rate
        decay = stage.weight_decay if group.weight_decay is None else group.weight_decay
    return peak, stage.final_fraction * peak if final is None else final, decay


def set_rate(
    optimiser: torch.optim.Optimizer, stage: StageSettings, step: int, steps: int
) -> float:
    """Apply the schedule to every group; returns the rate of the last (new mixers')."""
    value = 0.0
    for group in optimiser.param_groups:
        value = schedules.rate(stage, step, steps, group["peak"], group["final"])
        group["lr"] = value
    return value


def learning_rates(optimiser: torch.optim.Optimizer) -> dict[str, float]:
    """Group title -> its rate at the moment."""
    return {group["title"]: float(group["lr"]) for group in optimiser.param_groups}
