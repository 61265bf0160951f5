"""The settings that a study is made of: one pydantic model per thing that can be configured.

Every key has a description and a default here and nowhere else; the JSON schema and the key table
in `config/README.md` are generated from these models (`rad schema`). No torch, no transformers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rad.mixer_settings import (
    MIXER_SETTINGS,
    DiscreteMamba2Settings,
    GatedDeltaNetSettings,
    GLASettings,
    Initialisation,
    LonghornSettings,
    Mamba2Settings,
    MambaSettings,
    MixerSettings,
    Settings,
    SkipSettings,
    SlidingWindowSettings,
)
from rad.selector_settings import (
    SELECTOR_SETTINGS,
    ExternalSettings,
    KLGuidedSettings,
    RadSettings,
    RetrievalAwareSettings,
    UniformSettings,
)

__all__ = [
    "MIXER_SETTINGS",
    "SELECTOR_SETTINGS",
    "DiscreteMamba2Settings",
    "ExternalSettings",
    "GLASettings",
    "GatedDeltaNetSettings",
    "Initialisation",
    "KLGuidedSettings",
    "LonghornSettings",
    "Mamba2Settings",
    "MambaSettings",
    "MixerSettings",
    "RadSettings",
    "RetrievalAwareSettings",
    "Settings",
    "SkipSettings",
    "SlidingWindowSettings",
    "UniformSettings",
]

Trainable = Literal["all", "mixers"]


class ModelSettings(Settings):
    source: str = Field(
        description="`nano:base|medium|large`, a local checkpoint folder, or a hub id"
    )
    revision: str | None = Field(None, description="hub revision (commit) to pin")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the weights")


# --- corpora --------------------------------------------------------------------------------


class CorpusSettings(Settings):
    source: Literal["nano", "text", "hub"] = Field(
        description="`nano` generators, plain `text` files, or a `hub` dataset (id or local folder)"
    )
    files: list[str] = Field(default_factory=list, description="text files of source `text`")
    dataset: str | None = Field(None, description="dataset id or folder of source `hub`")
    split: str = Field("train", description="split of source `hub`")
    column: str = Field("text", description="text column of source `hub`")
    tokens: int = Field(gt=0, description="training tokens to prepare")
    held_out_tokens: int = Field(32768, gt=0, description="held-out tokens, never trained on")
    context: int = Field(gt=8, description="row length in tokens")
    prompt_weight: float = Field(
        1.0, ge=0, le=1, description="loss weight of prompt tokens (answers and text weigh 1)"
    )
    seed: int = 0


# --- distillation ---------------------------------------------------------------------------


class StageSettings(Settings):
    loss: Literal["kl", "align"] = Field(
        "kl", description="`kl`: forward KL to the teacher's logits; `align`: layer outputs"
    )
    trainable: Trainable = Field("all", description="`all` parameters or only the new `mixers`")
    tokens: int = Field(gt=0, description="tokens of this stage")
    batch_size: int = Field(16, gt=0, description="rows per step")
    learning_rate: float = Field(1e-3, gt=0)
    mixer_learning_rate: float | None = Field(None, description="of new mixers; default: the same")
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_fraction: float = Field(0.05, ge=0, lt=1, description="linear warm-up, share of steps")
    final_fraction: float = Field(0.05, ge=0, le=1, description="last rate as a share of the peak")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0, description="gradient norm limit")
    temperature: float = Field(1.0, gt=0, description="softening of both distributions in `kl`")
    kl_weight: float = Field(1.0, ge=0)
    ce_weight: float = Field(0.0, ge=0, description="weight of next-token cross entropy")


class RecipeSettings(Settings):
    stages: list[StageSettings] = Field(
        default_factory=list, description="run in order; an empty list is no training"
    )
    log_points: int = Field(
        24, ge=1, description="held-out evaluations along the run (points of the curve)"
    )
    save_every_seconds: float = Field(
        60.0, gt=0, description="wall time between checkpoints of the resumable state"
    )


class AlignmentSettings(Settings):
    """Stage 1: every layer's mixer learns its attention layer's output, teacher-forced."""

    corpus: str = Field("distil", description="a key of `corpora`")
    tokens: int = Field(gt=0)
    batch_size: int = Field(16, gt=0, description="rows per step")
    learning_rate: float = Field(1e-3, gt=0)
    initialisation: Initialisation = Field("qkvo", description="start of the mixers")
    seed: int = 0


# --- evaluation -----------------------------------------------------------------------------


class TaskSettings(Settings):
    kind: Literal[
        "gsm_nano", "crux_nano", "ruler_nano", "gsm8k", "crux", "ruler_text", "perplexity"
    ]
    samples: int = Field(100, ge=1, description="documents (per length and sub-task)")
    split: Literal["test", "hard"] = Field("test", description="split of a nano family")
    subtasks: list[str] = Field(
        default_factory=list, description="of ruler: single, multikey, vt, cwe; default: all"
    )
    lengths: list[int] = Field(default_factory=list, description="of ruler: contexts in tokens")
    files: list[str] = Field(
        default_factory=list, description="data files: texts, GSM8K test, CRUXEval"
    )
    shot_files: list[str] = Field(default_factory=list, description="of gsm8k: few-shot source")
    shots: int = Field(0, ge=0, description="of gsm8k: worked examples in the prompt")
    max_new_tokens: int = Field(64, ge=1, description="longest generated answer")
    seed: int = 1234


class EfficiencySettings(Settings):
    contexts: list[int] = Field(default_factory=lambda: [64, 128, 256, 512])
    decode_tokens: int = Field(16, ge=1, description="tokens decoded when the speed is measured")
    batch_size: int = Field(1, ge=1)


class EvaluationSettings(Settings):
    tasks: dict[str, TaskSettings] = Field(description="task name -> task")
    batch_size: int = Field(32, ge=1, description="prompts per batch (fixed: it can change scores)")
    max_length: int | None = Field(
        None, description="longest prompt + answer; default: the model's"
    )
    efficiency: EfficiencySettings = Field(default_factory=EfficiencySettings)
    probe_samples: int = Field(
        48, ge=0, description="per task: documents scored along the distillation curve"
    )
