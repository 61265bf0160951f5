"""Retrieval-aware selection: keep the heads whose loss hurts looking things up most.

Every query head is zeroed alone and the base is asked a retrieval probe; heads are ranked by how
far the margin between the right answer and the likeliest wrong one falls, and the top k stay
(retrieval-aware distillation, sections 4.1 and 4.2, which ranks by the drop of accuracy; the
margin still ranks where accuracy does not move, and both are reported).

Legend: B rows, T time, H query heads, D model width, M answers, A answer tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from rad.placement import Placement, Scores
from rad.selection import probes
from rad.selection.ablation import zero_inputs
from rad.selection.base import CostMeter, SelectionContext, decoder_layers
from rad.selection.probes import Probe
from rad.settings import RetrievalAwareSettings


def select(context: SelectionContext) -> Placement:
    """Keep the heads with the largest drop of margin; raises `BudgetError` when out of range."""
    settings = context.settings
    assert isinstance(settings, RetrievalAwareSettings)
    count = context.budget.head_count(context.layers, context.heads)
    model = context.need_model()
    probe = probes.build(context, settings)
    found = ablate_heads(model, probe, settings.batch_size, context.meter, context.progress)
    margin_drop = found.margin - found.margins
    accuracy_drop = found.accuracy - found.accuracies
    ranking = rank(margin_drop)
    context.progress(
        f"retrieval_aware: intact accuracy {found.accuracy:.3f}, first heads {ranking[:4]}"
    )
    return context.placement(
        ranking[:count],
        scores=Scores(
            kind="head",
            name="drop of the answer's log-probability margin when the head is zeroed (nats)",
            values=margin_drop.tolist(),
        ),
        provenance={
            "probe": {
                "intact_margin": found.margin,
                "intact_accuracy": found.accuracy,
                "answers": len(probe.rows),
                "accuracy_drop": accuracy_drop.tolist(),
                "ranking": [list(pair) for pair in ranking],
            }
        },
    )


def rank(scores: Tensor) -> list[tuple[int, int]]:
    """All (layer, head) pairs of `scores` (layers, heads), largest first; ties in index order."""
    order = torch.argsort(scores.flatten(), descending=True, stable=True).tolist()
    heads = scores.shape[1]
    return [(index // heads, index % heads) for index in order]


class Ablation:
    """Mean margin and accuracy of the intact model, and with each head zeroed (layers, heads)."""

    def __init__(self, layers: int, heads: int) -> None:
        self.margin = 0.0
        self.accuracy = 0.0
        self.margins = torch.zeros(layers, heads, dtype=torch.float64)
        self.accuracies = torch.zeros(layers, heads, dtype=torch.float64)


@torch.no_grad()
def ablate_heads(
    model: Any,
    probe: Probe,
    batch_size: int,
    meter: CostMeter | None = None,
    progress: Callable[[str], None] | None = None,
) -> Ablation:
    """Score `probe` with the intact model and with every head zeroed alone.

    The layers below an ablated head do not change, so its pass starts from the stored input of
    its layer: on average half of the layers run.
    """
    meter = meter or CostMeter()
    layers = decoder_layers(model)
    heads = int(model.config.num_attention_heads)
    found = Ablation(len(layers), heads)
    rows = len(probe.tokens)
    for first in range(0, rows, batch_size):
        part = probe.part(first, first + batch_size)
        share = len(part.rows) / len(probe.rows)
        prefix = Prefix(model, part)
        meter.add(part.tokens.numel())
        margin, accuracy = prefix.score(prefix.intact)
        found.margin += share * margin
        found.accuracy += share * accuracy
        for layer in range(len(layers)):
            for head in range(heads):
                margin, accuracy = prefix.score(prefix.rerun(layer, head))
                found.margins[layer, head] += share * margin
                found.accuracies[layer, head] += share * accuracy
                meter.add(part.tokens.numel() * (len(layers) - layer) / len(layers))
        if progress is not None:
            progress(f"retrieval_aware: {min(first + batch_size, rows)}/{rows} probe rows")
    return found


class Prefix:
    """One intact pass over a batch, kept so that any layer can be run again from its input."""

    def __init__(self, model: Any, probe: Probe) -> None:
        self._model = model
        self._layers = decoder_layers(model)
        self._heads = int(model.config.num_attention_heads)
        self._probe = probe.to(model.device)
        self._inputs: list[tuple[Tensor, dict[str, Any]]] = []
        with ExitStack() as stack:
            for layer in self._layers:
                handle = layer.register_forward_pre_hook(self._keep, with_kwargs=True)
                stack.callback(handle.remove)
            # The decoder's output is normalised, the last layer's is what a re-run yields.
            last: list[Tensor] = []
            handle = self._layers[-1].register_forward_hook(
                lambda module, arguments, output: last.append(_hidden(output))
            )
            stack.callback(handle.remove)
            model.get_decoder()(input_ids=self._probe.tokens, use_cache=False)
        self.intact = last[0]

    def _keep(self, module: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        del module
        self._inputs.append((arguments[0], settings))

    def rerun(self, layer: int, head: int) -> Tensor:
        """Output (B, T, D) of the last layer with `head` of `layer` zeroed."""
        hidden = self._inputs[layer][0]
        projection = self._layers[layer].self_attn.o_proj
        with zero_inputs(projection, [head], self._heads):
            hidden = _hidden(self._layers[layer](hidden, **self._inputs[layer][1]))
        for index in range(layer + 1, len(self._layers)):
            hidden = _hidden(self._layers[index](hidden, **self._inputs[index][1]))
        return hidden

    def score(self, hidden: Tensor) -> tuple[float, float]:
        """Mean margin and accuracy of the answers, from the last layer's output (B, T, D)."""
        probe = self._probe
        # The distribution at a position predicts the next token.
        before = (probe.positions - 1).clamp(min=0)
        picked = hidden[probe.rows[:, None], before]
        normed = self._model.get_decoder().norm(picked)
        logits = self._model.get_output_embeddings()(normed).float()
        margins, correct = probe.score(logits.log_softmax(-1))
        return float(margins.double().mean()), float(correct.double().mean())


def _hidden(output: Any) -> Tensor:
    """The hidden state of a decoder layer's output, a tensor or a tuple that starts with one."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden
