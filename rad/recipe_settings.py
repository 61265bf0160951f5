"""Settings of distillation: stages, the recipes they make up, and stage-1 alignment.

Part of `rad.settings`, which re-exports everything here. No torch, no transformers. A recipe is
written out in a study, or starts from one that ships with the package (`rad/recipes/*.yaml`):

    recipes: {kl: {use: kl_guided, tokens: 200000, override: {all: {batch_size: 16}}}}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from rad.mixer_settings import Initialisation, Settings

TRAINABLE_SETS = ("all", "mixers", "attention")


def _check_sets(value: Any) -> Any:
    """A set's name, a pattern with `*`, `?` or `[`, or a list of them."""
    for name in value if isinstance(value, list) else [value]:
        if name not in TRAINABLE_SETS and not any(sign in str(name) for sign in "*?["):
            raise ValueError(
                f"unknown set of parameters {name!r}: {', '.join(TRAINABLE_SETS)}, or a pattern of "
                "parameter names such as '*.mlp.*'"
            )
    if value == []:
        raise ValueError("an empty list trains nothing; leave the stage out instead")
    return value


class GroupSettings(Settings):
    """Parameters with a learning rate of their own; the first group that matches wins."""

    match: str | list[str] = Field(
        description="`mixers`, `attention`, `all`, or patterns of parameter names"
    )
    learning_rate: float = Field(gt=0, description="peak")
    final_learning_rate: float | None = Field(
        None, ge=0, description="last rate; default: `final_fraction` of the peak"
    )
    weight_decay: float | None = Field(None, ge=0, description="default: the stage's")

    _known = field_validator("match")(_check_sets)


class StageSettings(Settings):
    name: str = Field("", description="title in the curve, key in `override`; default: its loss")
    loss: Literal["kl", "align", "orientation", "ce"] = Field(
        "kl",
        description="`kl`: divergence from the teacher's next-token distribution; `align`: every "
        "layer's output, on the base's own input; `orientation`: every layer's T x T mixing matrix "
        "(mamba2 and discrete_mamba2); `ce`: next-token cross entropy without a teacher",
    )
    trainable: str | list[str] = Field(
        "all",
        description="`all` parameters, only the new `mixers` (with their output projections), "
        "`attention` (every layer's, kept or new), patterns of parameter names, or a list",
    )
    tokens: int = Field(gt=0, description="tokens of this stage")
    batch_size: int = Field(16, gt=0, description="rows per step")
    accumulate: int = Field(
        1, ge=1, description="micro-batches that a step's rows are processed in, to save memory"
    )
    context: int | None = Field(
        None,
        ge=2,
        description="longest sequence; longer rows of the corpus are cut into pieces of this size",
    )
    learning_rate: float = Field(1e-3, gt=0, description="peak")
    mixer_learning_rate: float | None = Field(
        None, gt=0, description="peak of new mixers; default: the same"
    )
    groups: list[GroupSettings] = Field(
        default_factory=list, description="parameters with rates of their own"
    )
    schedule: Literal["cosine", "constant", "wsd", "stable_cosine_stable"] = Field(
        "cosine",
        description="after the warm-up: `cosine` falls to the final rate, `wsd` is stable and "
        "falls linearly over the last `decay_fraction`, `stable_cosine_stable` falls between "
        "`decay_from` and `decay_to`",
    )
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="linear warm-up, share of steps")
    warmup_steps: int | None = Field(
        None, ge=0, description="instead of `warmup_fraction`; shrinks with scaled tokens"
    )
    final_fraction: float = Field(0.05, ge=0, le=1, description="last rate as a share of the peak")
    final_learning_rate: float | None = Field(
        None, ge=0, description="last rate, instead of `final_fraction`"
    )
    decay_fraction: float = Field(0.1, gt=0, le=1, description="of `wsd`: share of all steps")
    decay_from: float = Field(
        0.833, ge=0, le=1, description="of `stable_cosine_stable`: share of all steps"
    )
    decay_to: float = Field(
        0.875, ge=0, le=1, description="of `stable_cosine_stable`: share of all steps"
    )
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW")
    eps: float = Field(1e-8, gt=0, description="of AdamW")
    weight_decay: float = Field(0.01, ge=0, description="of AdamW")
    decay_vectors: bool = Field(
        False, description="weight decay of norms, biases and decay rates too"
    )
    clip: float | None = Field(1.0, gt=0, description="gradient norm limit; null: none")
    divergence: Literal["forward_kl", "reverse_kl", "jsd", "ce_teacher"] = Field(
        "forward_kl",
        description="of `kl`: `ce_teacher` is the cross entropy under the teacher, which has the "
        "gradient of `forward_kl`",
    )
    temperature: float = Field(1.0, gt=0, description="softening of both distributions in `kl`")
    kl_weight: float = Field(1.0, ge=0, description="weight of the divergence in `kl`")
    ce_weight: float = Field(0.0, ge=0, description="weight of next-token cross entropy in `kl`")
    distance: Literal["root_width", "squared", "relative"] = Field(
        "root_width",
        description="of `align`, mean over tokens: `root_width` |t-s| / sqrt(E), `squared` "
        "|t-s|^2, `relative` |t-s|^2 / |t|^2",
    )
    unit: Literal["mixer", "layer"] = Field(
        "mixer",
        description="of `align`: the output of attention or of the whole layer with its MLP",
    )

    _known = field_validator("trainable")(_check_sets)

    @model_validator(mode="after")
    def _consistent(self) -> StageSettings:
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.accumulate} "
                "micro-batches (accumulate)"
            )
        if self.schedule == "stable_cosine_stable" and self.decay_from >= self.decay_to:
            raise ValueError("decay_from must be below decay_to")
        if self.loss == "kl" and self.kl_weight == 0 and self.ce_weight == 0:
            raise ValueError("kl_weight and ce_weight are both 0: nothing to learn")
        return self

    @property
    def title(self) -> str:
        """What the curve calls this stage."""
        return self.name or self.loss

    def steps(self, context: int) -> int:
        """Optimiser steps on sequences of `context` tokens; raises `ValueError` below one."""
        per_step = self.batch_size * context
        if self.tokens < per_step:
            raise ValueError(
                f"stage {self.title}: {self.tokens} tokens are less than one step of "
                f"{self.batch_size} rows x {context} tokens; raise tokens or lower batch_size"
            )
        return self.tokens // per_step


class RecipeSettings(Settings):
    use: str | None = Field(None, description="a shipped recipe to start from, without `stages`")
    origin: str | None = Field(None, description="filled in: the shipped recipe that was used")
    skip: list[str] = Field(default_factory=list, description="names of stages to leave out")
    override: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="stage name or `all` -> keys of that stage to change"
    )
    tokens: int | None = Field(
        None, gt=0, description="tokens of all stages together; each is scaled in proportion"
    )
    stages: list[StageSettings] = Field(
        default_factory=list, description="run in order; an empty list is no training"
    )
    log_points: int = Field(
        24, ge=1, description="held-out evaluations along each stage (points of the curve)"
    )
    log_tokens: list[int] = Field(
        default_factory=list, description="further points of the curve, in tokens since the start"
    )
    save_every_seconds: float = Field(
        60.0, gt=0, description="wall time between checkpoints of the resumable state"
    )
    keep: Literal["last", "best", "both"] = Field(
        "last",
        description="weights written as model/: the last, or those with the lowest held-out KL; "
        "`both`: the last there, the others in best/",
    )
    autocast: bool = Field(
        False, description="bfloat16 arithmetic where the hardware has it; weights keep their dtype"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass, to save memory"
    )
    compile: bool = Field(False, description="torch.compile of every layer")

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, value: Any) -> Any:
        """Write out `use`, `skip`, `override` and `tokens`, so that a specification is complete."""
        return resolve(value) if isinstance(value, Mapping) else value


class AlignmentSettings(Settings):
    """Stage 1: every layer's mixer learns its attention layer's output, teacher-forced."""

    corpus: str = Field("distil", description="a key of `corpora`")
    tokens: int = Field(gt=0)
    batch_size: int = Field(16, gt=0, description="rows per step")
    accumulate: int = Field(1, ge=1, description="micro-batches of a step, as in a stage")
    context: int | None = Field(None, ge=2, description="longest sequence, as in a stage")
    learning_rate: float = Field(1e-3, gt=0)
    schedule: Literal["cosine", "constant", "wsd", "stable_cosine_stable"] = "cosine"
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="linear warm-up, share of steps")
    final_fraction: float = Field(0.05, ge=0, le=1, description="last rate as a share of the peak")
    decay_vectors: bool = Field(False, description="weight decay of biases and decay rates too")
    distance: Literal["root_width", "squared", "relative"] = Field(
        "root_width", description="as in a stage"
    )
    unit: Literal["mixer", "layer"] = Field("mixer", description="as in a stage")
    initialisation: Initialisation = Field("qkvo", description="start of the mixers")
    autocast: bool = Field(False, description="as in a recipe")
    seed: int = 0

    @model_validator(mode="after")
    def _is_a_stage(self) -> AlignmentSettings:
        self.stage()  # whatever a stage refuses is refused when the study is read
        return self

    def stage(self) -> StageSettings:
        """The stage that this is."""
        shared = self.model_dump(exclude={"corpus", "initialisation", "autocast", "seed"})
        return StageSettings(loss="align", trainable="mixers", **shared)


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in (files("rad") / "recipes").iterdir()
        if entry.name.endswith(".yaml")
    )


def shipped(name: str) -> dict[str, Any]:
    """The content of a shipped recipe; raises `ValueError` when there is none of this name."""
    if name not in recipe_names():
        raise ValueError(f"use: no shipped recipe {name!r}; there are {', '.join(recipe_names())}")
    text = (files("rad") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def resolve(value: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe with its `use`, `skip`, `override` and `tokens` carried out; idempotent.

    Raises `ValueError` on an unknown recipe or stage name, and on `use` together with `stages`.
    """
    recipe = dict(value)
    name = recipe.pop("use", None)
    if name is not None:
        if recipe.get("stages"):
            raise ValueError(
                f"use: {name} together with stages; leave one out (an overlay of a study whose "
                "recipe has stages says `stages: null`)"
            )
        recipe.pop("stages", None)
        recipe = {**shipped(name), **recipe, "origin": name}
    stages = [
        entry.model_dump(mode="json") if isinstance(entry, StageSettings) else entry
        for entry in recipe.get("stages") or []
    ]
    if not all(isinstance(stage, Mapping) for stage in stages):
        return recipe  # the validation of `stages` says what is wrong
    stages = [dict(stage) for stage in stages]
    names = [stage.get("name") or stage.get("loss", "kl") for stage in stages]
    skip, override = recipe.pop("skip", None) or [], recipe.pop("override", None) or {}
    for key in [*skip, *override]:
        if key not in names and key != "all":
            known = ", ".join(names) or "none"
            raise ValueError(f"no stage {key!r} in this recipe; it has {known}")
    for stage, name in zip(stages, names, strict=True):
        stage |= {**override.get("all", {}), **override.get(name, {})}
    stages = [stage for stage, name in zip(stages, names, strict=True) if name not in skip]
    total = recipe.pop("tokens", None)
    recipe["stages"] = stages if total is None else _scaled(stages, total)
    return recipe


def _scaled(stages: list[dict[str, Any]], total: int) -> list[dict[str, Any]]:
    """The stages with `total` tokens in all, shared as before; warm-ups shrink along."""
    before = sum(stage.get("tokens", 0) for stage in stages)
    if not before:
        raise ValueError("tokens: there are no stages to share them")
    factor = total / before
    for stage in stages:
        stage["tokens"] = max(1, round(stage.get("tokens", 0) * factor))
        if stage.get("warmup_steps"):
            stage["warmup_steps"] = math.ceil(stage["warmup_steps"] * min(1.0, factor))
    return stages
