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

from rad.kernels.chunks import ChunkLoop, decay_floor, packed, rows_per_block


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
    for q_t, k_t, v_t, log_a_t in zip(
        q.unbind(1), k.unbind(1), v.unbind(1), log_a.unbind(1), strict=True
    ):
        y, state = gla_step(q_t, k_t, v_t, log_a_t, state)
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
    """Equal to `gla_recurrent` in values, gradients and final state, for any gate; shapes as there.

    T need not be a multiple of `chunk`. Chunks have a power of two of steps, at most `chunk`.
    """
    if chunk < 1:
        raise ValueError(f"chunk {chunk} is no length: give at least 1")
    batch, time, heads, channels = v.shape
    size = k.shape[-1]
    length = 1 << (min(chunk, 1 << (time - 1).bit_length()).bit_length() - 1)
    pad = -time % length
    q, k, v, log_a = packed(q), packed(k), packed(v), packed(log_a)
    if pad:
        # a padded step with k = 0 and log a = 0 leaves the state as it is
        q, k, v, log_a = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (q, k, v, log_a))
    if state is None:
        state = v.new_zeros(batch, heads, channels, size)
    if v.device.type == "cpu" and not torch.compiler.is_compiling():
        row = heads * length * max(length, channels, size)
        rows = rows_per_block(batch, row, v.device)
        y, state = ChunkLoop.apply(  # type: ignore[no-untyped-call]
            _chunk, length, rows, state, v, q, k, log_a
        )
    else:
        y, state = gla_batched(q, k, v, log_a, state, length)
    return y[:, :time], state


def _products(q: Tensor, k: Tensor, log_a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decayed products within a chunk: q, k, log_a (...,Q,N), Q a power of two.

    Returns the causal matrix q_i (a_{j+1} ... a_i) k_j (...,Q,Q), q_i (a_1 ... a_i) (...,Q,N),
    k_j (a_{j+1} ... a_Q) (...,Q,N) and a_1 ... a_Q (...,1,N).

    Blocks are joined in pairs, from single steps on. What leads from one half into the other splits
    at their border, into decays from it and to it, so only products of a <= 1 are ever formed:
    nothing overflows and nothing is divided, for any gate.
    """
    # a sum of log_a per decay, and its exp, would cost more and lose digits to cancellation
    a = log_a.clamp(min=decay_floor(log_a.dtype)).exp()
    from_start, to_end, whole = (t.unsqueeze(-2) for t in (q * a, k, a))  # (...,Q blocks,1,N)
    causal = (q * k).sum(-1)[..., None, None]  # (...,Q blocks,1,1)
    while causal.shape[-3] > 1:
        (q1, q2), (k1, k2), (a1, a2), (c1, c2) = (
            t.unflatten(-3, (-1, 2)).unbind(-3) for t in (from_start, to_end, whole, causal)
        )
        top = torch.cat([c1, torch.zeros_like(c1)], dim=-1)
        bottom = torch.cat([q2 @ k1.transpose(-1, -2), c2], dim=-1)
        causal = torch.cat([top, bottom], dim=-2)
        from_start = torch.cat([q1, q2 * a1], dim=-2)
        to_end = torch.cat([k1 * a2, k2], dim=-2)
        whole = a1 * a2
    return causal.squeeze(-3), from_start.squeeze(-3), to_end.squeeze(-3), whole.squeeze(-3)


def _chunk(v: Tensor, q: Tensor, k: Tensor, log_a: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk, its length a power of two: as `gla_recurrent`."""
    q, k, v, log_a = (t.transpose(1, 2) for t in (q, k, v, log_a))  # (B,H,Q,.)
    causal, from_start, to_end, whole = _products(q, k, log_a)
    y = causal @ v + from_start @ state.transpose(-1, -2)
    return y.transpose(1, 2), torch.addcmul(v.transpose(-1, -2) @ to_end, whole, state)


def gla_batched(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, state: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """All chunks at once, for GPUs and compilers; T a multiple of `length`, the chunk length."""
    q, k, v, log_a = (t.unflatten(1, (-1, length)).transpose(2, 3) for t in (q, k, v, log_a))
    causal, from_start, to_end, whole = _products(q, k, log_a)  # (B,Z,H,.,.)
    before = []
    for update, keep in zip((v.transpose(-1, -2) @ to_end).unbind(1), whole.unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(update, keep, state)
    entering = torch.stack(before, dim=1)  # (B,Z,H,P,N)
    y = causal @ v + from_start @ entering.transpose(-1, -2)  # (B,Z,H,Q,P)
    return y.transpose(2, 3).flatten(1, 2), state
