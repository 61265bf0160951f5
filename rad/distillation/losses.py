"""Distillation losses. Legend: B batch, T time, V vocabulary, E hidden size. Units: nats per token.

`weight` (B,T) is the weight of predicting the token at each position; position 0 never is.

`kl_loss` and `ce_loss` are the plain forms, from logits. Training uses `distillation_loss` and
`ce_loss_from_hidden`, which have the same values and gradients but take hidden states and never
hold logits of more than a chunk of tokens (`rad.distillation.chunked`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rad.distillation import chunked
from rad.distillation.chunked import Comparison, Divergence, Projection
from rad.distillation.targets import LogitHead, Targets

Missing = Literal["bucket", "renormalise"]
AlignmentForm = Literal["root_width", "squared", "relative"]

# --- plain forms ----------------------------------------------------------------------------


def token_kl(teacher_logits: Tensor, student_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward KL(teacher || student) of each position: (..., V) twice -> (...).

    With temperature tau the result carries the factor tau^2 that keeps gradients comparable
    (KL-guided selection, section 2.1).
    """
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    return temperature**2 * (teacher.exp() * (teacher - student)).sum(-1)


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Mean of `values` under `weight`, both of one shape; never divides by zero."""
    return (values * weight).sum() / weight.sum().clamp_min(1e-8)


def kl_loss(
    teacher_logits: Tensor, student_logits: Tensor, weight: Tensor, temperature: float = 1.0
) -> Tensor:
    """Weighted mean forward KL of next-token distributions: logits (B,T,V), weight (B,T)."""
    values = token_kl(teacher_logits[:, :-1], student_logits[:, :-1], temperature)
    return weighted_mean(values, weight[:, 1:])


def ce_loss(student_logits: Tensor, tokens: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean next-token cross entropy: logits (B,T,V), tokens and weight (B,T)."""
    values = F.cross_entropy(
        student_logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none"
    )
    return weighted_mean(values, weight[:, 1:])


# --- from hidden states ---------------------------------------------------------------------


def distillation_loss(
    hidden: Tensor,
    head: LogitHead,
    targets: Targets,
    weight: Tensor,
    *,
    kind: Divergence = "forward_kl",
    temperature: float = 1.0,
    vocabulary: int | None = None,
    missing: Missing = "bucket",
    chunk: int | None = None,
) -> Tensor:
    """Weighted mean over next-token predictions of a divergence between teacher p and student q.

    hidden (B,T,E) of the student after its final norm, weight (B,T) -> scalar, times tau^2.
    kind `forward_kl` KL(p || q); `reverse_kl` KL(q || p); `jsd`; `ce_teacher` -sum p log q, the
    gradient of forward KL without the teacher's entropy (MOHAWK, retrieval-aware distillation).
    `vocabulary`: rows of the heads that count (`targets.align_vocabulary`); needed when their
    numbers differ. `missing`: what a top-k teacher's other tokens are. `bucket` makes one class of
    them, whose optimum keeps the teacher's k probabilities; `renormalise` spreads their mass over
    the k, which biases the student towards them (sparse logit sampling, arXiv 2503.16870).
    `chunk`: tokens whose logits exist at a time.
    Gradients reach `hidden` and, where they require one, the head's weight and bias; only once.
    Raises `ValueError` on shapes or vocabularies that differ, and on a loss that the targets cannot
    give (a sampled teacher has no reverse KL).
    """
    rows, size = _prepare(hidden, head, targets, vocabulary, chunk)
    if weight.shape != hidden.shape[:2]:
        raise ValueError(f"weight {tuple(weight.shape)} for hidden {tuple(hidden.shape)}: (B,T)")
    flat = weight[:, 1:].reshape(-1).to(torch.promote_types(hidden.dtype, torch.float32))
    coefficients = flat * (temperature**2 / flat.sum().clamp_min(1e-8))
    dtype = chunked.matmul_dtype(hidden)
    total: Tensor = chunked.WeightedSum.apply(  # type: ignore[no-untyped-call]
        hidden[:, :-1].flatten(0, 1),
        head.weight,
        head.bias,
        coefficients,
        Projection.of(head, rows, dtype, temperature),
        _comparison(targets, dtype, rows, kind, temperature, missing),
        size,
        torch.is_grad_enabled(),
    )
    return total


def distillation_values(
    hidden: Tensor,
    head: LogitHead,
    targets: Targets,
    *,
    kind: Divergence = "forward_kl",
    temperature: float = 1.0,
    vocabulary: int | None = None,
    missing: Missing = "bucket",
    chunk: int | None = None,
) -> Tensor:
    """What `distillation_loss` averages: (B,T-1), without gradients; `weight[:, 1:]` fits it."""
    rows, size = _prepare(hidden, head, targets, vocabulary, chunk)
    dtype = chunked.matmul_dtype(hidden)
    values = chunked.token_values(
        hidden[:, :-1].flatten(0, 1),
        Projection.of(head, rows, dtype, temperature),
        _comparison(targets, dtype, rows, kind, temperature, missing),
        size,
    )
    return temperature**2 * values.view(len(hidden), -1)


def ce_loss_from_hidden(
    hidden: Tensor, head: LogitHead, tokens: Tensor, weight: Tensor, *, chunk: int | None = None
) -> Tensor:
    """`ce_loss` from hidden states (B,T,E): tokens and weight (B,T) -> scalar."""
    if weight.shape != hidden.shape[:2] or tokens.shape != weight.shape:
        raise ValueError(
            f"tokens {tuple(tokens.shape)} and weight {tuple(weight.shape)} for hidden "
            f"{tuple(hidden.shape)}: (B,T)"
        )
    flat = weight[:, 1:].reshape(-1).to(torch.promote_types(hidden.dtype, torch.float32))
    ids = tokens[:, 1:].reshape(-1)
    total: Tensor = chunked.WeightedSum.apply(  # type: ignore[no-untyped-call]
        hidden[:, :-1].flatten(0, 1),
        head.weight,
        head.bias,
        flat / flat.sum().clamp_min(1e-8),
        Projection.of(head, head.vocabulary, chunked.matmul_dtype(hidden), 1.0),
        lambda logits, at: chunked.labels(logits, ids[at]),
        chunk or chunked.chunk_tokens(head.vocabulary, hidden.device),
        torch.is_grad_enabled(),
    )
    return total


def _prepare(
    hidden: Tensor, head: LogitHead, targets: Targets, vocabulary: int | None, chunk: int | None
) -> tuple[int, int]:
    """(rows of the heads that are compared, tokens per chunk)."""
    if hidden.dim() != 3 or targets.shape != hidden.shape[:2]:
        raise ValueError(
            f"hidden states {tuple(hidden.shape)} and targets for {tuple(targets.shape)} positions "
            "are not of one batch"
        )
    sizes = {"student": head.vocabulary}
    if targets.head is not None:
        sizes["teacher"] = targets.head.vocabulary
    if vocabulary is None and len(set(sizes.values())) > 1:
        raise ValueError(
            f"heads of {sizes['student']} (student) and {sizes['teacher']} (teacher) rows: give "
            "`vocabulary`, see align_vocabulary"
        )
    rows = head.vocabulary if vocabulary is None else vocabulary
    for who, size in sizes.items():
        if rows > size:
            raise ValueError(f"vocabulary {rows} is above the {size} rows of the {who}'s head")
    return rows, chunk or chunked.chunk_tokens(rows, hidden.device)


def _teacher(
    targets: Targets, dtype: torch.dtype, rows: int, temperature: float
) -> tuple[Tensor, Projection]:
    """The teacher's hidden states (N,E) and how they become logits."""
    assert targets.hidden is not None and targets.head is not None
    # a teacher of another dtype keeps its own, as its logits would
    kind = dtype if targets.hidden.dtype == torch.float32 else targets.hidden.dtype
    hidden = targets.hidden.detach()[:, :-1].flatten(0, 1)
    return hidden, Projection.of(targets.head, rows, kind, temperature)


def _comparison(
    targets: Targets,
    dtype: torch.dtype,
    rows: int,
    kind: Divergence,
    temperature: float,
    missing: Missing,
) -> Comparison:
    """The chunk-wise comparison with a teacher's targets at the tokens before the last."""
    if targets.kind == "hidden":
        hidden, project = _teacher(targets, dtype, rows, temperature)
        return lambda logits, at: chunked.dense(kind, logits, project(hidden[at]).to(logits.dtype))
    if targets.temperature != temperature:
        raise ValueError(
            f"the teacher's outputs were stored at temperature {targets.temperature:g}, the loss "
            f"asks for {temperature:g}; store hidden states or store them again"
        )
    assert targets.ids is not None
    ids = targets.ids[:, :-1].flatten(0, 1)  # (N,K)
    if targets.kind == "top_k":
        assert targets.log_probs is not None
        log_probs = targets.log_probs[:, :-1].flatten(0, 1)
        if missing not in ("bucket", "renormalise"):
            raise ValueError(f"missing={missing!r}: it is 'bucket' or 'renormalise'")
        compare = chunked.bucketed if missing == "bucket" else chunked.renormalised
        return lambda logits, at: compare(kind, logits, ids[at], log_probs[at])
    if kind not in ("forward_kl", "ce_teacher"):
        raise ValueError(f"a sampled teacher gives forward_kl and ce_teacher, not {kind!r}")
    assert targets.weights is not None
    weights = targets.weights[:, :-1].flatten(0, 1)
    if kind == "ce_teacher":
        return lambda logits, at: chunked.sampled(logits, ids[at], weights[at])
    if targets.entropy is None:
        raise ValueError("a sampled teacher without `entropy` gives ce_teacher, not forward_kl")
    entropy = targets.entropy[:, :-1].flatten()

    def forward_kl(logits: Tensor, at: slice) -> chunked.Compared:
        values, gradient = chunked.sampled(logits, ids[at], weights[at])
        return values - entropy[at], gradient

    return forward_kl


# --- alignment of layer outputs -------------------------------------------------------------


def alignment_loss(
    target: Tensor, output: Tensor, weight: Tensor, form: AlignmentForm = "root_width"
) -> Tensor:
    """Weighted mean over tokens of a distance: target, output (B,T,E), weight (B,T) -> scalar.

    `root_width`: ||target - output||_2 / sqrt(E), not squared: stage 1 as run by the code of
    KL-guided selection (stage 1 of its text); times sqrt(E) it is what the code of
    retrieval-aware distillation runs (section 5.1). `squared`: ||target - output||_2^2, as both
    papers print it; over E it is the mean squared error. `relative`: `squared` over the target's
    own ||target||_2^2, the same for layers of any output scale.
    Raises `ValueError` on another form.
    """
    if form not in ALIGNMENT_FORMS:
        raise ValueError(f"alignment form {form!r}: it is one of {', '.join(ALIGNMENT_FORMS)}")
    return ALIGNMENT_FORMS[form](target, output, weight)


def _root_width(target: Tensor, output: Tensor, weight: Tensor) -> Tensor:
    # the small constant keeps the gradient of the norm finite where the output is exact
    distance: Tensor = ((target - output).float().square().sum(-1) + 1e-12).sqrt()
    mean: Tensor = weighted_mean(distance, weight) / target.shape[-1] ** 0.5
    return mean


def _squared(target: Tensor, output: Tensor, weight: Tensor) -> Tensor:
    return weighted_mean((target - output).float().square().sum(-1), weight)


def _relative(target: Tensor, output: Tensor, weight: Tensor) -> Tensor:
    squared = (target - output).float().square().sum(-1)
    return weighted_mean(squared / target.float().square().sum(-1).clamp_min(1e-12), weight)


ALIGNMENT_FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "root_width": _root_width,
    "squared": _squared,
    "relative": _relative,
}
