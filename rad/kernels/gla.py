"""Gated linear attention: a decay of its own for every key channel.

    S_t = S_{t-1} diag(a_t) + v_t k_t^T          a_t in (0, 1]^N
    y_t = S_t q_t

Yang et al. 2023 (arXiv 2312.06635), section 4. Legend: B batch, T time, H heads, P value channels
per head, N key dim, Z chunks, Q chunk length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gla_step(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: q, k, log_a (B,H,N), v (B,H,P), state (B,H,P,N) -> y (B,H,P), S."""
    update = v.unsqueeze(-1) * k.unsqueeze(-2)  # (B,H,P,N)
    state = torch.addcmul(update, log_a.exp().unsqueeze(-2), state)
    return (state @ q.unsqueeze(-1)).squeeze(-1), state


def gla_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The plain recurrence: q, k, log_a (B,T,H,N), v (B,T,H,P) -> y (B,T,H,P), S (B,H,P,N)."""
    if state is None:
        state = v.new_zeros(v.shape[0], *v.shape[2:], k.shape[-1])
    outputs = []
    # unbind, not q[:, t]: indexing writes a full-size zero gradient at every step
    for step in zip(*(t.unbind(1) for t in (q, k, v, log_a)), strict=True):
        y, state = gla_step(*step, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def gla_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Equal to `gla_recurrent` in values, gradients and final state. Shapes as there."""
    batch, time, heads, channels = v.shape
    length = min(chunk, time)
    pad = -time % length
    if pad:
        # a padded step with k = 0 and log a = 0 leaves the state as it is
        q, k, v, log_a = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (q, k, v, log_a))
    chunks = (time + pad) // length

    def split(t: Tensor) -> Tensor:
        return t.reshape(batch, chunks, length, heads, -1).transpose(2, 3)  # (B,Z,H,Q,.)

    q, k, v, log_a = split(q), split(k), split(v), split(log_a)
    decay = log_a.cumsum(-2)  # (B,Z,H,Q,N)
    upper = torch.ones(length, length, dtype=torch.bool, device=v.device).triu(1).unsqueeze(-1)
    differences = decay.unsqueeze(-2) - decay.unsqueeze(-3)  # (B,Z,H,Q,Q,N)
    segment = differences.masked_fill(upper, float("-inf")).exp()
    y = torch.einsum("...in,...ijn,...jn->...ij", q, segment, k) @ v
    if state is None:
        state = v.new_zeros(batch, heads, channels, k.shape[-1])
    updates = v.transpose(-1, -2) @ (k * (decay[..., -1:, :] - decay).exp())  # (B,Z,H,P,N)
    before = []
    for update, keep in zip(updates.unbind(1), decay[..., -1:, :].exp().unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(update, keep, state)
    entering = torch.stack(before, dim=1)
    y = y + (q * decay.exp()) @ entering.transpose(-1, -2)
    y = y.transpose(2, 3).reshape(batch, time + pad, heads, channels)
    return y[:, :time], state
