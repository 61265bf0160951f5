"""Gated delta rule: a linear recurrence that erases what a key held before it writes anew.

    S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T    a_t in (0, 1], one per head
    y_t = S_t q_t

Yang, Kautz & Hatamizadeh 2024 (arXiv 2412.06464); the chunked form solves the unit lower triangular
system of the WY representation (Yang et al. 2024, arXiv 2406.06484, section 3). The caller
normalises k and scales q. Legend: B batch, T time, H heads, P value channels per head, N key dim,
Z chunks, Q chunk length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rad.kernels.chunks import chunk_length, decay_floor, decay_sums, packed, segment_of
from rad.kernels.delta_cached import CachedGatedDelta


def gated_delta_step(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: q, k (B,H,N), v (B,H,P), log_a, beta (B,H), state (B,H,P,N) -> y (B,H,P), S."""
    state = log_a.exp()[..., None, None] * state
    seen = (state @ k.unsqueeze(-1)).squeeze(-1)  # (B,H,P), what the state returns for this key
    write = beta.unsqueeze(-1) * (v - seen)
    state = torch.addcmul(state, write.unsqueeze(-1), k.unsqueeze(-2))
    return (state @ q.unsqueeze(-1)).squeeze(-1), state


def gated_delta_recurrent(
    q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, beta: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The plain recurrence: q, k (B,T,H,N), v (B,T,H,P), log_a, beta (B,T,H) -> y, S (B,H,P,N)."""
    if state is None:
        state = v.new_zeros(v.shape[0], *v.shape[2:], k.shape[-1])
    outputs = []
    # unbind, not q[:, t]: indexing writes a full-size zero gradient at every step
    for q_t, k_t, v_t, log_a_t, beta_t in zip(
        q.unbind(1), k.unbind(1), v.unbind(1), log_a.unbind(1), beta.unbind(1), strict=True
    ):
        y, state = gated_delta_step(q_t, k_t, v_t, log_a_t, beta_t, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


def gated_delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Equal to `gated_delta_recurrent` in values, gradients and final state.

    Shapes as there. T need not be a multiple of `chunk`, the greatest chunk length.
    """
    time = v.shape[1]
    length, pad = chunk_length(time, chunk)
    q, k, v = packed(q), packed(k), packed(v)
    if pad:
        # a padded step with beta = 0 and log a = 0 leaves the state as it is
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (q, k, v))
        log_a, beta = F.pad(log_a, (0, 0, 0, pad)), F.pad(beta, (0, 0, 0, pad))
    if v.device.type == "cpu" and not torch.compiler.is_compiling():
        y, state = CachedGatedDelta.apply(  # type: ignore[no-untyped-call]
            q, k, v, log_a, beta, state, length
        )
    else:
        y, state = gated_delta_batched(q, k, v, log_a, beta, state, length)
    return y[:, :time], state


def gated_delta_batched(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    beta: Tensor,
    state: Tensor | None,
    length: int,
) -> tuple[Tensor, Tensor]:
    """All chunks at once, for GPUs and compilers; T a multiple of `length`, the chunk length."""
    batch, _, heads, channels = v.shape

    def split(t: Tensor) -> Tensor:
        chunks: Tensor = t.unflatten(1, (-1, length))
        return chunks.transpose(2, 3)  # (B,Z,H,Q,.)

    q, k, v, beta = split(q), split(k), split(v), split(beta.unsqueeze(-1))
    sums = decay_sums(split(log_a.unsqueeze(-1)).squeeze(-1))  # (B,Z,H,Q)
    segment = segment_of(sums)
    floor = decay_floor(v.dtype)
    from_start = sums.clamp(min=floor).exp().unsqueeze(-1)  # (B,Z,H,Q,1)
    transposed = k.transpose(-1, -2)
    scaled = beta * k
    system = (scaled @ transposed) * segment  # its diagonal is read as one by the solver
    right = torch.cat([beta * v, from_start * scaled], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    writes, reads = solved.split([channels, k.shape[-1]], dim=-1)  # (B,Z,H,Q,P), (B,Z,H,Q,N)
    within = (q @ transposed) * segment
    keys = k * (sums[..., -1:] - sums).clamp(min=floor).exp().unsqueeze(-1)
    if state is None:
        state = v.new_zeros(batch, heads, channels, k.shape[-1])
    parts = (writes, reads, within, q * from_start, keys, from_start[..., -1:, :])
    outputs = []
    for w_z, r_z, a_z, q_z, k_z, carry in zip(*(t.unbind(1) for t in parts), strict=True):
        entering = state.transpose(-1, -2)  # (B,H,N,P)
        new = w_z - r_z @ entering
        outputs.append(q_z @ entering + a_z @ new)
        state = torch.addcmul(new.transpose(-1, -2) @ k_z, carry, state)
    # (B,Z,H,Q,P) -> (B,T,H,P)
    return torch.stack(outputs, dim=1).transpose(2, 3).flatten(1, 2), state
