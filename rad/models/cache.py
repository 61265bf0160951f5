"""The cache of a hybrid: keys and values where softmax heads stay, a recurrent state elsewhere.

A `DynamicCache` with one layer object per decoder layer, so that `generate`, beam reordering and
lm-eval work unchanged. It counts tokens itself, because a hybrid may keep no attention at all.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from rad.mixers import MIXERS, State


class HybridCache(DynamicCache):
    """Key/value and recurrent states of a hybrid model, layer by layer."""

    def __init__(self, config: Any) -> None:
        names = MIXERS[config.rad_mixer["type"]].state_names if config.rad_mixer else ()
        layers: list[Any] = []
        for kept in config.rad_heads:
            if len(kept) == config.num_attention_heads:
                layers.append(DynamicLayer())
            elif kept:
                layers.append(LinearAttentionAndFullAttentionLayer(number_of_states=len(names)))
            else:
                layers.append(LinearAttentionLayer(number_of_states=len(names)))
        Cache.__init__(self, layers=layers)
        self._names = names
        self._attention_free = not any(config.rad_heads)
        self._seen = 0

    @property
    def is_compileable(self) -> bool:
        """False: else `generate` replaces the 2-D padding mask, which mixers need, by a 4-D one."""
        return False

    def advance(self, tokens: int) -> None:
        """Count `tokens` more as seen; called once per model forward."""
        self._seen += tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        return self._seen if self._attention_free else super().get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key length, offset) of the causal mask."""
        if self._attention_free:
            return self._seen + query_length, 0
        return super().get_mask_sizes(query_length, layer_idx)

    def mixer_state(self, layer_idx: int) -> State | None:
        """The mixer's state of one layer, None before its first token."""
        layer: Any = self.layers[layer_idx]
        if not self._names or not layer.has_previous_state[0]:
            return None
        return {name: layer.recurrent_states[i] for i, name in enumerate(self._names)}

    def update_mixer_state(self, layer_idx: int, state: dict[str, Tensor]) -> None:
        """Replace the mixer's state of one layer."""
        layer: Any = self.layers[layer_idx]
        for index, name in enumerate(self._names):
            layer.recurrent_states[index] = state[name]
            layer.is_recurrent_states_initialized[index] = True
            layer.has_previous_state[index] = True
            layer.device = state[name].device

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[no-untyped-call]
        self._seen = 0
