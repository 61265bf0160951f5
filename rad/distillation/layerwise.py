"""Layer-wise losses: every converted layer against the base's, on the base's own input.

    base layer input --base attention (layer)--> target
                     --student's mixer (layer)--> output      loss = distance(target, output)

Teacher-forced, so the layers are independent: one forward of the base feeds all of them, and each
layer's graph is freed before the next is built. Legend: B batch, T time, E hidden size, M heads of
a mixer, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rad.distillation import losses, parallel
from rad.distillation.orientation import mixer_matrix, orientation_loss
from rad.distillation.speed import precision
from rad.models.hybrid import HybridAttention
from rad.recipe_settings import StageSettings


@dataclass
class LayerCall:
    """How a layer of the base was called and what came out: input and outputs are (B,T,E)."""

    layer: int
    settings: dict[str, Any]  # of the attention module, with `hidden_states`
    attention: Tensor
    weights: Tensor | None  # (B,H,T,T), with the eager implementation only
    layer_input: Tensor
    layer_output: Tensor
    layer_settings: dict[str, Any]


def each_layer(base: Any, tokens: Tensor, visit: Callable[[LayerCall], None]) -> None:
    """One forward of the base without gradients; `visit` is told of each layer as it is left.

    Nothing is kept, so one layer's activations at most are held by a visitor that keeps none.
    """
    attention: dict[int, tuple[dict[str, Any], Any]] = {}

    def keep_attention(layer: int) -> Callable[..., None]:
        def keep(_module: Any, _args: Any, settings: dict[str, Any], output: Any) -> None:
            attention[layer] = (settings, output)

        return keep

    def leave(layer: int) -> Callable[..., None]:
        def tell(_module: Any, args: Any, settings: dict[str, Any], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            mine, (mixed, weights) = attention.pop(layer)
            visit(LayerCall(layer, mine, mixed, weights, args[0], hidden, settings))

        return tell

    with ExitStack() as stack:
        for index, layer in enumerate(base.base_model.layers):
            for module, hook in ((layer.self_attn, keep_attention(index)), (layer, leave(index))):
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        with torch.no_grad():
            parallel.inside(base, lambda: base.base_model(input_ids=tokens, use_cache=False))


def layer_calls(base: Any, tokens: Tensor) -> list[LayerCall]:
    """Every layer's call, from one forward of the base."""
    calls: list[LayerCall] = []
    each_layer(base, tokens, calls.append)
    return calls


def attention_pairs(
    base: Any, tokens: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """(layer, input (B,T,E), output (B,T,E), rope) of every attention layer, from one forward."""
    for call in layer_calls(base, tokens):
        settings = call.settings
        yield (
            call.layer,
            settings["hidden_states"],
            call.attention,
            settings["position_embeddings"],
        )


def align_layer(call: LayerCall, student: Any, weight: Tensor, stage: StageSettings) -> Tensor:
    """Alignment loss of one layer of the student; the gradient stays inside it."""
    layer = student.base_model.layers[call.layer]
    if stage.unit == "layer":
        output = layer(call.layer_input, **call.layer_settings)
        output = output[0] if isinstance(output, tuple) else output
        return losses.alignment_loss(call.layer_output, output, weight, stage.distance)
    output, _ = parallel.inside(layer, lambda: layer.self_attn(**call.settings))
    return losses.alignment_loss(call.attention, output, weight, stage.distance)


def orientation_layer(
    call: LayerCall, student: Any, weight: Tensor, stage: StageSettings
) -> Tensor:
    """Orientation loss of one layer: of the mixer's heads against the base's attention weights."""
    del weight, stage
    layer = student.base_model.layers[call.layer]
    mixer = layer.self_attn.mixer
    assert call.weights is not None
    entered = call.settings["hidden_states"]
    mine = parallel.inside(layer, lambda: mixer_matrix(mixer, entered))  # (B,M,T,T)
    return orientation_loss(call.weights[:, mixer.owned], mine)


LAYER_LOSSES: dict[str, Callable[[LayerCall, Any, Tensor, StageSettings], Tensor]] = {
    "align": align_layer,
    "orientation": orientation_layer,
}


@contextmanager
def attention_weights(base: Any, wanted: bool) -> Iterator[None]:
    """Within the block, the base's attention returns its weights (only `eager` does)."""
    before = base.config._attn_implementation
    if wanted:
        base.set_attn_implementation("eager")
    try:
        yield
    finally:
        if wanted:
            base.set_attn_implementation(before)


def layerwise_backward(
    student: Any,
    base: Any,
    tokens: Tensor,
    weight: Tensor,
    stage: StageSettings,
    *,
    scale: float = 1.0,
    autocast: bool = False,
) -> dict[int, float]:
    """Accumulate `scale` times the gradient of the mean over layers; the losses by layer.

    tokens, weight (B,T). Layer by layer, so that one layer's activations at most are kept.
    """
    compute = LAYER_LOSSES[stage.loss]
    counted = (weight > 0).float()
    converted = [
        index
        for index, layer in enumerate(student.base_model.layers)
        if isinstance(layer.self_attn, HybridAttention)
    ]
    found = {}

    def learn(call: LayerCall) -> None:
        if call.layer not in converted:
            return
        with torch.enable_grad():
            loss = compute(call, student, counted, stage)
            with torch.autocast(tokens.device.type, enabled=False):
                (loss * (scale / len(converted))).backward()
        found[call.layer] = loss.item()

    with (
        attention_weights(base, stage.loss == "orientation"),
        precision(tokens.device, autocast),
    ):
        each_layer(base, tokens, learn)
    parallel.release(base)
    return found
