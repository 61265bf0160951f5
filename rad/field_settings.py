"""Settings of the field's other selection methods, and of published lists.

Part of `rad.settings`, beside `rad.selector_settings`. No torch, no transformers.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rad.mixer_settings import Settings


class TextSettings(Settings):
    """Keys of the selectors that read rows of the corpus."""

    rows: int = Field(64, ge=1, description="calibration rows of the corpus; default")
    batch_size: int = Field(16, ge=1, description="rows or prompts per model call")
    seed: int = Field(0, description="which rows and prompts")


class SmartSettings(TextSettings):
    """Zebra-Llama's layer choice, as the KL-guided paper compares itself with it."""

    method: Literal["smart"] = "smart"
    sensitivity: Literal["restore", "linearise", "zero"] = Field(
        "restore",
        description="`restore` (published): KL of the all-linear student less its KL with the "
        "layer put back, without training; `linearise`, `zero`: KL of the base with the layer "
        "alone linear, or silent (the last needs no alignment)",
    )
    mixer: str = Field("mamba2", description="mixer of the aligned layers (a key of `mixers`)")


class HaloSettings(TextSettings):
    """HALO's score (arXiv 2601.22156): recall lost per common-sense accuracy lost."""

    method: Literal["halo"] = "halo"
    score: Literal["ratio", "recall"] = Field(
        "ratio",
        description="`ratio`: the paper's; `recall`: the drop of recall alone (its comparison with "
        "Jet-Nemotron)",
    )
    recall: list[Literal["ar", "ar_mh", "vt", "cwe"]] = Field(
        ["ar", "vt"],
        min_length=1,
        description="probes whose mean accuracy is the recall; the paper has SQuAD, FDA and SWDE, "
        "which small bases cannot do: default",
    )
    style: Literal["auto", "nano", "text"] = Field(
        "auto", description="wording of the probes; `auto`: `nano` for the nano tokenizer"
    )
    samples: int = Field(128, ge=1, description="prompts per probe; default")
    tokens: int = Field(96, ge=32, description="length of a `nano` prompt; default")
    pairs: int = Field(50, ge=4, description="statements of a `text` prompt")
    epsilon: float = Field(1e-6, gt=0, description="added to the common-sense gap (paper)")
    clip: float = Field(50.0, gt=0, description="largest score (published code)")
    endpoints: bool = Field(
        False, description="always keep the first and the last layer (MiniCPM-SALA)"
    )
    mixer: str = Field("mamba2", description="mixer of the aligned layers (a key of `mixers`)")


class RecallAblationSettings(Settings):
    """The layer ablations that the KL-guided paper compares itself with."""

    method: Literal["ar", "ar_mh", "vt", "cwe"]
    style: Literal["auto", "nano", "text"] = Field(
        "auto", description="wording of the prompts; `auto`: `nano` for the nano tokenizer"
    )
    samples: int = Field(500, ge=1, description="prompts per layer (published)")
    pairs: int = Field(50, ge=4, description="key/value pairs of a `text` prompt (published)")
    tokens: int = Field(96, ge=32, description="length of a `nano` prompt; default")
    move: Literal["zero", "linearise"] = Field(
        "zero",
        description="`zero` (published): the layer's attention adds nothing; `linearise`: its "
        "aligned mixer takes over",
    )
    mixer: str | None = Field(
        None, description="with move linearise: mixer of the converted layers (a key of `mixers`)"
    )
    scoring: Literal["forced", "generated"] = Field(
        "forced",
        description="`forced`: every token of the answer is the most likely one, in one pass; "
        "`generated` (published): the answer is looked for in generated text, which also accepts "
        "17 for 7",
    )
    metric: Literal["accuracy", "log_probability"] = Field(
        "accuracy",
        description="what a layer costs: `accuracy` (published) or nats per answer, which still "
        "ranks where accuracy does not move; scoring generated has accuracy only",
    )
    max_new_tokens: int = Field(200, ge=1, description="with scoring generated (published)")
    batch_size: int = Field(32, ge=1, description="prompts per model call")
    seed: int = Field(0, description="which prompts")


class LayerMoveSettings(TextSettings):
    """Keys of the selectors that take one layer out and measure on text."""

    move: Literal["zero", "linearise"] = Field(
        "zero", description="`zero`: the layer's attention adds nothing; `linearise`: aligned mixer"
    )
    mixer: str | None = Field(
        None, description="with move linearise: mixer of the converted layers (a key of `mixers`)"
    )


class LmPplSettings(LayerMoveSettings):
    """LM-PPL of the KL-guided paper: its script is not public, the rule is our default."""

    method: Literal["lm_ppl"] = "lm_ppl"


class ActivationMseSettings(LayerMoveSettings):
    """Act-MSE of the KL-guided paper: its script is not public, the rule is our default."""

    method: Literal["activation_mse"] = "activation_mse"


class LeaveOneOutSettings(TextSettings):
    """Apriel-H1 (arXiv 2511.02651): leave one layer out, or convert progressively."""

    method: Literal["leave_one_out"] = "leave_one_out"
    mode: Literal["one_shot", "progressive"] = Field(
        "one_shot",
        description="`one_shot`: rank by the loss of each layer alone; `progressive`: the first "
        "conversions so, each later one by how well it distils in the current hybrid",
    )
    metric: Literal["accuracy", "loss"] = Field(
        "accuracy",
        description="next-token `accuracy` or `loss` on the corpus; the paper takes MMLU, which "
        "small bases cannot do: default",
    )
    first_share: float = Field(
        0.625,
        ge=0,
        le=1,
        description="progressive: share of the conversions that the one-shot ranking decides (25 "
        "of 40 in the paper)",
    )
    per_round: int = Field(
        3, ge=1, description="progressive: layers converted per round (paper: 2-4)"
    )
    steps: int = Field(100, ge=1, description="progressive: training steps per candidate (paper)")
    distil_steps: int = Field(
        200, ge=0, description="progressive: training steps of the hybrid between rounds; default"
    )
    learning_rate: float = Field(1e-3, gt=0, description="progressive: of both trainings; default")
    loss: Literal["reverse_kl", "kl"] = Field(
        "reverse_kl", description="progressive: distillation loss (the paper prefers reverse KL)"
    )
    initialisation: Literal["qkvo", "aligned"] = Field(
        "qkvo", description="progressive: start of a converted layer (paper: attention's weights)"
    )
    mixer: str | None = Field(
        None, description="with mode progressive: mixer of the converted layers (a key of `mixers`)"
    )


class FlashMorphSettings(Settings):
    """FlashMorph (arXiv 2606.30562): a gate per layer between attention and its linear branch."""

    method: Literal["flash_morph"] = "flash_morph"
    tokens: int = Field(
        100_000, ge=1, description="training tokens of the gates; the paper has 20 million"
    )
    sparsity: float = Field(0.1, ge=0, description="weight of the sum of the gates (paper)")
    learning_rate: float = Field(2e-2, gt=0, description="at the start (paper)")
    final_learning_rate: float = Field(2e-3, gt=0, description="at the end (paper)")
    style: Literal["auto", "nano", "text"] = Field(
        "auto", description="wording of the retrieval prompts; `auto`: `nano` for its tokenizer"
    )
    passkeys: int = Field(10, ge=1, description="passkeys hidden in a `text` prompt (paper)")
    prompt_tokens: int = Field(96, ge=32, description="length of a prompt (paper: 1K-16K); default")
    batch_size: int = Field(16, ge=1, description="prompts per step; default")
    seed: int = Field(0, description="which prompts")
    mixer: str = Field("mamba2", description="mixer of the linear branches (a key of `mixers`)")


class PresetSettings(Settings):
    """A list that a paper published; `rad/assets/selections.json` has them all with sources."""

    method: Literal["preset"] = "preset"
    keep: list[int] | None = Field(
        None, description="any other list, written here: the layers to keep, best first"
    )
    name: str | None = Field(
        None, description="id of a list, e.g. set.kl.smart.qwen3b.k9; the other keys narrow down"
    )
    paper: str | None = Field(
        None, description="e.g. kl_guided, retrieval_aware, halo, zebra_llama"
    )
    model: str | None = Field(None, description="the published model, e.g. Qwen2.5-3B-Instruct")
    selector: str | None = Field(None, description="the published method, e.g. ga_s2, smart, ar")
    probe_mixer: str | None = Field(None, description="mixer that the paper tried, e.g. GDN")
