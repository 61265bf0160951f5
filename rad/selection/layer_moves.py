"""One layer's attention silenced or made linear, and what that does to the rest of the model.

The layers below a changed one keep their outputs, so each change runs the layers above it only:
half of the model on average. Used by every selector that asks what one layer is worth.

Legend: B batch, T time, E hidden size, V vocabulary, L layers, M measured quantities.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from rad.data.corpus import Corpus
from rad.distillation.batches import slice_of
from rad.placement import Placement
from rad.selection.base import SelectionContext, SelectionError, decoder_layers

Batch = TypeVar("Batch")


class NoAttention(nn.Module):
    """Attention that adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        """hidden_states (B,T,E) -> zeros (B,T,E)."""
        del kwargs
        return torch.zeros_like(hidden_states), None


@contextmanager
def replaced(model: Any, modules: Mapping[int, nn.Module]) -> Iterator[None]:
    """Within the block, `modules` take the place of these layers' attention."""
    layers = model.get_decoder().layers
    kept = {layer: layers[layer].self_attn for layer in modules}
    try:
        for layer, module in modules.items():
            layers[layer].self_attn = module
        yield
    finally:
        for layer, module in kept.items():
            layers[layer].self_attn = module


@contextmanager
def silenced(model: Any, chosen: Sequence[int]) -> Iterator[None]:
    """Within the block, the attention of layers `chosen` runs, fills its cache and adds nothing."""
    layers = decoder_layers(model)

    def clear(module: Any, arguments: Any, output: tuple[Tensor, Any]) -> tuple[Any, ...]:
        del module, arguments
        return (torch.zeros_like(output[0]), *output[1:])

    with ExitStack() as stack:
        for layer in chosen:
            stack.callback(layers[layer].self_attn.register_forward_hook(clear).remove)
        yield


def all_linear(context: SelectionContext, initialisation: str = "aligned") -> Any:
    """The all-linear student of the context's base.

    Raises `SelectionError` without the resources `mixer` (settings) and, to start aligned,
    `aligned` (folder of a stage-1 alignment).
    """
    from rad.models.convert import convert

    needed = ("mixer", "aligned") if initialisation == "aligned" else ("mixer",)
    for name in needed:
        if not context.resources.get(name):
            raise SelectionError(
                f"selector {getattr(context.settings, 'method', '?')} needs the resource {name!r}: "
                + ("settings of a mixer" if name == "mixer" else "folder of a stage-1 alignment")
            )
    nothing = Placement(
        base=context.base,
        layers=context.layers,
        heads=context.heads,
        kv_heads=context.kv_heads,
        softmax=[],
        selector="none",
    )
    aligned = Path(context.resources["aligned"]) if initialisation == "aligned" else None
    base = context.need_model()
    student = convert(base, nothing, context.resources["mixer"], initialisation, aligned=aligned)
    return student.to(base.device)


def stand_ins(context: SelectionContext, move: str) -> list[nn.Module]:
    """What takes the place of each layer's attention: silence, or its aligned mixer."""
    if move == "zero":
        return [NoAttention() for _ in range(context.layers)]
    student = all_linear(context)
    return [layer.self_attn for layer in student.model.layers]


class Trunk:
    """One intact pass over tokens (B,T), kept so that any layer can be changed on its own."""

    def __init__(self, model: Any, tokens: Tensor) -> None:
        self.model = model
        self.layers = decoder_layers(model)
        self._inputs: list[tuple[Tensor, dict[str, Any]]] = []
        last: list[Tensor] = []

        def keep(module: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
            del module
            self._inputs.append((arguments[0], settings))

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
            handle = self.layers[-1].register_forward_hook(
                lambda m, a, out: last.append(_first(out))
            )
            stack.callback(handle.remove)
            model.get_decoder()(input_ids=tokens.to(model.device), use_cache=False)
        self.hidden = last[0]

    def changed(self, layer: int, module: nn.Module) -> Tensor:
        """The last layer's output (B,T,E), before the norm, with `module` as layer's attention."""
        hidden = self._inputs[layer][0]
        with replaced(self.model, {layer: module}):
            for index in range(layer, len(self.layers)):
                hidden = _first(self.layers[index](hidden, **self._inputs[index][1]))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (...,V) of a last layer's output (...,E)."""
        normed = self.model.get_decoder().norm(hidden)
        found: Tensor = self.model.get_output_embeddings()(normed).float()
        return found


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, tuple) else output
    return first


Measure = Callable[[Trunk, Tensor, Batch], tuple[Tensor, float]]


@torch.no_grad()
def sweep(
    context: SelectionContext,
    batches: Sequence[tuple[Tensor, Batch]],
    modules: Sequence[nn.Module],
    measure: Measure[Batch],
    what: str,
    model: Any = None,
) -> tuple[Tensor, Tensor]:
    """Mean of `measure` for the intact model, (M,), and with each layer's stand-in, (L, M).

    `batches` are (tokens (B,T), what the measure needs besides); `measure` returns sums (M,) and
    the number of things summed; `model` is the base unless another one is given.
    """
    model = context.need_model() if model is None else model
    size = sum(parameter.numel() for parameter in model.parameters())
    sums: list[Tensor] = []
    count = 0.0
    for index, (tokens, batch) in enumerate(batches):
        trunk = Trunk(model, tokens)
        intact, weight = measure(trunk, trunk.hidden, batch)
        context.meter.add(tokens.numel(), weights=size)
        rows = [intact]
        for layer, module in enumerate(modules):
            rows.append(measure(trunk, trunk.changed(layer, module), batch)[0])
            context.meter.add(tokens.numel() * (1 - layer / len(modules)), weights=size)
        sums.append(torch.stack(rows).double())
        count += weight
        context.progress(f"{what}: batch {index + 1} of {len(batches)}")
    means = torch.stack(sums).sum(0) / count
    return means[0], means[1:]


TextBatch = tuple[Tensor, Tensor]


def text_batches(
    folder: Path, rows: int, batch_size: int, seed: int
) -> list[tuple[Tensor, TextBatch]]:
    """Training rows of a corpus as (tokens (B,T), (tokens, weights (B,T))), the same for a seed.

    Raises `SelectionError` when the corpus is missing, has fewer rows or predicts nothing.
    """
    try:
        corpus = Corpus(folder)
        tokens, weights = corpus.rows("train"), corpus.weights("train")
    except (KeyError, OSError, ValueError) as error:
        raise SelectionError(f"{folder}: not a corpus folder ({error})") from error
    if rows > len(tokens):
        raise SelectionError(f"{folder}: {rows} calibration rows asked, but it has {len(tokens)}")
    chosen = np.sort(np.random.default_rng(seed).choice(len(tokens), size=rows, replace=False))
    parts = [chosen[first : first + batch_size] for first in range(0, rows, batch_size)]
    pairs = [slice_of(tokens, weights, part) for part in parts]
    if not any(float(weight[:, 1:].sum()) for _, weight in pairs):
        raise SelectionError(f"{folder}: the {rows} calibration rows have no token to predict")
    return [(token, (token, weight)) for token, weight in pairs]


def text_loss(trunk: Trunk, hidden: Tensor, batch: TextBatch) -> tuple[Tensor, float]:
    """Sums of cross entropy (nats) and of correct next tokens, (2,), and the weight they carry."""
    tokens, weight = batch
    tokens, weight = tokens[:, 1:].to(hidden.device), weight[:, 1:].to(hidden.device)
    logits = trunk.logits(hidden[:, :-1])
    own = logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    correct = (logits.argmax(-1) == tokens).float()
    sums = torch.stack([-(own * weight).sum(), (correct * weight).sum()])
    return sums, float(weight.sum())
