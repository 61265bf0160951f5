"""Leave one out, and progressive conversion: Apriel-H1 (arXiv 2511.02651).

One-shot: the attention of one layer adds nothing, and the layers whose absence costs most stay.
The paper measures MMLU; small bases cannot do it, so it is next-token accuracy on the corpus here
(default). Progressive: that ranking decides the first conversions only, since it misses how layers
interact; from then on every remaining layer is tried as a mixer in the current hybrid, trained for
some steps, and the layers with the lowest distillation loss are converted, round after round, each
hybrid distilled from the last (Apriel-H1, arXiv 2511.02651).

Legend: B batch, T time, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rad.data.corpus import Corpus
from rad.distillation.batches import Batches
from rad.distillation.losses import kl_loss
from rad.field_settings import LeaveOneOutSettings
from rad.placement import Placement, Scores
from rad.selection.base import SelectionContext, SelectionError, ranked
from rad.selection.layer_moves import (
    all_linear,
    stand_ins,
    sweep,
    text_batches,
    text_loss,
)

CLIP = 1.0  # gradient norm


def select(context: SelectionContext) -> Placement:
    """Keep the K layers that cost most to lose, or that progressive conversion reaches last.

    Needs a corpus; `mode: progressive` also the resource `mixer` and, to start aligned, `aligned`.
    One-shot sets are nested in K, progressive ones need not be.
    """
    settings = context.settings
    assert isinstance(settings, LeaveOneOutSettings)
    kept = context.layer_count()
    folder = context.need_corpus()
    batches = text_batches(folder, settings.rows, settings.batch_size, settings.seed)
    modules = stand_ins(context, "zero")
    intact, changed = sweep(context, batches, modules, text_loss, "leave_one_out")
    drops = {"loss": (changed - intact)[:, 0], "accuracy": (intact - changed)[:, 1]}
    scores = drops[settings.metric].tolist()
    unit = {"loss": "nats per token", "accuracy": "share of tokens"}[settings.metric]
    record = {
        "intact_loss": float(intact[0]),
        "intact_accuracy": float(intact[1]),
        "ranking": ranked(scores, True, "leave_one_out"),
    }
    if settings.mode == "one_shot":
        return context.layer_placement(
            context.best_layers(scores),
            scores=Scores(
                kind="layer",
                name=f"{settings.metric} lost without the layer ({unit})",
                values=scores,
            ),
            provenance=record,
        )
    order, rounds = convert_progressively(context, settings, scores, context.layers - kept)
    places = [float(order.index(layer)) for layer in range(context.layers)]
    return context.layer_placement(
        context.best_layers(places),
        scores=Scores(kind="layer", name="place in the order of conversion, from 0", values=places),
        provenance={**record, "leave_one_out": scores, "conversion_order": order, "rounds": rounds},
    )


def convert_progressively(
    context: SelectionContext, settings: LeaveOneOutSettings, scores: Sequence[float], wanted: int
) -> tuple[list[int], list[dict[str, Any]]]:
    """All layers in the order of conversion, the last ones staying, and what each round measured.

    `wanted` layers are converted. Raises `SelectionError` when a loss is no finite number.
    """
    easiest = ranked(scores, False, "leave_one_out")
    first = round(settings.first_share * wanted)
    done, remaining = easiest[:first], sorted(easiest[first:])
    rounds: list[dict[str, Any]] = [{"converted": list(done), "by": "leave one out"}]
    if len(done) == wanted:
        return [*done, *easiest[first:]], rounds
    trainer = _Trainer(context, settings)
    linear = all_linear(context, settings.initialisation)
    hybrid = copy.deepcopy(linear)
    for layer in remaining:
        attention = copy.deepcopy(context.model.model.layers[layer].self_attn)
        hybrid.model.layers[layer].self_attn = attention
    while True:
        if done:
            trainer.train(hybrid, settings.distil_steps)
        losses = {}
        for layer in remaining:
            candidate = copy.deepcopy(hybrid)
            candidate.model.layers[layer].self_attn = copy.deepcopy(
                linear.model.layers[layer].self_attn
            )
            losses[layer] = trainer.train(candidate, settings.steps, keep_place=True)
            context.progress(
                f"leave_one_out: {len(done)} converted, layer {layer}: loss {losses[layer]:.4f}"
            )
        order = [
            remaining[i] for i in ranked([losses[x] for x in remaining], False, "leave_one_out")
        ]
        chosen = order[: min(settings.per_round, wanted - len(done))]
        rounds.append({"converted": chosen, "by": "distillation loss", "losses": losses})
        done += chosen
        remaining = [layer for layer in remaining if layer not in chosen]
        if len(done) == wanted:
            return [*done, *order[len(chosen) :]], rounds
        for layer in chosen:
            hybrid.model.layers[layer].self_attn = linear.model.layers[layer].self_attn


class _Trainer:
    """Distils hybrids of the base; all candidates of a round see the same batches."""

    def __init__(self, context: SelectionContext, settings: LeaveOneOutSettings) -> None:
        self.base = context.need_model().requires_grad_(False)
        self.batches = Batches(Corpus(context.need_corpus()), settings.batch_size, settings.seed)
        self.settings, self.meter = settings, context.meter
        self.step = 0

    def train(self, hybrid: Any, steps: int, *, keep_place: bool = False) -> float:
        """Train all of `hybrid` for `steps`; mean loss of the last quarter, in nats per token.

        With `keep_place` the next training starts at the same batch.
        """
        parameters = [parameter.requires_grad_(True) for parameter in hybrid.parameters()]
        size = sum(parameter.numel() for parameter in parameters)
        base_size = sum(parameter.numel() for parameter in self.base.parameters())
        optimiser = torch.optim.AdamW(parameters, lr=self.settings.learning_rate, fused=True)
        hybrid.train()
        seen: list[float] = []
        for step in range(self.step, self.step + steps):
            tokens, weight = self.batches(step)
            tokens, weight = tokens.to(self.base.device), weight.to(self.base.device)
            with torch.no_grad():
                target = self.base(tokens, use_cache=False).logits
            loss = self._loss(target, hybrid(tokens, use_cache=False).logits, weight)
            if not torch.isfinite(loss):
                raise SelectionError(
                    f"leave_one_out: the distillation loss is {loss.item()} at step {step}; lower "
                    "learning_rate"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            self.meter.add(tokens.numel(), weights=base_size)
            self.meter.add(tokens.numel(), weights=size, trained=True)
            seen.append(loss.item())
        hybrid.eval()
        if not keep_place:
            self.step += steps
        tail = seen[-max(1, len(seen) // 4) :]
        return sum(tail) / len(tail) if tail else float("nan")

    def _loss(self, target: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        if self.settings.loss == "reverse_kl":
            return kl_loss(logits, target, weight)
        return kl_loss(target, logits, weight)
