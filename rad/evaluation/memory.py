"""Cache bytes by formula: what a model's cache holds after some tokens, from its configuration.

    cache(T) = T x 2 x D x bytes x (kv heads of all softmax layers) + states(T)

The kv heads of a layer that keeps everything are the base's; in a layer that keeps single heads,
each has keys and values of its own (retrieval-aware distillation, section 4.2). The states are the
mixers' own (`Mixer.state_spec`): recurrent state, convolution inputs, a bounded window. Legend: T
tokens, D head dim, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CacheBytes:
    """Bytes of one sequence: keys and values of softmax heads, recurrent states, conv inputs."""

    kv: int = 0
    state: int = 0  # without the convolution's inputs
    conv: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.kv + self.state + self.conv

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(self.kv + other.kv, self.state + other.state, self.conv + other.conv)


def predicted_cache(model: Any, tokens: int) -> CacheBytes:
    """Bytes that the cache of `model` holds per sequence after `tokens` tokens.

    Works on a model on the meta device; the weights' values are not read.
    """
    return sum(
        (_layer(model, layer, tokens) for layer in range(model.config.num_hidden_layers)),
        CacheBytes(),
    )


def head_dim(config: Any) -> int:
    """D of a configuration."""
    width = getattr(config, "head_dim", None)
    return int(width or config.hidden_size // config.num_attention_heads)


def _layer(model: Any, layer: int, tokens: int) -> CacheBytes:
    config, dtype = model.config, model.dtype
    kept = config.num_attention_heads
    if getattr(config, "rad_heads", None) is not None:
        kept = len(config.rad_heads[layer])
    whole = kept == config.num_attention_heads
    slots = (getattr(config, "num_key_value_heads", None) or kept) if whole else kept
    held = _visible(config, layer, tokens) if whole else tokens
    kv = 2 * slots * head_dim(config) * dtype.itemsize * held
    if whole:
        return CacheBytes(kv=kv)
    mixer = model.model.layers[layer].self_attn.mixer
    total = mixer.state_bytes(dtype, tokens)
    conv = 0
    if "conv" in (spec := mixer.state_spec(dtype)):
        (width, channels), kind = spec["conv"]
        conv = width * channels * kind.itemsize
    return CacheBytes(kv=kv, state=total - conv, conv=conv)


def _visible(config: Any, layer: int, tokens: int) -> int:
    """Tokens that the library's cache keeps of a layer: window - 1 where the base has a window."""
    if getattr(config, "rad_heads", None) is not None:
        return tokens  # bases with windows are not converted
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    bounded = kinds[layer] == "sliding_attention" if kinds else window is not None
    return min(tokens, window - 1) if bounded and window is not None else tokens


def step_bytes(model: Any, tokens: int, batch_size: int) -> int:
    """Bytes that one decoding step has to move: weights, keys and values once, states twice.

    A lower bound on its time, once divided by the memory's bandwidth. The embedding look-up is left
    out unless it is tied to the output projection.
    """
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    if head is None or head.weight is not embedding:
        weights -= embedding.numel() * embedding.element_size()
    cache = predicted_cache(model, tokens)
    return int(weights + batch_size * (cache.kv + 2 * (cache.state + cache.conv)))


def break_even_tokens(kv_bytes_per_token: int, state_bytes: int) -> float:
    """Context above which reading a layer's keys and values costs more than its state.

    The state is read and written at every step, keys and values are read.
    """
    return 2 * state_bytes / kv_bytes_per_token
