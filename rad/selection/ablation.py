"""Zeroing single attention heads before the output projection (retrieval-aware, section 4.1).

Legend: B batch, T time, H query heads, D head dim.

Try it: `with zero_heads(model, [(3, 0)]): model(input_ids)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from rad.selection.base import decoder_layers


@contextmanager
def zero_heads(model: Any, pairs: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Within the block, the outputs of the (layer, query head) `pairs` are zero.

    Equal to zeroing these heads' columns of `o_proj`; its bias, where there is one, stays.
    Raises `IndexError` for a pair that does not exist.
    """
    layers = decoder_layers(model)
    heads = model.config.num_attention_heads
    by_layer: dict[int, set[int]] = {}
    for layer, head in pairs:
        if not 0 <= layer < len(layers) or not 0 <= head < heads:
            raise IndexError(
                f"no layer {layer} head {head} in a model of {len(layers)} layers, {heads} heads"
            )
        by_layer.setdefault(layer, set()).add(head)
    with ExitStack() as stack:
        for layer, chosen in by_layer.items():
            projection = layers[layer].self_attn.o_proj
            stack.enter_context(zero_inputs(projection, chosen, heads))
        yield


@contextmanager
def zero_inputs(projection: nn.Module, chosen: Iterable[int], heads: int) -> Iterator[None]:
    """Within the block, heads `chosen` of the input (B, T, H D) of an `o_proj` are zero."""
    indices = sorted(chosen)

    def clear(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        del module
        mixed = arguments[0].unflatten(-1, (heads, -1)).clone()
        mixed[..., indices, :] = 0
        return (mixed.flatten(-2), *arguments[1:])

    handle = projection.register_forward_pre_hook(clear)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def fixed_output(module: nn.Module, value: Tensor) -> Iterator[None]:
    """Within the block, attention `module` returns `value` (B,T,E) without computing anything."""

    def forward(*arguments: Any, **settings: Any) -> tuple[Tensor, None]:
        del arguments, settings
        return value, None

    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
