"""The mixer that does nothing: the attention of the owned heads is removed (RAD's draft model)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rad.mixer_settings import SkipSettings
from rad.mixers.base import Mixer, State


class Skip(Mixer):
    """Zero output, no parameters, no state."""

    initialisations = SkipSettings.starts

    def forward(
        self,
        u: Tensor,
        state: State | None = None,
        valid: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """u (B,T,E) -> zeros (B,T,M,D)."""
        batch, time, _ = u.shape
        return u.new_zeros(batch, time, len(self.owned), self.geometry.head_dim), {}

    def init_random(self, generator: torch.Generator) -> None:
        """Nothing to draw."""

    def init_from_attention(self, attention: nn.Module, variant: str) -> None:
        """Nothing to copy."""
        self.check_initialisation("skip", variant)
