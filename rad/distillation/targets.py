"""What a teacher says about a batch, and the head that turns hidden states into logits.

Losses, teachers and stored outputs share these two types. Logits themselves are in neither: they
are formed a few tokens at a time, inside the losses. Legend: B batch, T time, E hidden size, V
vocabulary (rows of a head), K stored entries per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from rad.data.isolation import isolated

Kind = Literal["hidden", "top_k", "sampled"]
# configuration keys that change logits in ways that a LogitHead can say; other models are refused
# by `check_head`, which compares against the model itself
_DIVIDES = {"granite": "logits_scaling", "granitemoe": "logits_scaling"}
_MULTIPLIES = {"cohere": "logit_scale", "cohere2": "logit_scale"}
PROBE = 4  # tokens of the forward pass that checks a head


@dataclass(frozen=True)
class LogitHead:
    """logits = softcap((hidden @ weight^T + bias) / scale), softcap(x) = cap * tanh(x / cap).

    weight (V,E), bias (V,) or None; `scale` divides (Granite), `softcap` as in Gemma, None: none.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocabulary(self) -> int:
        """V: rows of the head."""
        return int(self.weight.shape[0])

    def logits(self, hidden: Tensor, rows: int | None = None) -> Tensor:
        """hidden (...,E) -> logits (...,V), or of the first `rows` of the vocabulary.

        The naive form: for a few tokens and for tests.
        """
        bias = None if self.bias is None else self.bias[:rows]
        logits = torch.nn.functional.linear(hidden, self.weight[:rows], bias) / self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def to(self, device: torch.device | str) -> LogitHead:
        """The same head on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return LogitHead(self.weight.to(device), bias, self.scale, self.softcap)

    def detach(self) -> LogitHead:
        """The same head without gradients."""
        bias = None if self.bias is None else self.bias.detach()
        return LogitHead(self.weight.detach(), bias, self.scale, self.softcap)


@dataclass(frozen=True)
class Targets:
    """What a teacher says about the next token at every position of a batch.

    kind `hidden`: `hidden` (B,T,E) after the final norm, and `head`.
    kind `top_k`: `ids` (B,T,K) long, `log_probs` (B,T,K); the missing mass is 1 - sum of exp.
    kind `sampled`: `ids` (B,T,K) long, `weights` (B,T,K): sum of weights * f(ids) estimates the
    teacher's mean of f without bias; entries of weight 0 are padding.
    `entropy` (B,T) of the teacher, in nats, makes a KL out of a sampled cross entropy.
    `temperature` is the one that `log_probs`, `weights` and `entropy` were computed at.
    """

    kind: Kind
    hidden: Tensor | None = None
    head: LogitHead | None = None
    ids: Tensor | None = None
    log_probs: Tensor | None = None
    weights: Tensor | None = None
    entropy: Tensor | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        needs = {
            "hidden": ("hidden", "head"),
            "top_k": ("ids", "log_probs"),
            "sampled": ("ids", "weights"),
        }
        if self.kind not in needs:
            raise ValueError(f"targets of kind {self.kind!r}: it is one of {', '.join(needs)}")
        for name in needs[self.kind]:
            if getattr(self, name) is None:
                raise ValueError(f"targets of kind {self.kind!r} need {name!r}")

    @property
    def shape(self) -> torch.Size:
        """(B, T)."""
        tensor = self.hidden if self.hidden is not None else self.ids
        assert tensor is not None
        return tensor.shape[:2]


def head_of(model: Any) -> LogitHead:
    """The head of a causal language model of transformers; its tensors are the model's own.

    Raises `ValueError` when the model has no linear output head.
    """
    linear = model.get_output_embeddings()
    weight = getattr(linear, "weight", None)
    if weight is None or weight.dim() != 2:
        raise ValueError(
            f"model of type {model.config.model_type!r}: it has no linear output head, so hidden "
            "states do not determine its logits"
        )
    config = model.config
    family = str(config.model_type).removeprefix("rad_")
    scale = 1.0
    for prefix, key in _DIVIDES.items():
        if family.startswith(prefix):
            scale = float(getattr(config, key))
    for prefix, key in _MULTIPLIES.items():
        if family.startswith(prefix):
            scale = 1 / float(getattr(config, key))
    softcap = getattr(config, "final_logit_softcapping", None)
    return LogitHead(weight, getattr(linear, "bias", None), scale, softcap)


def final_hidden(model: Any, tokens: Tensor, inputs: Mapping[str, Any] | None = None) -> Tensor:
    """Hidden states (B,T,E) after the final norm; `inputs` are further arguments of the model."""
    output = model.base_model(input_ids=tokens, use_cache=False, **(inputs or {}))
    hidden: Tensor = output.last_hidden_state
    return hidden


def rows_hidden(model: Any, tokens: Tensor, boundaries: Tensor | None = None) -> Tensor:
    """`final_hidden` of rows (B,T) of a corpus: (B,T,E).

    With `boundaries` (B,T) every document is run by itself (`rad.data.isolation`).
    """
    if boundaries is None:
        return final_hidden(model, tokens)
    return isolated(lambda part: final_hidden(model, part), tokens, boundaries)


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raise `ValueError` when `head_of(model)` does not reproduce the model's own logits.

    One forward pass of a few tokens; call it once per model, before anything is computed.
    """
    head = head_of(model)
    tokens = torch.arange(PROBE, device=head.weight.device).unsqueeze(0) % head.vocabulary
    was_training = model.training
    model.eval()
    try:
        expected = model(tokens, use_cache=False).logits.float()
        found = head.logits(final_hidden(model, tokens)).float()
    finally:
        model.train(was_training)
    if not bool(torch.isfinite(expected).all()):
        raise ValueError(
            f"model of type {model.config.model_type!r}: its logits are no numbers; check its "
            "weights and dtype"
        )
    # bfloat16 models round their logits; another formula is off by far more
    error = (found - expected).abs().max()
    if not error <= 0.02 * expected.abs().max().clamp_min(1.0):
        raise ValueError(
            f"model of type {model.config.model_type!r}: its logits are not its output head of its "
            f"final hidden states (off by {error.item():.3g}); this family is not supported"
        )


def align_vocabulary(
    student_size: int,
    teacher_size: int,
    tokenizer_size: int,
    *,
    student_tokenizer: str | None = None,
    teacher_tokenizer: str | None = None,
) -> int:
    """How many rows, from the first, of both heads are compared.

    Models of one family pad one vocabulary to different sizes (Qwen2.5: 151,936 and 152,064 rows
    for 151,665 tokens). Equal sizes are compared whole; of different ones the rows that only the
    larger head has are left out on both sides, and probabilities are renormalised without them.
    Raises `ValueError` when the tokenizers differ (by digest; with different sizes both digests
    are needed, since sizes alone cannot tell padding from another vocabulary), or when a head has
    fewer rows than the tokenizer has tokens.
    """
    if (
        student_tokenizer is not None
        and teacher_tokenizer is not None
        and student_tokenizer != teacher_tokenizer
    ):
        raise ValueError(
            f"the teacher's tokenizer ({teacher_tokenizer[:12]}) is not the student's "
            f"({student_tokenizer[:12]}): distillation needs one vocabulary; use a teacher of the "
            "same family"
        )
    for who, size in (("student", student_size), ("teacher", teacher_size)):
        if size < tokenizer_size:
            raise ValueError(
                f"the {who}'s head has {size} rows for a tokenizer of {tokenizer_size} tokens: "
                "distillation needs one vocabulary; use a teacher of the same family"
            )
    if student_size == teacher_size:
        return student_size
    if student_tokenizer is None or teacher_tokenizer is None:
        raise ValueError(
            f"heads of {student_size} (student) and {teacher_size} (teacher) rows: padding of one "
            "vocabulary or two different ones; give the digests of both tokenizers"
        )
    return min(student_size, teacher_size)
