"""Settings of the selection methods, one class each.

Part of `rad.settings`, which re-exports what other modules need. No torch, no transformers.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rad.mixer_settings import Settings


class UniformSettings(Settings):
    method: Literal["uniform"] = "uniform"
    offset: int | None = Field(
        None, description="first kept layer; default: centred, so the gaps at both ends are equal"
    )


class RadSettings(Settings):
    method: Literal["rad"] = "rad"
    objective: Literal["acceptance", "speed_up", "matchness"] = Field(
        "acceptance",
        description="`acceptance`: accepted share of drafted tokens while decoding; `speed_up`: "
        "modelled tokens per second of decoding; `matchness`: teacher-forced argmax agreement",
    )
    evaluations: int = Field(80, ge=1, description="skip sets tried by the search")
    initial: int = Field(8, ge=1, description="random skip sets before the surrogate is used")
    prompts: int = Field(16, ge=1, description="calibration prompts")
    prompt_tokens: int = Field(48, ge=1, description="length of a calibration prompt")
    new_tokens: int = Field(32, ge=2, description="tokens decoded per prompt")
    max_draft: int = Field(8, ge=1, description="longest draft before verification")
    exit_threshold: float = Field(
        0.6, ge=0, le=1, description="stop drafting when the top-1 probability falls below"
    )
    adaptive_exit: bool = Field(
        True, description="move the threshold towards 90 % acceptance while decoding"
    )
    seed: int = 0


class KLGuidedSettings(Settings):
    method: Literal["kl_guided"] = "kl_guided"
    variant: Literal["ga_s2"] = Field("ga_s2", description="restore one layer, KL after training")
    mixer: str = Field("mamba2", description="mixer of the all-linear student (a key of `mixers`)")
    tokens: int = Field(gt=0, description="training tokens per candidate layer")
    batch_size: int = Field(16, gt=0, description="rows per step")
    learning_rate: float = Field(1e-3, gt=0)
    held_out_rows: int = Field(64, gt=0, description="fixed held-out slice that scores a candidate")


class RetrievalAwareSettings(Settings):
    method: Literal["retrieval_aware"] = "retrieval_aware"
    probe: Literal["nano", "dictionary", "copy", "repeat"] = Field(
        "dictionary",
        description="`dictionary`: the paper's key:value text; `nano`: the nano multi-key format; "
        "`copy`: repeated blocks of random tokens, for bases that never saw dictionaries; "
        "`repeat`: repeated pieces of the corpus, for bases that copy text only",
    )
    samples: int = Field(128, ge=1, description="probe prompts per head")
    pairs: int = Field(10, ge=2, le=100, description="key/value pairs of a `dictionary`")
    tokens: int = Field(96, ge=16, description="length of a `nano`, `copy` or `repeat` probe")
    batch_size: int = Field(64, ge=1)
    seed: int = 0


class RandomSettings(Settings):
    method: Literal["random"] = "random"
    unit: Literal["layers", "heads"] = Field("layers", description="what is drawn")
    seed: int = 0


class SmartSettings(Settings):
    method: Literal["smart"] = "smart"


class HaloSettings(Settings):
    method: Literal["halo"] = "halo"


class RecallAblationSettings(Settings):
    method: Literal["ar", "ar_mh", "vt", "cwe"]


class LmPplSettings(Settings):
    method: Literal["lm_ppl"] = "lm_ppl"


class ActivationMseSettings(Settings):
    method: Literal["activation_mse"] = "activation_mse"


class LeaveOneOutSettings(Settings):
    method: Literal["leave_one_out"] = "leave_one_out"


class FlashMorphSettings(Settings):
    method: Literal["flash_morph"] = "flash_morph"


class PresetSettings(Settings):
    method: Literal["preset"] = "preset"


class ExternalSettings(Settings):
    """A selector whose rule file the study's owner dropped into `workflow/rules/selection/`."""

    method: str
    settings: dict[str, Any] = Field(default_factory=dict, description="handed to the rule as JSON")


SELECTOR_SETTINGS: dict[str, type[Settings]] = {
    "uniform": UniformSettings,
    "random": RandomSettings,
    "rad": RadSettings,
    "kl_guided": KLGuidedSettings,
    "retrieval_aware": RetrievalAwareSettings,
    "smart": SmartSettings,
    "halo": HaloSettings,
    "ar": RecallAblationSettings,
    "ar_mh": RecallAblationSettings,
    "vt": RecallAblationSettings,
    "cwe": RecallAblationSettings,
    "lm_ppl": LmPplSettings,
    "activation_mse": ActivationMseSettings,
    "leave_one_out": LeaveOneOutSettings,
    "flash_morph": FlashMorphSettings,
    "preset": PresetSettings,
}
