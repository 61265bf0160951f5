"""Selective scan: a linear recurrence with its own decay for every channel and state.

    S_t = a_t * S_{t-1} + u_t          elementwise, a_t in [0, 1]
    y_t = S_t c_t

Gu & Dao 2023 (arXiv 2312.00752, Mamba, section 3.3); Longhorn has the same form. Legend: B batch,
T time, H heads, P value channels per head, N state dim, Z chunks, Q chunk length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan_step(a: Tensor, u: Tensor, c: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One step: a, u, state (B,H,P,N), c (B,H,N) -> y (B,H,P), S (B,H,P,N)."""
    state = torch.addcmul(u, a, state)
    return (state @ c.unsqueeze(-1)).squeeze(-1), state


def selective_scan_recurrent(
    a: Tensor, u: Tensor, c: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The plain recurrence: a, u (B,T,H,P,N), c (B,T,H,N) -> y (B,T,H,P), S (B,H,P,N)."""
    if state is None:
        state = torch.zeros_like(u[:, 0])
    outputs = []
    # unbind, not a[:, t]: indexing writes a full-size zero gradient at every step
    for step in zip(a.unbind(1), u.unbind(1), c.unbind(1), strict=True):
        y, state = selective_scan_step(*step, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def _scan(a: Tensor, u: Tensor, state: Tensor, chunk: int) -> Tensor:
    """All states of the recurrence: a, u (B,T,D), state (B,D) -> S (B,T,D)."""
    batch, time, size = u.shape
    length = min(chunk, time)
    pad = -time % length
    if pad:
        # a padded step has u = 0; its state is cut off again
        a, u = F.pad(a, (0, 0, 0, pad)), F.pad(u, (0, 0, 0, pad))
    a, u = (t.reshape(batch, -1, length, size) for t in (a, u))  # (B,Z,Q,D)
    local = torch.zeros_like(u[:, :, 0])  # (B,Z,D), every chunk from zero
    product = torch.ones_like(local)
    locals_, products = [], []
    for a_t, u_t in zip(a.unbind(2), u.unbind(2), strict=True):
        local = torch.addcmul(u_t, a_t, local)
        product = product * a_t
        locals_.append(local)
        products.append(product)
    entering = []
    for end, keep in zip(local.unbind(1), product.unbind(1), strict=True):
        entering.append(state)
        state = torch.addcmul(end, keep, state)
    states = torch.addcmul(
        torch.stack(locals_, 2), torch.stack(products, 2), torch.stack(entering, 1).unsqueeze(2)
    )
    return states.reshape(batch, time + pad, size)[:, :time]


class _LinearScan(torch.autograd.Function):
    """S_t = a_t * S_{t-1} + u_t for all t; its gradient is the same recurrence run backwards."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, u: Tensor, state: Tensor, chunk: int) -> Tensor:
        states = _scan(a, u, state, chunk)
        ctx.save_for_backward(a, states, state)
        ctx.chunk = chunk
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        a, states, state = ctx.saved_tensors
        (grad,) = grads
        # g_t = grad_t + a_{t+1} g_{t+1}
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1).flip(1)
        total = _scan(later, grad.flip(1), torch.zeros_like(state), ctx.chunk).flip(1)
        before = torch.cat([state.unsqueeze(1), states[:, :-1]], dim=1)
        return total * before, total, total[:, 0] * a[:, 0], None


def selective_scan_chunked(
    a: Tensor, u: Tensor, c: Tensor, state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Equal to `selective_scan_recurrent` in values, gradients and final state. Shapes as there."""
    if state is None:
        state = torch.zeros_like(u[:, 0])
    flat = _LinearScan.apply(a.flatten(2), u.flatten(2), state.flatten(1), chunk)
    states = flat.view(u.shape)
    y = (states @ c.unsqueeze(-1)).squeeze(-1)
    return y, states[:, -1]
