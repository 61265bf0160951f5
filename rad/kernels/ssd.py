"""State-space duality: the recurrence behind Mamba-2 and its chunked, matmul-rich form.

    S_t = a_t S_{t-1} + x_t B_t^T          S in R^{P x N}, a_t in (0, 1] one scalar per head
    y_t = S_t C_t

Dao & Gu 2024 (arXiv 2405.21060), section 6. The caller folds the time step into x and adds the
skip D x. Legend: B batch, T time, H heads, P value channels per head, N state dim, Q chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd_recurrent(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The plain recurrence: x (B,T,H,P), log_a (B,T,H), b, c (B,T,H,N) -> y, S (B,H,P,N)."""
    batch, _, heads, channels = x.shape
    if state is None:
        state = x.new_zeros(batch, heads, channels, b.shape[-1])
    outputs = []
    # unbind, not x[:, t]: indexing writes a full-size zero gradient at every step
    for x_t, log_a_t, b_t, c_t in zip(
        x.unbind(1), log_a.unbind(1), b.unbind(1), c.unbind(1), strict=True
    ):
        update = x_t.unsqueeze(-1) * b_t.unsqueeze(-2)  # (B,H,P,N)
        state = log_a_t.exp()[..., None, None] * state + update
        outputs.append((state @ c_t.unsqueeze(-1)).squeeze(-1))  # (B,H,P)
    return torch.stack(outputs, dim=1), state


def ssd_chunked(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Equal to `ssd_recurrent` in values, gradients and final state; quadratic only within a chunk.

    Shapes as there. T need not be a multiple of `chunk`.
    """
    batch, time, heads, channels = x.shape
    size = b.shape[-1]
    q = min(chunk, time)
    pad = -time % q
    if pad:
        # a padded step with x = 0 and log a = 0 leaves the state as it is
        x, b, c = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, b, c))
        log_a = F.pad(log_a, (0, 0, 0, pad))
    chunks = (time + pad) // q

    def split(t: Tensor) -> Tensor:
        return t.reshape(batch, chunks, q, heads, t.shape[-1]).transpose(2, 3)  # (B,Z,H,Q,.)

    x, b, c = split(x), split(b), split(c)
    decay = log_a.reshape(batch, chunks, q, heads).transpose(2, 3).cumsum(-1)  # (B,Z,H,Q)
    # mask before exp: the upper triangle would overflow and poison the gradient
    upper = torch.ones(q, q, dtype=torch.bool, device=x.device).triu(1)
    segment = (decay.unsqueeze(-1) - decay.unsqueeze(-2)).masked_fill(upper, float("-inf")).exp()
    y = ((c @ b.transpose(-1, -2)) * segment) @ x  # (B,Z,H,Q,P)

    to_end = (decay[..., -1:] - decay).exp()  # (B,Z,H,Q)
    updates = (x * to_end.unsqueeze(-1)).transpose(-1, -2) @ b  # (B,Z,H,P,N)
    if state is None and chunks == 1:
        # nothing enters the only chunk, the common case of short rows
        y = y.transpose(2, 3).reshape(batch, time + pad, heads, channels)
        return y[:, :time], updates.squeeze(1)
    carry = decay[..., -1].exp()[..., None, None]  # (B,Z,H,1,1)
    if state is None:
        state = x.new_zeros(batch, heads, channels, size)
    before = []
    for update, keep in zip(updates.unbind(1), carry.unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(update, keep, state)
    entering = torch.stack(before, dim=1)  # (B,Z,H,P,N)
    y = y + decay.exp().unsqueeze(-1) * (c @ entering.transpose(-1, -2))
    y = y.transpose(2, 3).reshape(batch, time + pad, heads, channels)
    return y[:, :time], state
