"""The settings that a study is made of: one pydantic model per thing that can be configured.

Every key has a description and a default here and nowhere else; the JSON schema and the key table
in `docs/config.md` are generated from these models (`rad schema`). No torch, no transformers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rad.corpus_settings import CorpusSettings, SourceSettings
from rad.efficiency_settings import EfficiencySettings
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
from rad.recipe_settings import (
    AlignmentSettings,
    GroupSettings,
    RecipeSettings,
    StageSettings,
)
from rad.selector_settings import (
    NEEDS,
    SELECTOR_SETTINGS,
    ExternalSettings,
    KLGuidedSettings,
    RadSettings,
    RetrievalAwareSettings,
    UniformSettings,
    needs_of,
)
from rad.task_settings import TASK_SETTINGS, TaskSettings, TaskTable

__all__ = [
    "MIXER_SETTINGS",
    "NEEDS",
    "SELECTOR_SETTINGS",
    "TASK_SETTINGS",
    "AlignmentSettings",
    "CorpusSettings",
    "DiscreteMamba2Settings",
    "EfficiencySettings",
    "ExternalSettings",
    "GLASettings",
    "GatedDeltaNetSettings",
    "GroupSettings",
    "Initialisation",
    "KLGuidedSettings",
    "LonghornSettings",
    "Mamba2Settings",
    "MambaSettings",
    "MixerSettings",
    "RadSettings",
    "RecipeSettings",
    "RetrievalAwareSettings",
    "Settings",
    "SkipSettings",
    "SlidingWindowSettings",
    "SourceSettings",
    "StageSettings",
    "TaskSettings",
    "UniformSettings",
    "needs_of",
]


class ModelSettings(Settings):
    source: str = Field(
        description="`nano:base|medium|large`, a local checkpoint folder, or a hub id"
    )
    revision: str | None = Field(None, description="hub revision (commit) to pin")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="dtype of the weights")


class TeacherOutputsSettings(Settings):
    """What is stored of a teacher that runs over the corpus once, for all its students."""

    kind: Literal["hidden", "top_k", "sampled"] = Field(
        "hidden",
        description="`hidden`: final hidden states and the head, exact; `top_k`: the most likely "
        "tokens, the rest in one bucket; `sampled`: random draws (random-sampling KD), unbiased",
    )
    k: int | None = Field(
        None, ge=1, description="entries of `top_k` (default 64), draws of `sampled` (default 50)"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="of what is stored; default: hidden states as the teacher has them"
    )
    temperature: float = Field(1.0, gt=0, description="of `top_k` and `sampled`")
    batch_size: int = Field(8, gt=0, description="rows per teacher call")
    seed: int = 0
    order: Literal["corpus", "students"] = Field(
        "corpus",
        description="of stored training rows; `students`: as the students of the first seed see "
        "them, so that with `stream` the first shards are the ones they need first",
    )
    shard_mb: float = Field(256, gt=0, description="size of a shard in MiB, at most")
    # how the work is done, not what comes out: no part of a run's specification
    parts: int = Field(
        1, ge=1, exclude=True, description="jobs that share the corpus, each with its own shards"
    )
    stream: bool = Field(
        False,
        exclude=True,
        description="students start with the teacher and read shards as they appear; they hold "
        "their cores and devices while they wait",
    )
    wait_minutes: float = Field(
        60,
        gt=0,
        exclude=True,
        description="with `stream`: a student gives up when no shard appeared for so long",
    )
    device_map: Literal["auto", "balanced", "sequential"] | None = Field(
        None,
        exclude=True,
        description="lay the teacher's layers over all GPUs that a job sees, for one that does not "
        "fit on one; default: whole, on the job's device",
    )


# --- evaluation -----------------------------------------------------------------------------


class EvaluationSettings(TaskTable):
    batch_size: int = Field(32, ge=1, description="prompts per batch (fixed: it can change scores)")
    batch_tokens: int | None = Field(
        None,
        ge=1,
        description="most tokens of a batch, prompts and answers: long prompts meet fewer others",
    )
    max_length: int | None = Field(
        None, description="longest prompt + answer; default: the model's"
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="dtype of what is scored; default: float32, of references their own"
    )
    efficiency: EfficiencySettings = Field(default_factory=EfficiencySettings)
    probe_samples: int = Field(
        48, ge=0, description="per task: documents scored along the distillation curve"
    )
