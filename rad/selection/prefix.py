"""One pass of a decoder, kept so that any layer can be run again from its input.

A change to layer i leaves the layers below it as they were: scoring a change of every layer in turn
costs (L+1)/2 passes instead of L. Legend: B batch, T time, E hidden size, V vocabulary.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from rad.selection.base import SelectionError, decoder_layers


class Prefix:
    """`inputs[i]` (B,T,E) goes into layer i of `model`, `output` (B,T,E) leaves the last one.

    Raises `SelectionError` when the model does more to the last layer's output than normalise and
    project it, because scores read `logits`.
    """

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model = model
        self.layers = decoder_layers(model)
        self.inputs: list[Tensor] = []
        self._settings: list[dict[str, Any]] = []
        last: list[Tensor] = []
        with ExitStack() as stack:
            for layer in self.layers:
                handle = layer.register_forward_pre_hook(self._keep, with_kwargs=True)
                stack.callback(handle.remove)
            handle = self.layers[-1].register_forward_hook(
                lambda module, arguments, output: last.append(first_of(output))
            )
            stack.callback(handle.remove)
            whole = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits
        self.output = last[0]
        mine = self.logits(self.output[:, -1:])
        # what is not a number stays so here, and is refused where scores are ranked
        if not torch.allclose(mine, whole.float(), rtol=1e-2, atol=1e-2, equal_nan=True):
            raise SelectionError(
                f"the logits of {type(model).__name__} are not its normalised last layer times the "
                "output embedding (scaled or capped logits): its layers cannot be scored one by one"
            )

    def _keep(self, module: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        del module
        self.inputs.append(arguments[0])
        self._settings.append(settings)

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Layer `index` on hidden (n*B,T,E): n variants of this batch, one after the other."""
        copies = hidden.shape[0] // self.inputs[index].shape[0]
        settings = self._settings[index]
        if copies > 1:
            settings = _repeated(settings, self.inputs[index].shape[0], copies)
        return first_of(self.layers[index](hidden, **settings))

    def rest(self, index: int, hidden: Tensor) -> Tensor:
        """The layers from `index` on: (n*B,T,E) -> the last one's output (n*B,T,E)."""
        for layer in range(index, len(self.layers)):
            hidden = self.run(layer, hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (...,V) float32 of any positions' output (...,E) of the last layer."""
        normed = self.model.get_decoder().norm(hidden)
        logits: Tensor = self.model.get_output_embeddings()(normed).float()
        return logits


def first_of(output: Any) -> Tensor:
    """The hidden state of a module's output, a tensor or a tuple that starts with one."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def _repeated(value: Any, batch: int, copies: int) -> Any:
    """`value` with every tensor of `batch` rows repeated `copies` times; a row for all stays."""
    if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch > 1:
        return value.repeat(copies, *[1] * (value.dim() - 1))
    if isinstance(value, tuple):
        return tuple(_repeated(entry, batch, copies) for entry in value)
    if isinstance(value, dict):
        return {key: _repeated(entry, batch, copies) for key, entry in value.items()}
    return value
