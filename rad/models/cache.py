"""The cache of a hybrid: keys and values where softmax heads stay, a recurrent state elsewhere.

A `DynamicCache` with one layer object per decoder layer, so that `generate`, beam reordering and
lm-eval work unchanged. It counts tokens itself, because a hybrid may keep no attention at all.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, DynamicCache

from rad.mixers import MIXERS, State


def layer_types(config: Any) -> list[str]:
    """transformers' name of every layer's kind: what its cache has to hold.

    Not written into `config.layer_types`: some families (Qwen) look their attention masks up by it.
    """
    kinds = []
    for kept in config.rad_heads:
        if len(kept) == config.num_attention_heads:
            kinds.append("full_attention")
        else:
            kinds.append("hybrid" if kept else "linear_attention")
    return kinds


class HybridCache(DynamicCache):
    """Key/value and recurrent states of a hybrid model, layer by layer."""

    def __init__(self, config: Any) -> None:
        names = MIXERS[config.rad_mixer["type"]].state_names if config.rad_mixer else ()
        layers = []
        for kind in layer_types(config):
            own = {} if kind == "full_attention" else {"number_of_states": len(names)}
            layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**own))
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
        held = {
            name: layer.recurrent_states[index]
            for index, name in enumerate(self._names)
            if layer.has_previous_state[index]
        }
        return held or None

    def update_mixer_state(self, layer_idx: int, state: dict[str, Tensor]) -> None:
        """Replace the mixer's state of one layer."""
        layer: Any = self.layers[layer_idx]
        for name, tensor in state.items():
            index = self._names.index(name)
            # a slice would keep the whole sequence in memory as long as the cache lives
            whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            layer.recurrent_states[index] = tensor if whole else tensor.clone()
            layer.is_recurrent_states_initialized[index] = True
            layer.has_previous_state[index] = True
            layer.device = tensor.device

    def reset(self) -> None:
        """Forget everything."""
        super().reset()  # type: ignore[no-untyped-call]
        self._seen = 0
