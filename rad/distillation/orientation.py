"""Matrix orientation (stage 1 of MOHAWK, arXiv 2408.10189): mixers learn attention's matrices.

    attention   y = softmax(Q K^T / sqrt(d)) V             M_teacher (B,H,T,T)
    SSD         y_t = sum_s M_ts x_s + ...                 M_ts = C_t . B_s prod_{s<r<=t} a_r dt_s
                                                           and D on the diagonal

What a mixer does after the sum (gate, norm) and before it (conv of x) is not in the matrix. T x T
matrices are written out: for short rows. Legend: B batch, T time, H heads, M heads of the mixer, N
state dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rad.mixers.base import Mixer, promote, take_kv
from rad.mixers.discrete_mamba2 import DiscreteMamba2
from rad.mixers.mamba2 import Mamba2


def orientation_loss(attention: Tensor, mixer: Tensor) -> Tensor:
    """Mean over batch and heads of ||attention - mixer||_F: (B,M,T,T) twice -> scalar."""
    squared = (promote(attention) - promote(mixer)).square().sum((-2, -1))
    # the small constant keeps the gradient of the norm finite where the matrix is exact
    return (squared + 1e-12).sqrt().mean()


def mixer_matrix(mixer: Mixer, u: Tensor) -> Tensor:
    """The matrix (B,M,T,T) that `mixer` applies along time to its x on input u (B,T,E).

    Raises `ValueError` for a mixer that is not of the SSD kind.
    """
    if type(mixer) not in _PARTS:
        raise ValueError(
            f"matrix orientation: mixer {mixer.settings['type']!r} has no matrix here; use mamba2 "
            "or discrete_mamba2"
        )
    b, c, log_a, step, skip = _PARTS[type(mixer)](mixer, u)
    total = log_a.cumsum(1).transpose(1, 2)  # (B,M,T)
    time = total.shape[-1]
    future = torch.ones(time, time, dtype=torch.bool, device=total.device).triu(1)
    # masked before exp: above the diagonal the sums are positive and would overflow
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()
    scores = torch.einsum("btmn,bsmn->bmts", promote(c), promote(b))
    matrix = scores * decay * step.transpose(1, 2).unsqueeze(-2)
    return matrix + torch.diag_embed(promote(skip).unsqueeze(-1).expand(-1, time))


# each: mixer, u (B,T,E) -> b, c (B,T,M,N), log_a, step (B,T,M), skip (M,)
Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _mamba2(mixer: Any, u: Tensor) -> Parts:
    heads, dim = len(mixer.owned), mixer.geometry.head_dim
    _, xbc, dt = mixer.in_proj(u).split([mixer.sizes[0], mixer.conv_channels, heads], dim=-1)
    _, b, c = F.silu(mixer.convolve(xbc, {}, None)[0]).split(mixer.sizes[1:4], dim=-1)
    b = take_kv(b.view(*u.shape[:2], -1, dim), 2, mixer.kv_of)
    step = F.softplus(promote(dt) + promote(mixer.dt_bias))
    return b, c.view(*u.shape[:2], heads, dim), -promote(mixer.A_log).exp() * step, step, mixer.D


def _discrete_mamba2(mixer: Any, u: Tensor) -> Parts:
    heads = (*u.shape[:2], len(mixer.owned), -1)
    xbc, _, alpha = mixer.in_proj(u).split([mixer.conv_channels, *mixer.sizes[3:]], dim=-1)
    _, b, c = mixer.convolve(xbc, {}, None)[0].split(mixer.sizes[:3], dim=-1)
    log_a = -F.softplus(promote(alpha))
    return b.view(heads), c.view(heads), log_a, torch.ones_like(log_a), mixer.D


_PARTS: dict[type[Mixer], Callable[[Any, Tensor], Parts]] = {
    Mamba2: _mamba2,
    DiscreteMamba2: _discrete_mamba2,
}
