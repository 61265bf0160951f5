"""The interface every mixer has, and the geometry of the attention layer it replaces.

A mixer replaces the softmax attention of some (or all) query heads of one layer. It yields one
D-wide output per head it owns; the layer's output projection is outside, so that kept softmax
heads and mixer heads can share it. Legend: B batch, T time, E hidden size, H query heads of the
layer, K kv heads, D head dim, M heads owned by the mixer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

State = dict[str, Tensor]


@dataclass(frozen=True)
class Geometry:
    """Shape of the attention layer that a mixer stands in for."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    bias: bool  # whether q, k, v projections have one

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.heads // self.kv_heads

    @classmethod
    def of(cls, config: Any) -> Geometry:
        """Read it from a Hugging Face config of the Llama or Qwen family."""
        return cls(
            hidden_size=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None)
            or config.hidden_size // config.num_attention_heads,
            norm_eps=config.rms_norm_eps,
            bias=bool(getattr(config, "attention_bias", config.model_type in QKV_BIAS_FAMILIES)),
        )


QKV_BIAS_FAMILIES = ("qwen2", "rad_qwen2")  # the bias is fixed there, not a config key


class Mixer(nn.Module, ABC):
    """Sequence mixer of the heads `owned` of one layer."""

    state_names: tuple[str, ...] = ()
    initialisations: tuple[str, ...] = ("qkvo",)

    def __init__(self, geometry: Geometry, owned: Sequence[int], settings: Mapping[str, Any]):
        super().__init__()
        self.geometry = geometry
        self.owned = list(owned)
        self.settings = dict(settings)

    @abstractmethod
    def forward(
        self,
        u: Tensor,
        state: State | None = None,
        valid: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """u (B,T,E), valid (B,T) bool or None, rope (cos, sin) -> outputs (B,T,M,D), new state."""

    @abstractmethod
    def init_random(self, generator: torch.Generator) -> None:
        """Draw the weights that no attention weight stands for, reproducibly."""

    @abstractmethod
    def init_from_attention(self, attention: nn.Module, variant: str) -> None:
        """Copy from an attention layer (q_proj, k_proj, v_proj); `variant`: `initialisations`."""

    def take_heads(self, full: Mixer) -> None:
        """Copy the owned heads' weights from a mixer of the same kind that owns every head.

        Only mixers that list `aligned` among their initialisations need it.
        """
        raise ValueError(f"{type(self).__name__} cannot start aligned")


def head_rows(heads: Sequence[int], width: int) -> Tensor:
    """Row indices of the given heads in a projection of `width` rows per head."""
    return torch.cat([torch.arange(head * width, (head + 1) * width) for head in heads])


def take_kv(t: Tensor, dim: int, kv_of: Sequence[int]) -> Tensor:
    """Give every owned head its kv slot: `t` has one slot per kv head along `dim`.

    No buffer holds the index: buffers outside the checkpoint come back uninitialised when a model
    is loaded.
    """
    slots, heads = t.shape[dim], len(kv_of)
    if list(kv_of) == list(range(slots)):
        return t
    if heads % slots == 0 and list(kv_of) == [head // (heads // slots) for head in range(heads)]:
        return t.repeat_interleave(heads // slots, dim=dim)
    return t.index_select(dim, torch.tensor(list(kv_of), device=t.device))
