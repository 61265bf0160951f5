"""Settings of the selection methods, one class each.

Part of `rad.settings`, which re-exports what other modules need. No torch, no transformers.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rad.field_settings import (
    ActivationMseSettings,
    FlashMorphSettings,
    HaloSettings,
    LeaveOneOutSettings,
    LmPplSettings,
    PresetSettings,
    RecallAblationSettings,
    SmartSettings,
)
from rad.mixer_settings import Settings
from rad.recipe_settings import GroupSettings


class UniformSettings(Settings):
    method: Literal["uniform"] = "uniform"
    unit: Literal["layers", "heads"] = Field(
        "layers",
        description="`layers`: whole layers; `heads`: single heads, spread as `spread` says",
    )
    offset: int | None = Field(
        None,
        ge=0,
        description="first kept layer, or head of the spread; default: centred, so the gaps at "
        "both ends are equal. The published lists use 0, 1, 3 or 6, depending on the model",
    )
    spread: Literal["per_layer", "flat"] = Field(
        "per_layer",
        description="with unit heads. `per_layer`: the same number in every layer, left-over heads "
        "in evenly spaced layers; `flat`: every n-th of all heads, layer after layer",
    )


class RadSettings(Settings):
    method: Literal["rad"] = "rad"
    objective: Literal["acceptance", "speed_up", "matchness", "throughput"] = Field(
        "acceptance",
        description="`acceptance`: accepted share of drafted tokens while decoding; `speed_up`: "
        "modelled tokens per second of decoding; `matchness`: teacher-forced argmax agreement "
        "(SWIFT), the cheapest; `throughput`: measured tokens per second against plain decoding "
        "(RAD, section 3.1), the only one whose result depends on the machine",
    )
    search: Literal["auto", "bayesian", "greedy", "exhaustive"] = Field(
        "auto",
        description="`bayesian`: Gaussian process over skip sets (RAD, section 3.1); `greedy`: one "
        "layer at a time, whatever `evaluations`; `exhaustive`: all sets; `auto`: all when there "
        "are no more than `evaluations`, else bayesian (default)",
    )
    discretisation: Literal["top_k", "threshold"] = Field(
        "top_k",
        description="of a point of the relaxed box (RAD, appendix D): `top_k` keeps the budget; "
        "`threshold` first searches sets of any size, reports them, and starts the budgeted "
        "search from their values; needs `speed_up` or `throughput`",
    )
    evaluations: int = Field(80, ge=1, description="skip sets tried by the search (default)")
    initial: int = Field(8, ge=1, description="random sets before the surrogate is used (default)")
    prompts: int = Field(16, ge=1, description="calibration prompts (default)")
    prompt_tokens: int = Field(48, ge=1, description="length of a calibration prompt (default)")
    new_tokens: int = Field(32, ge=2, description="tokens decoded per prompt (Draft & Verify)")
    max_draft: int = Field(8, ge=1, description="longest draft before verification (same)")
    exit_threshold: float = Field(
        0.6, ge=0, le=1, description="stop drafting when the top-1 probability falls below (same)"
    )
    adaptive_exit: bool = Field(
        True, description="move the threshold towards 90 % acceptance while decoding (same)"
    )
    finalists: int = Field(
        5, ge=1, description="`throughput`: best sets of the search that are timed again (default)"
    )
    repeats: int = Field(
        3, ge=1, description="`throughput`: timings of a finalist, the median decides (default)"
    )
    timed_prompts: int = Field(
        2, ge=0, description="prompts decoded to report the measured speed-up; 0: none (default)"
    )
    agreement_seeds: int = Field(
        0,
        ge=0,
        description="other calibration draws searched with `matchness`, whose sets the report "
        "compares with the chosen one (default)",
    )
    seed: int = 0


class KLGuidedSettings(Settings):
    method: Literal["kl_guided"] = "kl_guided"
    variant: Literal["ga_s2", "ga_s1", "gr_s2", "gr_s1", "avg_s2", "avg_s1", "swap"] = Field(
        "ga_s2",
        description="`ga`: restore one layer of the all-linear student; `gr`: linearise one layer "
        "of the base; `avg`: mean of both ranks; `s2`: KL after training, `s1`: loss of stage 1; "
        "`swap`: `ga` without training (default: KL-guided, section 2.2)",
    )
    greedy: Literal["one_shot", "sequential"] = Field(
        "one_shot",
        description="`one_shot`: the K best at once (as published); `sequential`: score the "
        "remaining layers again after every choice, at K times the cost (the same for `s1`)",
    )
    score: Literal["held_out", "training_loss"] = Field(
        "held_out",
        description="`held_out`: KL on a fixed held-out slice; `training_loss`: mean of the last "
        "steps' training losses (as published)",
    )
    score_step: int | None = Field(
        None, ge=1, description="step at which `training_loss` is read; default: the last"
    )
    score_window: int = Field(
        10, ge=1, description="steps whose training loss is averaged (published: 10)"
    )
    mixer: str = Field("mamba2", description="mixer of the all-linear student (a key of `mixers`)")
    tokens: int = Field(
        0,
        ge=0,
        description="training tokens per candidate layer; the `s2` variants need them (published: "
        "200 to 600 million)",
    )
    batch_size: int = Field(16, gt=0, description="rows per step, and per pass that only measures")
    accumulate: int = Field(
        1, ge=1, description="micro-batches that these rows are processed in, to save memory"
    )
    learning_rate: float = Field(1e-3, gt=0)
    groups: list[GroupSettings] = Field(
        default_factory=list,
        description="parameters with rates of their own (published: attention and its norms)",
    )
    schedule: Literal["cosine", "constant", "wsd"] = Field(
        "cosine", description="of the learning rate (published: constant)"
    )
    warmup_fraction: float = Field(
        0.05, ge=0, lt=1, description="linear warm-up, share of steps (published: 0)"
    )
    decay_vectors: bool = Field(
        False, description="weight decay of norms, biases and decay rates too (published: true)"
    )
    autocast: bool = Field(
        False, description="bfloat16 arithmetic where the hardware has it; weights keep their dtype"
    )
    activation_checkpointing: bool = Field(
        False, description="recompute activations in the backward pass, to save memory"
    )
    side_by_side: bool = Field(
        True,
        description="where the base's logits of all steps do not fit, train all candidates at once "
        "with one run of the base; false: one after another, each with the base's own passes",
    )
    save_every_seconds: float = Field(
        60.0, gt=0, description="wall time between states of candidates in training"
    )
    held_out_rows: int = Field(64, gt=0, description="fixed held-out slice that scores a candidate")
    early_stop: bool = Field(
        False,
        description="train all candidates side by side and stop when the best K have changed by "
        "at most one layer in three checks and 15 % is spent (default rule: the published one has "
        "no numbers); all students are in memory at once, so it needs `side_by_side`",
    )
    check_every: int = Field(
        100, ge=1, description="steps between the checks of `early_stop`, and their loss window"
    )

    @model_validator(mode="after")
    def _fit_together(self) -> KLGuidedSettings:
        if self.variant.endswith("_s2") and not self.tokens:
            raise ValueError(f"variant {self.variant} trains its candidates: it needs tokens")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} does not divide into {self.accumulate} "
                "micro-batches (accumulate)"
            )
        if self.early_stop and not self.side_by_side:
            raise ValueError(
                "early_stop compares candidates while they train: set side_by_side, or leave "
                "early_stop out"
            )
        if self.greedy == "sequential" and self.variant == "avg_s2":
            raise ValueError(
                "variant avg_s2 ranks two kinds of candidates that have no common next step: use "
                "greedy one_shot, or variant ga_s2 or gr_s2"
            )
        return self


class RetrievalAwareSettings(Settings):
    method: Literal["retrieval_aware"] = "retrieval_aware"
    probe: Literal["auto", "nano", "dictionary", "copy", "repeat"] = Field(
        "auto",
        description="`auto`: `nano` for the nano tokenizer, else `dictionary`; "
        "`dictionary`: the paper's key:value text; `nano`: the nano multi-key format; "
        "`copy`: repeated blocks of random tokens, for bases that never saw dictionaries; "
        "`repeat`: repeated pieces of the corpus, for bases that copy text only",
    )
    samples: int = Field(128, ge=1, description="probe prompts per head and seed (paper: not said)")
    seeds: int = Field(
        1,
        ge=1,
        description="independent probes whose scores are averaged; the agreement of their "
        "rankings is reported (with one: of its two halves)",
    )
    pairs: Literal["auto"] | Annotated[int, Field(ge=2, le=100)] = Field(
        "auto",
        description="key/value pairs of a `dictionary`; `auto`: as many as bring the intact base "
        "to 60-95 % accuracy (default; the paper does not say)",
    )
    tokens: int = Field(96, ge=16, description="length of a `nano`, `copy` or `repeat` probe")
    score: Literal["margin", "accuracy", "candidate_accuracy"] = Field(
        "margin",
        description="what a head's loss is measured by: `accuracy` over the full vocabulary "
        "(paper), `candidate_accuracy` among the prompt's values (its predecessor), or the "
        "`margin` in nats between the answer and the likeliest wrong value, which ranks on where "
        "accuracy does not move",
    )
    threshold: float | None = Field(
        None,
        description="keep only heads that score above it; the budget is then the most that may "
        "stay and has to be `kv_bytes_per_token`, or to name the very number",
    )
    control: Literal["none", "random", "bottom", "shifted"] = Field(
        "none",
        description="baselines with as many heads: `random`, the `bottom` of the ranking, or the "
        "ranks after the first `shift`",
    )
    shift: int | None = Field(
        None, ge=1, description="of control `shifted`; default: 3 k (published: ranks 31-40, k 10)"
    )
    prefilter: float | None = Field(
        None,
        gt=0,
        le=1,
        description="ablate only this share of the heads, the first by the gradients of the margin "
        "with respect to a gate on each head; default: all heads",
    )
    prefilter_recall: bool = Field(
        False,
        description="with `prefilter`: ablate the others too, only to report how many of the true "
        "first heads the filter found",
    )
    unfit_probe: Literal["error", "warn"] = Field(
        "error", description="when the intact base is no better than chance on the probe"
    )
    batch_size: int = Field(64, ge=1, description="probe prompts per pass")
    head_batch: int | None = Field(
        None, ge=1, description="heads ablated in one pass; default: 1 on a CPU, else a layer's"
    )
    seed: int = 0

    @model_validator(mode="after")
    def _fit_together(self) -> RetrievalAwareSettings:
        if self.control != "none" and self.threshold is not None:
            raise ValueError(f"control {self.control} has no use for a threshold: leave it out")
        if self.control != "none" and self.prefilter is not None:
            raise ValueError(f"control {self.control} needs every head's score, not a prefilter")
        if self.shift is not None and self.control != "shifted":
            raise ValueError("shift belongs to control shifted")
        if self.prefilter_recall and self.prefilter is None:
            raise ValueError("prefilter_recall needs prefilter, a share of the heads")
        return self


class RandomSettings(Settings):
    method: Literal["random"] = "random"
    unit: Literal["layers", "heads"] = Field("layers", description="what is drawn")
    seed: int = Field(0, description="kept sets of one seed are nested; report three seeds")


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


# what a method works from, besides the shape of the base
NEEDS: dict[str, tuple[str, ...]] = {
    "uniform": (),
    "random": (),
    "preset": (),
    "rad": ("model", "corpus"),
    "kl_guided": ("model", "corpus", "aligned"),
    "retrieval_aware": ("model",),
    "smart": ("model", "corpus", "aligned"),
    "halo": ("model", "corpus", "aligned"),
    "ar": ("model",),
    "ar_mh": ("model",),
    "vt": ("model",),
    "cwe": ("model",),
    "lm_ppl": ("model", "corpus"),
    "activation_mse": ("model", "corpus"),
    "leave_one_out": ("model", "corpus"),
    "flash_morph": ("model", "corpus", "aligned"),
}


# values of a batch's logits that are formed at once, or kept; above, a few tokens at a time
SHARED_LOGITS = 200_000_000


def shares_scores(settings: Settings) -> bool:
    """Whether scores do not depend on the budget and are kept for the selector's other budgets."""
    if isinstance(settings, KLGuidedSettings):
        return settings.variant.endswith("_s2")
    return isinstance(settings, RetrievalAwareSettings)


def needs_of(settings: Settings) -> tuple[str, ...]:
    """What these settings work from: `model`, `corpus`, `aligned` mixers, a `mixer`'s settings.

    A selector of the user's own is given the model.
    """
    needs = list(NEEDS.get(settings.method, ("model",)))  # type: ignore[attr-defined]
    if getattr(settings, "probe", None) == "repeat":  # of retrieval_aware
        needs.append("corpus")
    if getattr(settings, "move", None) == "linearise":
        needs += ["corpus", "aligned"]
    if getattr(settings, "sensitivity", None) == "zero":
        needs.remove("aligned")
    if getattr(settings, "mode", None) == "progressive":
        needs.append("aligned" if settings.initialisation == "aligned" else "mixer")  # type: ignore[attr-defined]
    if "aligned" in needs:
        needs.append("mixer")
    return tuple(dict.fromkeys(needs))
