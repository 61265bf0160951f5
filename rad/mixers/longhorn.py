"""Longhorn (arXiv 2407.14207), a state space model from online regression, in Mamba-1's place.

    as `mamba` but for the dynamics, with k = B:
    beta    = sigmoid(W_up W_down u + dt_bias)         one per channel
    delta   = beta / (1 + beta |k|^2)
    S_t     = (1 - delta k k) * S_{t-1} + delta x_t k_t^T      k k elementwise

The authors of RAD report numerical instability (appendix B.2). `1 - delta k_j^2` cancels when one
key channel dominates, and |k|^2 overflows in half precision; here the decay is the equal ratio
(1 + beta (|k|^2 - k_j^2)) / (1 + beta |k|^2), in float32, which stays in (0, 1] for any finite key.
Legend as in `mamba`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rad.mixers.base import promote
from rad.mixers.mamba import Mamba


class Longhorn(Mamba):
    """Implicit online-regression update; no decay parameter of its own."""

    def _add_decay(self, channels: int) -> None:
        """The decay follows from the keys."""

    def _dynamics(
        self, x: Tensor, dt: Tensor, b: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Decay and update of the state: x, dt, b (B,T,M*J,N) -> (B,T,M*J,N,N) twice."""
        beta, key = dt.sigmoid(), promote(b)
        if valid is not None:
            beta = beta * valid[..., None, None]  # beta = 0: the state stays
        square = key.square()
        others = others_sum(square)
        total = 1 + beta * square.sum(-1, keepdim=True)  # (B,T,M*J,N)
        decay = (1 + beta.unsqueeze(-1) * others.unsqueeze(-2)) / total.unsqueeze(-1)
        return decay, (beta / total * x).unsqueeze(-1) * key.unsqueeze(-2)


def others_sum(square: Tensor) -> Tensor:
    """Sum over the other entries of the last dimension, without subtracting: (...,N) -> (...,N)."""
    size = square.shape[-1]
    rest = 1 - torch.eye(size, dtype=square.dtype, device=square.device)
    return square @ rest
