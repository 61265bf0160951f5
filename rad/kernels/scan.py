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

from rad.kernels.chunks import chunk_length, packed
from rad.kernels.scan_cached import CachedScan


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


def selective_scan_chunked(
    a: Tensor, u: Tensor, c: Tensor, state: Tensor | None = None, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """Equal to `selective_scan_recurrent` in values, gradients and final state. Shapes as there.

    Keeps its inputs and a few states instead of a graph of every step; nothing is divided by a. T
    need not be a multiple of `chunk`.
    """
    if chunk < 1:
        raise ValueError(f"chunk {chunk} is no length: give at least 1")
    if state is None:
        state = torch.zeros_like(u[:, 0])
    a, u, c = packed(a), packed(u), packed(c)
    if u.device.type == "cpu" and not torch.compiler.is_compiling():
        y, last = CachedScan.apply(a, u, c, state, chunk)  # type: ignore[no-untyped-call]
        return y, last
    return selective_scan_batched(a, u, c, state, chunk)


def selective_scan_batched(
    a: Tensor, u: Tensor, c: Tensor, state: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """The same with all chunks side by side, Q + Z steps instead of T, for GPUs and compilers."""
    states = _LinearScan.apply(  # type: ignore[no-untyped-call]
        a.flatten(2), u.flatten(2), state.flatten(1), chunk
    )
    states = states.view(u.shape)
    return (states @ c.unsqueeze(-1)).squeeze(-1), states[:, -1]


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
        # g_t = grad_t + a_{t+1} g_{t+1}
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1).flip(1)
        total = _scan(later, grads[0].flip(1), torch.zeros_like(state), ctx.chunk).flip(1)
        before = torch.cat([state.unsqueeze(1), states[:, :-1]], dim=1)
        return total * before, total, total[:, 0] * a[:, 0], None


def _scan(a: Tensor, u: Tensor, state: Tensor, chunk: int) -> Tensor:
    """All states of the recurrence: a, u (B,T,D), state (B,D) -> S (B,T,D)."""
    time = u.shape[1]
    length, pad = chunk_length(time, chunk)
    if pad:
        # the states of padded steps are cut off again
        a, u = F.pad(a, (0, 0, 0, pad)), F.pad(u, (0, 0, 0, pad))
    a, u = (t.unflatten(1, (-1, length)) for t in (a, u))  # (B,Z,Q,D)
    local = torch.zeros_like(u[:, :, 0])  # (B,Z,D), every chunk from zero
    product = torch.ones_like(local)
    locals_, products = [], []
    for a_t, u_t in zip(a.unbind(2), u.unbind(2), strict=True):
        local, product = torch.addcmul(u_t, a_t, local), product * a_t
        locals_.append(local)
        products.append(product)
    entering = []
    for end, keep in zip(local.unbind(1), product.unbind(1), strict=True):
        entering.append(state)
        state = torch.addcmul(end, keep, state)
    states = torch.addcmul(
        torch.stack(locals_, 2), torch.stack(products, 2), torch.stack(entering, 1).unsqueeze(2)
    )
    return states.flatten(1, 2)[:, :time]
