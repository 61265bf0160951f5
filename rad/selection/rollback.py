"""The cache that draft and verification share, and how it forgets what was not accepted.

Keys and values are cropped to the accepted length. A recurrent state cannot be cropped: a mixer's
state at the last verification is kept (a reference, never a copy), verification keeps the mixer's
*inputs*, and when only some of them are accepted the state is computed again from both. That holds
E values per token and layer instead of a whole state (32 heads x 128 x 128 float32 are 2.1 MB).
It relies on the mixers' contract: a mixer returns a new state and leaves the given one alone.

Legend: B batch, T tokens of a verification, A accepted ones, E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rad.mixers import Mixer, State
from rad.models.cache import HybridCache
from rad.selection.base import SelectionError, decoder_layers

Inputs = tuple[Tensor, tuple[Tensor, Tensor] | None]  # hidden (B,T,E); rope cos, sin (B,T,D)


class _Counted:
    """Masks and positions from one count: layers differ in length while a draft skips some.

    transformers reads the length off one layer, which is wrong when just that one is skipped.
    """

    tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that precede the next one."""
        return self.tokens

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Position of the next token."""
        return self.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(key length, offset) of the causal mask."""
        return self.tokens + query_length, 0


class CountedCache(_Counted, DynamicCache):
    """Keys and values of a model of attention layers only."""


class CountedHybridCache(_Counted, HybridCache):
    """Keys, values and recurrent states of a hybrid."""


def is_hybrid(model: Any) -> bool:
    """Whether the model has mixers, and so recurrent states."""
    return getattr(model.config, "rad_heads", None) is not None


def crop_cache(cache: Any, length: int) -> None:
    """Shorten the keys and values of every layer of `cache` to at most `length` tokens.

    Layers may differ in length (a skipped one has no draft entries), and `DynamicCache.crop`
    removes the same number from each. Layers without keys are left alone.
    """
    for layer in cache.layers:
        if isinstance(layer, DynamicLayer):
            surplus = layer.get_seq_length() - length
            if surplus > 0:
                # not layer.crop, which in a hybrid's layers refuses for the sake of the state
                DynamicLayer.crop(layer, -surplus)


class SharedCache:
    """Verified tokens of one batch, on which drafts are tried and verifications build.

    `length` counts the verified tokens; `cache` is what the model is called with. Raises
    `SelectionError` for a model with sliding-window layers.
    """

    def __init__(self, model: Any) -> None:
        hybrid = is_hybrid(model)
        self.cache: Any = (CountedHybridCache if hybrid else CountedCache)(config=model.config)
        if any(isinstance(layer, DynamicSlidingWindowLayer) for layer in self.cache.layers):
            raise SelectionError(
                f"{type(model).__name__} has sliding-window layers, whose cache cannot be rolled "
                "back; use a model of full attention"
            )
        self.length = 0
        self._mixers: dict[int, Mixer] = {}
        if hybrid:
            for index, layer in enumerate(decoder_layers(model)):
                mixer = getattr(layer.self_attn, "mixer", None)
                if mixer is not None and mixer.state_names:
                    self._mixers[index] = mixer
        self._verified: dict[int, State] = {}
        self._inputs: dict[int, Inputs] = {}

    @contextmanager
    def verification(self) -> Iterator[None]:
        """Within the block the mixers' inputs are kept; whatever was drafted is forgotten first."""
        self.forget_draft()

        def keep(index: int) -> Any:
            def hook(module: Any, arguments: tuple[Any, ...]) -> None:
                hidden, _, _, rope = arguments
                self._inputs[index] = hidden, rope

            return hook

        handles = [
            mixer.register_forward_pre_hook(keep(index)) for index, mixer in self._mixers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forget_draft(self) -> None:
        """Back to the last verification: keys cropped, states put back."""
        crop_cache(self.cache, self.length)
        self.cache.tokens = self.length
        for index, state in self._verified.items():
            self.cache.update_mixer_state(index, state)

    def accept(self, count: int, checked: int) -> None:
        """Keep the first `count` of the `checked` tokens that the verification has just read."""
        self.length += count
        crop_cache(self.cache, self.length)
        self.cache.tokens = self.length
        for index, mixer in self._mixers.items():
            if count < checked:
                hidden, rope = self._inputs[index]
                if rope is not None:
                    rope = rope[0][:, :count], rope[1][:, :count]
                # (B,A,E) on top of the state at the last verification
                _, state = mixer(hidden[:, :count], self._verified.get(index), None, rope)
                self.cache.update_mixer_state(index, state)
            held = self.cache.mixer_state(index)
            if held is not None:
                self._verified[index] = held
        self._inputs.clear()
