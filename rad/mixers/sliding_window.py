"""Sliding-window attention with attention sinks: softmax over the first S and the last W tokens.

No training is needed: the weights are the base's own. The cache is bounded by S + W tokens, which
makes it the baseline that every trained mixer has to beat. Keys keep their absolute RoPE phase.
Legend: B batch, T time, E hidden size, M owned heads, K kv heads in use, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rad.mixers.base import Geometry, Mixer, State, head_rows, take_kv


class SlidingWindow(Mixer):
    """Softmax attention of the owned heads over a bounded cache."""

    state_names = ("keys", "values", "ranks", "count")
    initialisations = ("qkvo",)

    def __init__(self, geometry: Geometry, owned: Sequence[int], settings: Mapping[str, Any]):
        super().__init__(geometry, owned, settings)
        dim = geometry.head_dim
        self.kv_owned = sorted({head // geometry.group for head in owned})
        place = {kv: index for index, kv in enumerate(self.kv_owned)}
        self.q_proj = nn.Linear(geometry.hidden_size, len(owned) * dim, bias=geometry.bias)
        self.k_proj = nn.Linear(geometry.hidden_size, len(self.kv_owned) * dim, bias=geometry.bias)
        self.v_proj = nn.Linear(geometry.hidden_size, len(self.kv_owned) * dim, bias=geometry.bias)
        self.kv_of = [place[head // geometry.group] for head in owned]

    def forward(
        self,
        u: Tensor,
        state: State | None = None,
        valid: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """u (B,T,E) -> (B,T,M,D) and the bounded cache: keys, values (B,K,S+W,D), ranks (B,S+W)."""
        if rope is None:
            raise ValueError("sliding_window needs the base's rotary embedding")
        batch, time, _ = u.shape
        dim = self.geometry.head_dim

        def project(layer: nn.Linear) -> Tensor:
            return layer(u).view(batch, time, -1, dim).transpose(1, 2)  # type: ignore[no-any-return]

        q, k = (_rotate(t, rope) for t in (project(self.q_proj), project(self.k_proj)))
        v = project(self.v_proj)
        # a token's rank among the real tokens of its row; -1 marks padding
        count = u.new_zeros(batch, 1, dtype=torch.long) if state is None else state["count"]
        real = (
            torch.ones(batch, time, dtype=torch.bool, device=u.device) if valid is None else valid
        )
        ranks = torch.where(real, count + real.long().cumsum(1) - 1, -1)  # (B,T)
        new_count = count + real.long().sum(1, keepdim=True)
        keys, values, key_ranks = k, v, ranks
        if state is not None:
            keys = torch.cat([state["keys"], k], dim=2)
            values = torch.cat([state["values"], v], dim=2)
            key_ranks = torch.cat([state["ranks"], ranks], dim=1)

        mask = self._visible(ranks, key_ranks)  # (B,T,T')
        y = F.scaled_dot_product_attention(
            q,
            take_kv(keys, 1, self.kv_of),
            take_kv(values, 1, self.kv_of),
            attn_mask=mask.unsqueeze(1),
        )
        new_state = self._bounded(keys, values, key_ranks, new_count)
        return y.transpose(1, 2), new_state

    def _visible(self, query_ranks: Tensor, key_ranks: Tensor) -> Tensor:
        """(B,T), (B,T') -> (B,T,T'): causal, and either recent or a sink; padding sees itself."""
        q, k = query_ranks.unsqueeze(-1), key_ranks.unsqueeze(-2)
        recent = q - k < int(self.settings["window"])
        sink = k < int(self.settings["sinks"])
        mask = (k >= 0) & (k <= q) & (recent | sink)
        # a fully masked row would be NaN; a padded query's output is never read
        return mask | (q < 0)

    def _bounded(self, keys: Tensor, values: Tensor, ranks: Tensor, count: Tensor) -> State:
        """Keep what a later token can still see: the sinks and the last `window` real tokens."""
        size = int(self.settings["sinks"]) + int(self.settings["window"])
        useful = (ranks >= 0) & (
            (ranks < int(self.settings["sinks"])) | (ranks >= count - int(self.settings["window"]))
        )
        # useful tokens first, in order; the rest of the slots are marked empty
        order = torch.argsort((~useful).long(), dim=1, stable=True)[:, :size]  # (B,S+W)
        kept_ranks = torch.where(useful, ranks, -1).gather(1, order)
        index = order[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        return {
            "keys": keys.gather(2, index),
            "values": values.gather(2, index),
            "ranks": kept_ranks,
            "count": count,
        }

    @torch.no_grad()
    def init_random(self, generator: torch.Generator) -> None:
        """Nothing to draw: every weight is the base's."""

    @torch.no_grad()
    def init_from_attention(self, attention: nn.Module, variant: str) -> None:
        """Copy the owned heads' Q and their kv heads' K, V; only `qkvo` makes sense."""
        if variant != "qkvo":
            raise ValueError(f"sliding_window starts from 'qkvo' only, not {variant!r}")
        dim = self.geometry.head_dim
        for name, heads in (
            ("q_proj", self.owned),
            ("k_proj", self.kv_owned),
            ("v_proj", self.kv_owned),
        ):
            source, target = getattr(attention, name), getattr(self, name)
            rows = head_rows(heads, dim)
            target.weight.copy_(source.weight[rows])
            if target.bias is not None:
                target.bias.copy_(source.bias[rows])


def _rotate(t: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding in the half-split layout: t (B,M,T,D), cos and sin (B,T,D)."""
    cos, sin = (part.unsqueeze(1).to(t.dtype) for part in rope)
    first, second = t.chunk(2, dim=-1)
    return t * cos + torch.cat([-second, first], dim=-1) * sin
