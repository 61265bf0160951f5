"""SMART: evenly spread layers, the most sensitive ones among those (Zebra-Llama, 2505.17272).

A layer's sensitivity is how much KL to the base an all-linear student loses when the layer's
attention is put back, without training. With w = L // K, the first kept layer is the most sensitive
of the first w, the last of the last w; the gaps between kept layers differ by one at most; of all
such sets the one with the largest summed sensitivity stays (Zebra-Llama).
Its authors' code is not public; every published list meets these constraints.

Legend: L layers, K kept, B batch, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rad.distillation.losses import token_kl
from rad.field_settings import SmartSettings
from rad.placement import Placement, Scores
from rad.selection.base import SelectionContext, SelectionError, ranked
from rad.selection.layer_moves import (
    TextBatch,
    Trunk,
    all_linear,
    stand_ins,
    sweep,
    text_batches,
)


def smart_layers(sensitivity: Sequence[float], kept: int) -> list[int]:
    """The `kept` layers of largest summed sensitivity that meet SMART's constraints, ascending.

    Of equal sets the lexicographically first. Raises `SelectionError` when `kept` exceeds the
    layers or a sensitivity is no finite number.
    """
    layers = len(sensitivity)
    ranked(sensitivity, True, "smart")  # finite, or an error that says which is not
    if not 0 <= kept <= layers:
        raise SelectionError(f"smart cannot keep {kept} of {layers} layers")
    if kept == 0:
        return []
    window = layers // kept
    first = max(range(window), key=lambda layer: (sensitivity[layer], -layer))
    last = max(range(layers - window, layers), key=lambda layer: (sensitivity[layer], -layer))
    if kept == 1:
        return [first]  # the window is the whole model
    short, rest = divmod(last - first, kept - 1)
    # best[n] = (sum, layers) with n long gaps so far; rest long gaps are taken in all
    best: dict[int, tuple[float, list[int]]] = {0: (sensitivity[first], [first])}
    for step in range(1, kept):
        following: dict[int, tuple[float, list[int]]] = {}
        for taken in range(max(0, rest - (kept - 1 - step)), min(step, rest) + 1):
            options = []
            for long in (0, 1):
                if taken - long in best:
                    total, chosen = best[taken - long]
                    layer = chosen[-1] + short + long
                    options.append((total + sensitivity[layer], [*chosen, layer]))
            if options:
                following[taken] = min(options, key=lambda option: (-option[0], option[1]))
        best = following
    return best[rest][1]


def violation(kept: Sequence[int], layers: int) -> str | None:
    """Why a set of layers breaks SMART's constraints, or None when it meets them."""
    chosen = sorted(kept)
    if not chosen:
        return None
    if len(set(chosen)) != len(chosen) or chosen[0] < 0 or chosen[-1] >= layers:
        return f"{chosen} are not different layers of {layers}"
    window = layers // len(chosen)
    if chosen[0] >= window:
        return f"the first kept layer {chosen[0]} is not among the first {window}"
    if chosen[-1] < layers - window:
        return f"the last kept layer {chosen[-1]} is not among the last {window}"
    if len(chosen) == 1:
        return None
    short, rest = divmod(chosen[-1] - chosen[0], len(chosen) - 1)
    allowed = {short, short + 1} if rest else {short}
    for before, after in pairwise(chosen):
        if after - before not in allowed:
            return f"the gap {before} to {after} is not one of {sorted(allowed)}"
    return None


def select(context: SelectionContext) -> Placement:
    """Keep the K layers of `smart_layers`; sets of different K are not nested.

    Needs a corpus and, unless `sensitivity` is `zero`, the resources `mixer` and `aligned`.
    """
    settings = context.settings
    assert isinstance(settings, SmartSettings)
    kept = context.layer_count()
    base = context.need_model()
    batches = text_batches(context.need_corpus(), settings.rows, settings.batch_size, settings.seed)
    measure = Divergence(base, context)
    if settings.sensitivity == "restore":
        student = all_linear(context)
        modules = [layer.self_attn for layer in base.get_decoder().layers]
        intact, changed = sweep(context, batches, modules, measure, "smart", student)
        scores = (intact - changed)[:, 0].tolist()
        name = "KL to the base that the all-linear student loses with this layer (nats per token)"
    else:
        modules = stand_ins(context, settings.sensitivity)
        intact, changed = sweep(context, batches, modules, measure, "smart")
        scores = (changed - intact)[:, 0].tolist()
        word = {"linearise": "linear", "zero": "silent"}[settings.sensitivity]
        name = f"KL to the base when the layer alone is {word} (nats per token)"
    chosen = smart_layers(scores, kept)
    return context.layer_placement(
        chosen,
        scores=Scores(kind="layer", name=name, values=scores),
        provenance={
            "kl_before": float(intact[0]),
            "summed_sensitivity": sum(scores[layer] for layer in chosen),
            "ranking": ranked(scores, True, "smart"),
        },
    )


class Divergence:
    """Weighted KL of the base's next-token distributions to those of a changed model."""

    def __init__(self, base: Any, context: SelectionContext) -> None:
        self.base, self.context = base, context
        self._tokens: Tensor | None = None
        self._logits = torch.empty(0)

    def __call__(self, trunk: Trunk, hidden: Tensor, batch: TextBatch) -> tuple[Tensor, float]:
        """Sum (1,) over tokens in nats, and the weight they carry."""
        tokens, weight = batch
        weight = weight[:, 1:].to(hidden.device)
        if self._tokens is not tokens:  # once for all layers of a batch
            self._tokens = tokens
            if trunk.model is self.base:
                self._logits = trunk.logits(trunk.hidden[:, :-1])
            else:
                logits = self.base(tokens.to(hidden.device), use_cache=False).logits
                self._logits = logits[:, :-1]
                size = sum(parameter.numel() for parameter in self.base.parameters())
                self.context.meter.add(tokens.numel(), weights=size)
        values = token_kl(self._logits, trunk.logits(hidden[:, :-1]))
        return (values * weight).sum()[None], float(weight.sum())
