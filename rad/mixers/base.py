"""The interface every mixer has, and the geometry of the attention layer it replaces.

A mixer replaces the softmax attention of some (or all) query heads of one layer. It yields one
D-wide output per head it owns; the layer's output projection is outside, so that kept softmax
heads and mixer heads can share it. Legend: B batch, T time, E hidden size, H query heads of the
layer, K kv heads, D head dim, N state dim, M heads owned by the mixer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

State = dict[str, Tensor]
StateSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class Geometry:
    """Shape of the attention layer that a mixer stands in for."""

    hidden_size: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    bias: bool  # whether q, k, v projections have one
    # builds the family's own attention with some of the heads, see rad.mixers.attention
    attention: Callable[[Sequence[int], bool], nn.Module] | None = field(
        default=None, compare=False, repr=False
    )

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class Part:
    """Rows of a parameter: `width` rows for each query head, each kv head, or once for `all`."""

    owner: Literal["head", "kv", "all"]
    width: int


class Mixer(nn.Module, ABC):
    """Sequence mixer of the heads `owned` of one layer.

    `initialisations` are the starts it accepts; `refused` says of the others why they make no
    sense for it.
    """

    state_names: tuple[str, ...] = ()
    initialisations: tuple[str, ...] = ("qkvo",)
    refused: Mapping[str, str] = {}

    def __init__(self, geometry: Geometry, owned: Sequence[int], settings: Mapping[str, Any]):
        super().__init__()
        self.geometry = geometry
        self.owned = list(owned)
        self.settings = dict(settings)
        self.kv_owned = sorted({head // geometry.group for head in owned})
        place = {kv: index for index, kv in enumerate(self.kv_owned)}
        # which of the kv slots each owned head reads
        self.kv_of = [place[head // geometry.group] for head in owned]

    @abstractmethod
    def forward(
        self,
        u: Tensor,
        state: State | None = None,
        valid: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """u (B,T,E), valid (B,T) bool or None, rope (cos, sin) -> outputs (B,T,M,D), new state."""

    def step(
        self, u: Tensor, state: State | None = None, rope: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, State]:
        """One token: u (B,E) -> outputs (B,M,D), new state; the kernels use their one-step form."""
        y, state = self(u.unsqueeze(1), state, None, rope)
        return y.squeeze(1), state

    def state_spec(self, dtype: torch.dtype) -> StateSpec:
        """Shape without the batch, and dtype, of every state of a model of `dtype`."""
        return {}

    def state_bytes(self, dtype: torch.dtype, tokens: int) -> int:
        """Bytes of state per sequence after `tokens` tokens."""
        return sum(
            torch.Size(shape).numel() * kind.itemsize
            for shape, kind in self.state_spec(dtype).values()
        )

    def kernel_case(self) -> dict[str, Any] | None:
        """Which kernel this mixer runs and at which sizes, for its self-test; None: none."""
        return None

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

    @classmethod
    def check_initialisation(cls, name: str, variant: str) -> None:
        """Raise `ValueError` saying why mixer `name` cannot start from `variant`."""
        if variant in cls.initialisations:
            return
        why = cls.refused.get(variant, "no attention weight stands for it")
        raise ValueError(
            f"mixer {name} cannot start from {variant!r} ({why}); "
            f"it accepts {', '.join(cls.initialisations)}"
        )


def head_rows(heads: Sequence[int], width: int) -> Tensor:
    """Row indices of the given heads in a projection of `width` rows per head."""
    if not heads:
        return torch.empty(0, dtype=torch.long)
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


def promote(t: Tensor) -> Tensor:
    """At least float32: decays and norms lose too much in bfloat16."""
    return t if t.dtype == torch.float64 else t.float()


def rms_norm(y: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, in at least float32: y (...,D), weight broadcastable."""
    y = promote(y)
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * promote(weight)
