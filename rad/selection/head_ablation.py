"""What a probe loses with every attention head zeroed alone (retrieval-aware, section 4.1).

The layers below an ablated head do not change, nor does the attention inside its own layer: a
variant starts from the stored input of `o_proj`, and several heads go through the rest of the model
as one batch. Legend: N probe rows, B rows of a batch, T time, H query heads, E hidden size, L
layers, C heads per pass, M answers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rad.selection.ablation import fixed_output
from rad.selection.base import CostMeter, decoder_layers
from rad.selection.prefix import Prefix
from rad.selection.probes import Probe

MEASURES = ("margin", "accuracy", "candidate_accuracy")
# values of the gates at which gradients are taken; 1 alone misses heads whose attention is so sure
# that a small change of them changes nothing
GATES = (1.0, 0.75, 0.5)


@dataclass
class Ablation:
    """Means over each row's answers: `intact[measure]` (N,), `zeroed[measure]` (L,H,N).

    `zeroed` is NaN for heads that were not ablated.
    """

    intact: dict[str, Tensor]
    zeroed: dict[str, Tensor]

    def drop(self, measure: str) -> Tensor:
        """Paired loss of each row, (L,H,N)."""
        return self.intact[measure] - self.zeroed[measure]

    def mean(self, measure: str) -> float:
        """Intact mean over the rows."""
        return float(self.intact[measure].mean())

    @classmethod
    def join(cls, parts: list[Ablation]) -> Ablation:
        """One ablation over the rows of all `parts`."""
        return cls(
            {name: torch.cat([part.intact[name] for part in parts]) for name in MEASURES},
            {name: torch.cat([part.zeroed[name] for part in parts], -1) for name in MEASURES},
        )


@torch.no_grad()
def intact_scores(
    model: Any, probe: Probe, batch_size: int, meter: CostMeter | None = None
) -> dict[str, Tensor]:
    """Every measure of the intact model by row, (N,)."""
    parts = []
    for first in range(0, len(probe.tokens), batch_size):
        part = probe.part(first, first + batch_size)
        scored = _Scored(model, part)
        parts.append(scored.measures(scored.prefix.output)[:, 0])
        if meter is not None:
            meter.add(part.tokens.numel(), weights=model.num_parameters())
    joined = torch.cat(parts, dim=1)  # (measures,N)
    return dict(zip(MEASURES, joined, strict=True))


@torch.no_grad()
def ablate_heads(
    model: Any,
    probe: Probe,
    batch_size: int,
    meter: CostMeter | None = None,
    progress: Callable[[str], None] | None = None,
    *,
    only: Collection[tuple[int, int]] | None = None,
    head_batch: int | None = None,
) -> Ablation:
    """Score `probe` with the intact model and with every head (or those of `only`) zeroed alone.

    `head_batch` heads share a pass; by default one on a CPU, where larger batches are slower, and
    all of a layer elsewhere.
    """
    meter = meter or CostMeter()
    layers, heads = len(decoder_layers(model)), int(model.config.num_attention_heads)
    together = head_batch or (1 if model.device.type == "cpu" else heads)
    rows = len(probe.tokens)
    zeroed = torch.full((len(MEASURES), layers, heads, rows), torch.nan, dtype=torch.float64)
    intact = torch.zeros(len(MEASURES), rows, dtype=torch.float64)
    for first in range(0, rows, batch_size):
        part = probe.part(first, first + batch_size)
        span = slice(first, first + len(part.tokens))
        scored = _Scored(model, part)
        weights = model.num_parameters()
        meter.add(part.tokens.numel(), weights=weights)
        intact[:, span] = scored.measures(scored.prefix.output)[:, 0]
        for layer in range(layers):
            wanted = [h for h in range(heads) if only is None or (layer, h) in only]
            for start in range(0, len(wanted), together):
                chosen = wanted[start : start + together]
                zeroed[:, layer, chosen, span] = scored.measures(scored.without(layer, chosen))
                share = len(chosen) * (layers - layer) / layers
                meter.add(part.tokens.numel() * share, weights=weights)
        if progress is not None:
            progress(f"retrieval_aware: {span.stop}/{rows} probe rows")
    return Ablation(
        dict(zip(MEASURES, intact, strict=True)), dict(zip(MEASURES, zeroed, strict=True))
    )


class _Scored:
    """A batch of probe rows after one intact pass, with what every `o_proj` was given."""

    def __init__(self, model: Any, probe: Probe) -> None:
        self.probe = probe.to(model.device)
        self.heads = int(model.config.num_attention_heads)
        self.rows = len(probe.tokens)
        self.mixed: list[Tensor] = []
        with ExitStack() as stack:
            for layer in decoder_layers(model):
                handle = layer.self_attn.o_proj.register_forward_pre_hook(
                    lambda module, arguments: self.mixed.append(arguments[0])
                )
                stack.callback(handle.remove)
            self.prefix = Prefix(model, self.probe.tokens)

    def without(self, layer: int, chosen: list[int]) -> Tensor:
        """Output (C*B,T,E) of the last layer with each head of `chosen` zeroed alone."""
        attention, count = self.prefix.layers[layer].self_attn, len(chosen)
        mixed = self.mixed[layer].unflatten(-1, (self.heads, -1))  # (B,T,H*D) -> (B,T,H,D)
        variants = mixed.expand(count, *mixed.shape).clone()  # (C,B,T,H,D)
        for index, head in enumerate(chosen):
            variants[index, :, :, head] = 0
        output = attention.o_proj(variants.flatten(0, 1).flatten(2))  # -> (C*B,T,E)
        hidden = self.prefix.inputs[layer].repeat(count, 1, 1)
        with fixed_output(attention, output):
            hidden = self.prefix.run(layer, hidden)
        return self.prefix.rest(layer + 1, hidden)

    def measures(self, hidden: Tensor) -> Tensor:
        """Every measure by variant and row, (measures,C,B), from hidden (C*B,T,E)."""
        probe = self.probe
        variants = hidden.unflatten(0, (-1, self.rows))  # (C,B,T,E)
        # the distribution at a position predicts the next token
        before = (probe.positions - 1).clamp(min=0)
        found = []
        for one in variants:
            logits = self.prefix.logits(one[probe.rows[:, None], before])  # (M,A,V)
            margins, correct = probe.score(logits.log_softmax(-1))
            found.append(torch.stack([margins, correct, margins > 0]).double())
        return self._by_row(torch.stack(found, dim=1))  # (measures,C,M)

    def _by_row(self, values: Tensor) -> Tensor:
        """Means over the answers of each row: (...,M) -> (...,B)."""
        total = values.new_zeros(*values.shape[:-1], self.rows)
        count = torch.bincount(self.probe.rows, minlength=self.rows).clamp_min(1)
        return (total.index_add_(-1, self.probe.rows, values) / count).cpu()


def gate_gradients(
    model: Any,
    probe: Probe,
    batch_size: int,
    meter: CostMeter | None = None,
    *,
    gates: Sequence[float] = GATES,
) -> Tensor:
    """Estimated loss of the mean margin when a head is zeroed, (L,H) in nats, of all heads at once.

    The mean of the margin's gradients with respect to a gate on each head's output, with all gates
    at each of the values `gates`; each value costs 3 passes.
    """
    layers, heads = decoder_layers(model), int(model.config.num_attention_heads)
    total = torch.zeros(len(layers), heads, dtype=torch.float64)
    for value in gates:
        gate = torch.full((len(layers), heads), value, device=model.device, requires_grad=True)
        with torch.enable_grad(), _gated(model, gate):
            for first in range(0, len(probe.tokens), batch_size):
                part = probe.part(first, first + batch_size).to(model.device)
                hidden = model.get_decoder()(input_ids=part.tokens, use_cache=False)[0]
                picked = hidden[part.rows[:, None], (part.positions - 1).clamp(min=0)]
                logits = model.get_output_embeddings()(picked).float()  # (M,A,V)
                margins, _ = part.score(logits.log_softmax(-1))
                (slope,) = torch.autograd.grad(margins.sum(), gate)
                total += slope.double().cpu()
                if meter is not None:
                    # backward through frozen weights costs one more pass, not two
                    meter.add(2 * part.tokens.numel(), weights=model.num_parameters())
    return total / (len(gates) * max(1, len(probe.rows)))


@contextmanager
def _gated(model: Any, gate: Tensor) -> Iterator[None]:
    """Within the block, the output of every head is multiplied by its `gate` (L,H)."""

    def scaling(values: Tensor) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor]]:
        def scale(module: Any, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
            del module
            mixed = arguments[0].unflatten(-1, (len(values), -1))  # (B,T,H*D) -> (B,T,H,D)
            return ((mixed * values[:, None].to(mixed.dtype)).flatten(-2),)

        return scale

    with ExitStack() as stack:
        for values, layer in zip(gate, decoder_layers(model), strict=True):
            handle = layer.self_attn.o_proj.register_forward_pre_hook(scaling(values))
            stack.callback(handle.remove)
        yield
