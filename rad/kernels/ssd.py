"""State-space duality: the recurrence behind Mamba-2 and its chunked, matmul-rich form.

    S_t = a_t S_{t-1} + x_t b_t^T          S in R^{P x N}, a_t in (0, 1] one scalar per head
    y_t = S_t c_t

Dao & Gu 2024 (arXiv 2405.21060), section 6. The caller folds the time step into x and adds the
skip D x. Legend: B batch, T time, H heads, P value channels per head, N state dim, G groups of
heads that share b and c, R = H / G heads per group, Z chunks, Q chunk length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rad.kernels.chunks import chunk_length, decay_floor, decay_sums, packed, segment_of
from rad.kernels.ssd_cached import CachedSSD


def _per_head(t: Tensor, heads: int) -> Tensor:
    """Repeat grouped b or c (..., G, N) to (..., H, N); head h reads group h // (H // G)."""
    groups = t.shape[-2]
    if heads % groups:
        raise ValueError(f"{groups} groups do not divide {heads} heads: choose a divisor")
    return t if groups == heads else t.repeat_interleave(heads // groups, dim=-2)


def ssd_step(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: x (B,H,P), log_a (B,H), b (B,G,N), c (B,G',N), state (B,H,P,N) -> y (B,H,P), S."""
    heads = x.shape[-2]
    b, c = _per_head(b, heads), _per_head(c, heads)
    update = x.unsqueeze(-1) * b.unsqueeze(-2)  # (B,H,P,N)
    state = torch.addcmul(update, log_a.exp()[..., None, None], state)
    return (state @ c.unsqueeze(-1)).squeeze(-1), state


def ssd_recurrent(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The plain recurrence: x (B,T,H,P), log_a (B,T,H), b (B,T,G,N), c (B,T,G',N) -> y, S.

    y (B,T,H,P), S (B,H,P,N). Raises ValueError where the groups of b or c do not divide the heads.
    """
    if state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:], b.shape[-1])
    outputs = []
    # unbind, not x[:, t]: indexing writes a full-size zero gradient at every step
    for x_t, log_a_t, b_t, c_t in zip(
        x.unbind(1), log_a.unbind(1), b.unbind(1), c.unbind(1), strict=True
    ):
        y, state = ssd_step(x_t, log_a_t, b_t, c_t, state)
        outputs.append(y)
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

    Shapes and errors as there. T need not be a multiple of `chunk`, the greatest chunk length.
    """
    batch, time, heads, channels = x.shape
    if b.shape[2] != c.shape[2] or heads % b.shape[2]:
        b, c = _per_head(b, heads), _per_head(c, heads)
    groups, size = b.shape[2:]
    length, pad = chunk_length(time, chunk)
    x, b, c = packed(x), packed(b), packed(c)
    if pad:
        # a padded step with x = 0 and log a = 0 leaves the state as it is
        x, b, c = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (x, b, c))
        log_a = F.pad(log_a, (0, 0, 0, pad))
    shared = (batch, time + pad, groups, heads // groups)
    if state is not None:
        state = state.reshape(batch, groups, -1, size)  # (B,G,R P,N)
    cached = x.device.type == "cpu" and not torch.compiler.is_compiling()
    function = CachedSSD.apply if cached else ssd_batched
    y, last = function(x.reshape(*shared, channels), log_a.reshape(shared), b, c, state, length)
    y = y.reshape(batch, time + pad, heads, channels)
    return y[:, :time], last.reshape(batch, heads, channels, size)


def ssd_batched(
    x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor | None, length: int
) -> tuple[Tensor, Tensor]:
    """All chunks at once, for GPUs and compilers; T a multiple of `length`, the chunk length.

    x (B,T,G,R,P), log_a (B,T,G,R), b, c (B,T,G,N), state (B,G,R P,N) -> y (B,T,G,R,P), last state.
    """
    batch, _, groups, share, channels = x.shape
    x_z = x.unflatten(1, (-1, length)).permute(0, 1, 3, 4, 2, 5)  # (B,Z,G,R,Q,P)
    b, c = (t.unflatten(1, (-1, length)).transpose(2, 3) for t in (b, c))  # (B,Z,G,Q,N)
    sums = decay_sums(log_a.unflatten(1, (-1, length)).permute(0, 1, 3, 4, 2))  # (B,Z,G,R,Q)
    scores = (c @ b.transpose(-1, -2)).unsqueeze(3)  # (B,Z,G,1,Q,Q), once per group
    y = (scores * segment_of(sums)) @ x_z
    floor = decay_floor(x.dtype)
    to_end = (sums[..., -1:] - sums).clamp(min=floor).exp().unsqueeze(-1)
    ending = (x_z * to_end).transpose(-1, -2).flatten(3, 4)  # (B,Z,G,R P,Q)
    from_start = sums.clamp(min=floor).exp().unsqueeze(-1)  # (B,Z,G,R,Q,1)
    # (B,Z,G,R,1,1) -> (B,Z,G,R P,1)
    carry = from_start[..., -1:, :].expand(-1, -1, -1, -1, channels, 1).flatten(3, 4)
    if state is None:
        state = x.new_zeros(batch, groups, share * channels, b.shape[-1])
    before = []
    for update, keep in zip((ending @ b).unbind(1), carry.unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(update, keep, state)
    entering = torch.stack(before, dim=1)  # (B,Z,G,R P,N)
    read = (entering @ c.transpose(-1, -2)).unflatten(3, (share, channels))  # (B,Z,G,R,P,Q)
    y = y + from_start * read.transpose(-1, -2)
    return y.permute(0, 1, 4, 2, 3, 5).flatten(1, 2), state
