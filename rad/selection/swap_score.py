"""Layer scores without training: the error of stage 1, and one layer swapped in a forward pass.

`residuals` is the loss of stage 1, layer by layer. Stage 1 is teacher-forced, so a layer's loss
does not depend on the others and one table gives GA-S1 and GR-S1 (KL-guided selection,
section 2.2). `SwapScore` is GA-S2 or GR-S2 at zero training tokens: swap one layer, measure the KL
to the base. Legend: R rows, T context, E hidden size, L layers.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from rad.distillation import losses
from rad.distillation.layerwise import attention_pairs
from rad.distillation.targets import Targets, head_of
from rad.selection.base import CostMeter
from rad.selection.prefix import Prefix
from rad.selector_settings import SHARED_LOGITS


@torch.no_grad()
def residuals(
    base: Any, linear: Any, tokens: Tensor, weight: Tensor, batch_size: int, meter: CostMeter
) -> list[float]:
    """Stage-1 loss of every layer, (L,): mean ||attention - mixer||_2 / sqrt(E) over R x T tokens.

    `linear` is the all-linear student; each mixer is given the base's own input.
    """
    counted = (weight > 0).float()
    total = torch.zeros(len(linear.base_model.layers), dtype=torch.float64)
    for part, mask in zip(tokens.split(batch_size), counted.split(batch_size), strict=True):
        for layer, inputs, output, rope in attention_pairs(base, part):
            mine, _ = linear.base_model.layers[layer].self_attn(inputs, position_embeddings=rope)
            total[layer] += losses.alignment_loss(output, mine, mask).item() * mask.sum().item()
        meter.add(2 * part.numel(), 2, weights=base.num_parameters())
    return (total / counted.sum().clamp_min(1e-8).item()).tolist()


class SwapScore:
    """KL to the base, nats per token, of hybrids put together from a base and its linear student.

    Exact for aligned students, whose norms, MLPs and embeddings are still the base's: layer i of
    the hybrid is layer i of one of the two models. Work is shared over the candidates of a call:
    both models run once, and each candidate starts at its own layer.
    """

    def __init__(
        self,
        base: Any,
        linear: Any,
        tokens: Tensor,
        weight: Tensor,
        *,
        batch_size: int,
        meter: CostMeter,
    ) -> None:
        self.models = {True: base, False: linear}
        self.tokens, self.weight = tokens, weight
        self.batch_size, self.meter = batch_size, meter

    @torch.no_grad()
    def __call__(
        self, kept: Collection[int], swapped: Sequence[int]
    ) -> tuple[float, dict[int, float]]:
        """KL with softmax in the layers `kept`, and with each of `swapped` changed alone."""
        depth = len(self.models[True].base_model.layers)
        whole = self.weight[:, 1:].sum().item()
        intact, scores = 0.0, dict.fromkeys(swapped, 0.0)
        for part, weight in zip(
            self.tokens.split(self.batch_size), self.weight.split(self.batch_size), strict=True
        ):
            share = weight[:, 1:].sum().item() / max(whole, 1e-8)
            runs = {kind: Prefix(model, part) for kind, model in self.models.items()}
            target = self._target(runs[True])
            inputs = self._inputs(runs, kept)
            intact += share * self._kl(runs[True], target, inputs[depth], weight)
            for layer in swapped:
                hidden = runs[layer not in kept].run(layer, inputs[layer])
                for after in range(layer + 1, depth):
                    hidden = runs[after in kept].run(after, hidden)
                scores[layer] += share * self._kl(runs[True], target, hidden, weight)
            mixed = 0 < len(kept) < depth
            layers_run = (2 + mixed) * depth + sum(depth - layer for layer in swapped)
            self.meter.add(
                part.numel() * layers_run / depth,
                2 + mixed + len(swapped),
                weights=self.models[True].num_parameters(),
            )
        return intact, scores

    @staticmethod
    def _inputs(runs: dict[bool, Prefix], kept: Collection[int]) -> list[Tensor]:
        """What goes into every layer of the hybrid that keeps `kept`, and what leaves the last."""
        depth = len(runs[True].layers)
        if len(kept) in (0, depth):
            whole = runs[bool(kept)]
            return [*whole.inputs, whole.output]
        inputs = [runs[True].inputs[0]]
        for layer in range(depth):
            inputs.append(runs[layer in kept].run(layer, inputs[-1]))
        return inputs

    @staticmethod
    def _target(base: Prefix) -> Tensor | Targets:
        """What the base says: logits (B,T,V), or hidden states where those would be large."""
        head = head_of(base.model).detach()
        if base.output[..., 0].numel() * head.vocabulary <= SHARED_LOGITS:
            return base.logits(base.output)
        return Targets("hidden", hidden=base.model.get_decoder().norm(base.output), head=head)

    @staticmethod
    def _kl(base: Prefix, target: Tensor | Targets, hidden: Tensor, weight: Tensor) -> float:
        if isinstance(target, Tensor):
            return losses.kl_loss(target, base.logits(hidden), weight).item()
        assert target.head is not None
        final = base.model.get_decoder().norm(hidden)
        return losses.distillation_loss(final, target.head, target, weight).item()
