"""Sliding-window attention with attention sinks: softmax over the first S and the last W tokens.

No training is needed: the weights are the base's own, and so is the attention module (RoPE, q/k
norms, scaling). The cache is bounded by S + W tokens, which makes it the baseline that every
trained mixer has to beat. Keys keep their absolute RoPE phase. Legend: B batch, T time, E hidden
size, M owned heads, K kv slots, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rad.mixer_settings import SlidingWindowSettings
from rad.mixers.attention import copy_heads
from rad.mixers.base import Geometry, Mixer, State, StateSpec


class SlidingWindow(Mixer):
    """Softmax attention of the owned heads over a bounded cache."""

    state_names = ("keys", "values", "ranks", "count")
    initialisations = SlidingWindowSettings.starts

    def __init__(self, geometry: Geometry, owned: Sequence[int], settings: Mapping[str, Any]):
        super().__init__(geometry, owned, settings)
        if geometry.attention is None:
            raise ValueError("sliding_window needs the base's attention class in its geometry")
        self.window, self.sinks = int(settings["window"]), int(settings["sinks"])
        attention: Any = geometry.attention(self.owned, True)
        # masks of four dimensions: not every attention back end takes them
        if attention.config._attn_implementation != "eager":
            attention.config._attn_implementation = "sdpa"
        self.attention = attention

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
        # a token's rank among the real tokens of its row; -1 marks padding
        count = u.new_zeros(batch, 1, dtype=torch.long) if state is None else state["count"]
        real = (
            torch.ones(batch, time, dtype=torch.bool, device=u.device) if valid is None else valid
        )
        ranks = torch.where(real, count + real.long().cumsum(1) - 1, -1)  # (B,T)
        new_count = count + real.long().sum(1, keepdim=True)
        key_ranks = ranks if state is None else torch.cat([state["ranks"], ranks], dim=1)

        hidden = ~self._visible(ranks, key_ranks)  # (B,T,T')
        mask = torch.zeros_like(hidden, dtype=u.dtype).masked_fill(hidden, torch.finfo(u.dtype).min)
        memory = _Memory(state)
        y, _ = self.attention(
            hidden_states=u,
            position_embeddings=rope,
            attention_mask=mask.unsqueeze(1),
            past_key_values=memory,
        )
        new_state = self._bounded(memory.keys, memory.values, key_ranks, new_count)
        return y.view(batch, time, len(self.owned), -1), new_state

    def _visible(self, query_ranks: Tensor, key_ranks: Tensor) -> Tensor:
        """(B,T), (B,T') -> (B,T,T'): causal, and either recent or a sink; padding sees itself."""
        q, k = query_ranks.unsqueeze(-1), key_ranks.unsqueeze(-2)
        mask = (k >= 0) & (k <= q) & ((q - k < self.window) | (k < self.sinks))
        # a fully masked row would be NaN; a padded query's output is never read
        return mask | (q < 0)

    def _bounded(self, keys: Tensor, values: Tensor, ranks: Tensor, count: Tensor) -> State:
        """Keep what a later token can still see: the sinks and the last `window` real tokens."""
        size = self.sinks + self.window
        useful = (ranks >= 0) & ((ranks < self.sinks) | (ranks >= count - self.window))
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

    def state_spec(self, dtype: torch.dtype) -> StateSpec:
        """Keys and values of S + W tokens, their ranks, and the tokens counted."""
        size, slots = self.sinks + self.window, self.attention.config.num_key_value_heads
        shape = (slots, size, self.geometry.head_dim)
        return {
            "keys": (shape, dtype),
            "values": (shape, dtype),
            "ranks": ((size,), torch.long),
            "count": ((1,), torch.long),
        }

    def state_bytes(self, dtype: torch.dtype, tokens: int) -> int:
        """Bytes of state per sequence after `tokens` tokens: it grows up to S + W tokens."""
        full, size = super().state_bytes(dtype, tokens), self.sinks + self.window
        counter = torch.long.itemsize
        return (full - counter) // size * min(size, tokens) + counter

    def init_random(self, generator: torch.Generator) -> None:
        """Nothing to draw: every weight is the base's."""

    def init_from_attention(self, attention: nn.Module, variant: str) -> None:
        """Copy the owned heads' Q and their kv heads' K, V; only `qkvo` makes sense."""
        self.check_initialisation("sliding_window", variant)
        copy_heads(attention, self.attention, self.owned, self.geometry, share_kv=True)


class _Memory:
    """Hands the attention module earlier keys and values, and keeps what it computed."""

    def __init__(self, state: State | None) -> None:
        self.state = state
        self.keys: Any = None
        self.values: Any = None

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """As transformers' caches: keys, values (B,K,T,D) -> with the past (B,K,T',D)."""
        if self.state is not None:
            keys = torch.cat([self.state["keys"], keys], dim=2)
            values = torch.cat([self.state["values"], values], dim=2)
        self.keys, self.values = keys, values
        return keys, values
