"""Distillation losses. Legend: B batch, T time, V vocabulary, E hidden size. Units: nats per token.

`weight` (B,T) is the weight of predicting the token at each position; position 0 never is.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


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


def alignment_loss(target: Tensor, output: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean over tokens of ||target - output||_2 / sqrt(E): (B,T,E) twice, weight (B,T).

    Stage 1 as run by KL-guided selection (not squared; its sheet, section 2.1).
    """
    # the small constant keeps the gradient of the norm finite where the output is exact
    distance: Tensor = ((target - output).float().square().sum(-1) + 1e-12).sqrt()
    mean: Tensor = weighted_mean(distance, weight) / target.shape[-1] ** 0.5
    return mean
