"""Settings of the mixers: what replaces attention, and how kept heads and mixer heads are joined.

Part of `rad.settings`, which re-exports everything here. No torch, no transformers.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

Initialisation = Literal["qkvo", "zero", "gate_zero", "value_zero", "random", "aligned"]


class Settings(BaseModel):
    """Base class: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RecurrentSettings(Settings):
    """Keys of every mixer with a recurrent state; `starts` lists the initialisations it accepts."""

    starts: ClassVar[tuple[str, ...]] = ("qkvo", "gate_zero", "value_zero", "random", "aligned")

    chunk: int = Field(64, ge=1, description="chunk length of the training form, in tokens")
    kernel: Literal["auto", "torch", "mamba_ssm", "fla"] = Field(
        "auto",
        description="which implementation on a CUDA device; elsewhere always PyTorch. `auto` takes "
        "the fastest one installed",
    )
    form: Literal["slots", "parallel"] = Field(
        "slots",
        description="a layer that keeps some heads: `slots`, each head in its place under one "
        "output projection (retrieval-aware, section 4.2); `parallel`, a mixer of all heads and "
        "the kept heads side by side, joined by an adapter and averaged (its published code)",
    )
    standardise: bool = Field(
        True,
        description="in a layer that keeps some heads: give the kept heads' output the mixer "
        "heads' mean and deviation per token (retrieval-aware, A.2)",
    )


class Mamba2Settings(RecurrentSettings):
    starts: ClassVar[tuple[str, ...]] = (
        *("qkvo", "zero", "gate_zero", "value_zero", "random", "aligned"),
    )

    type: Literal["mamba2"] = "mamba2"
    conv_size: int = Field(4, ge=1, description="width of the causal depthwise convolution")
    conv_init: Literal["default", "identity"] = Field(
        "default", description="`default`: random taps as in mamba-ssm; `identity`: pass through"
    )
    a_range: tuple[float, float] = Field((1.0, 16.0), description="range of -A at random start")
    dt_range: tuple[float, float] = Field((1e-3, 1e-1), description="range of the time step")


class DiscreteMamba2Settings(RecurrentSettings):
    starts: ClassVar[tuple[str, ...]] = Mamba2Settings.starts

    type: Literal["discrete_mamba2"] = "discrete_mamba2"
    state_size: int | None = Field(
        None, ge=1, description="state dim N per head, at most the head dim; default: the head dim"
    )
    conv_size: int = Field(4, ge=1, description="width of the causal depthwise convolution")
    conv_init: Literal["default", "identity"] = Field(
        "identity", description="`default`: random taps; `identity`: pass through (as published)"
    )
    gate_init: Literal["open", "random"] = Field(
        "open", description="`open`: silu(z) = 1 at the start (MOHAWK); `random`: as published"
    )
    alpha_range: tuple[float, float] = Field(
        (-4.0, -2.0),
        description="range of alpha's bias at the start: decay 0.88 to 0.98; published: 0, 0",
    )
    kv_expansion: Literal["heads", "rows_interleaved"] = Field(
        "heads", description="grouped keys and values: repeat whole heads, or single rows"
    )


class GatedDeltaNetSettings(RecurrentSettings):
    type: Literal["gated_deltanet"] = "gated_deltanet"
    conv_size: int | None = Field(
        None, ge=1, description="width of a causal convolution on q, k, v; default: none (gdn_v4)"
    )
    conv_init: Literal["default", "identity"] = Field(
        "identity", description="`default`: random taps; `identity`: pass through"
    )
    a_range: tuple[float, float] = Field((0.0, 16.0), description="range of -A at random start")
    dt_range: tuple[float, float] = Field((1e-3, 1e-1), description="range of the time step")
    kv_expansion: Literal["heads", "rows_interleaved"] = Field(
        "heads",
        description="grouped keys and values: repeat whole heads, or single rows, which scrambles "
        "the heads (KL-guided selection as published)",
    )
    qkv_bias: Literal["base", "none"] = Field(
        "base", description="keep the base's q, k, v biases, or drop them (as published)"
    )


class GLASettings(RecurrentSettings):
    type: Literal["gla"] = "gla"
    gate_rank: int = Field(16, ge=1, description="rank of the decay's projection")
    gate_scale: float = Field(16.0, gt=0, description="divides the log decay")
    kv_expansion: Literal["heads", "rows_interleaved"] = Field(
        "heads", description="grouped keys and values: repeat whole heads, or single rows"
    )
    qkv_bias: Literal["base", "none"] = Field(
        "base", description="keep the base's q, k, v biases, or drop them (as published)"
    )


class MambaSettings(RecurrentSettings):
    starts: ClassVar[tuple[str, ...]] = Mamba2Settings.starts

    type: Literal["mamba"] = "mamba"
    state_size: int = Field(16, ge=1, description="state dim N per channel; divides the head dim")
    dt_rank: int | None = Field(
        None, ge=1, description="rank of the time step's projection; default: hidden size / 16"
    )
    conv_size: int = Field(4, ge=1, description="width of the causal depthwise convolution")
    conv_init: Literal["default", "identity"] = Field(
        "default", description="`default`: random taps as in mamba-ssm; `identity`: pass through"
    )
    dt_range: tuple[float, float] = Field((1e-3, 1e-1), description="range of the time step")


class LonghornSettings(MambaSettings):
    type: Literal["longhorn"] = "longhorn"  # type: ignore[assignment]


class SlidingWindowSettings(Settings):
    starts: ClassVar[tuple[str, ...]] = ("qkvo",)

    type: Literal["sliding_window"] = "sliding_window"
    window: int = Field(32, ge=1, description="latest tokens that stay visible")
    sinks: int = Field(4, ge=0, description="first tokens that stay visible for ever")


class SkipSettings(Settings):
    starts: ClassVar[tuple[str, ...]] = ("qkvo",)

    type: Literal["skip"] = "skip"


MIXER_SETTINGS: dict[str, type[RecurrentSettings | SlidingWindowSettings | SkipSettings]] = {
    "mamba2": Mamba2Settings,
    "discrete_mamba2": DiscreteMamba2Settings,
    "gated_deltanet": GatedDeltaNetSettings,
    "gla": GLASettings,
    "mamba": MambaSettings,
    "longhorn": LonghornSettings,
    "sliding_window": SlidingWindowSettings,
    "skip": SkipSettings,
}

MixerSettings = Annotated[
    Mamba2Settings
    | DiscreteMamba2Settings
    | GatedDeltaNetSettings
    | GLASettings
    | MambaSettings
    | LonghornSettings
    | SlidingWindowSettings
    | SkipSettings,
    Field(discriminator="type"),
]
