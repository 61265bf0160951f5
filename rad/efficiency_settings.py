"""Settings of the efficiency probe: where a model's speed and memory are measured.

Part of `rad.settings`, which re-exports everything here. No torch, no transformers.
"""

from __future__ import annotations

from pydantic import Field, field_validator

from rad.mixer_settings import Settings


class EfficiencySettings(Settings):
    contexts: list[int] = Field(
        default_factory=lambda: [64, 128, 256, 512], description="prompt lengths in tokens"
    )
    decode_tokens: int = Field(16, ge=1, description="tokens decoded when the speed is measured")
    batch_size: int = Field(1, ge=1, description="sequences per batch")
    batch_sizes: list[int] = Field(
        default_factory=list,
        description="several batch sizes instead of one; the report's tables show the first",
    )
    memory_limit: float | None = Field(
        None,
        gt=0,
        description="GiB that a point may need before it is skipped and recorded as such; default: "
        "90 % of what the machine or the device has",
    )
    peak_memory: bool = Field(
        True, description="also run every point once under a memory meter (one prefill more)"
    )
    compare_base: bool = Field(
        False,
        description="measure the unconverted base in turn with the model, in the same process",
    )

    @field_validator("contexts")
    @classmethod
    def _contexts(cls, values: list[int]) -> list[int]:
        if not values or min(values) < 2:
            raise ValueError("at least one context of 2 tokens or more")
        return values

    @field_validator("batch_sizes")
    @classmethod
    def _batch_sizes(cls, values: list[int]) -> list[int]:
        if values and min(values) < 1:
            raise ValueError("a batch has 1 sequence or more")
        return values
