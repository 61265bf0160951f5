"""What one step of a stage computes: its losses and their gradients, micro-batch by micro-batch.

    kl            teacher hidden states + student hidden states -> divergence, chunked
    ce            student hidden states + next tokens -> cross entropy, chunked
    align, orientation   see `rad.distillation.layerwise`

Legend: B batch, T time, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rad.data.isolation import fold, unfold
from rad.distillation import losses, parallel, speed
from rad.distillation.batches import Batch
from rad.distillation.layerwise import layerwise_backward
from rad.distillation.shared_prefix import layer_input, shared_layers, starting_at
from rad.distillation.targets import Targets, final_hidden, head_of
from rad.recipe_settings import StageSettings

LAYERWISE = ("align", "orientation")


@dataclass
class StepLosses:
    """Losses of a step, nats per token or a distance: the total, its parts, and by layer."""

    total: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)

    def add(self, other: StepLosses, share: float = 1.0) -> None:
        """Add `share` times another one."""
        self.total += share * other.total
        for mine, theirs in ((self.parts, other.parts), (self.layers, other.layers)):
            for name, value in theirs.items():
                mine[name] = mine.get(name, 0.0) + share * value

    def divided(self, count: int) -> StepLosses:
        """The mean of `count` that were added."""
        mean = StepLosses()
        mean.add(self, 1 / max(1, count))
        return mean

    def summed(self) -> StepLosses:
        """The sum over all processes; they have the same parts and layers."""
        values = parallel.summed([self.total, *self.parts.values(), *self.layers.values()])
        parts = dict(zip(self.parts, values[1:], strict=False))
        layers = dict(zip(self.layers, values[1 + len(parts) :], strict=True))
        return StepLosses(values[0], parts, layers)


class Stage:
    """A stage bound to its models.

    `teacher` is a model or a `Teacher`. `shared` layers from the first are run once for base and
    student.
    """

    def __init__(
        self,
        settings: StageSettings,
        student: Any,
        base: Any,
        teacher: Any,
        *,
        share: bool = True,
        autocast: bool = False,
        vocabulary: int | None = None,
    ) -> None:
        self.settings, self.student, self.base = settings, student, base
        self.teacher = teacher if settings.loss == "kl" and settings.kl_weight else None
        self.autocast, self.vocabulary = autocast, vocabulary
        self.shared = 0
        if share and self.teacher is base and settings.loss == "kl":
            self.shared = shared_layers(student, base)

    @property
    def device(self) -> torch.device:
        """Where the student is."""
        device: torch.device = self.student.device
        return device

    def flops(self, time: int) -> float:
        """FLOPs that a training token costs at context `time`."""
        if self.settings.loss in LAYERWISE:
            return speed.layerwise_flops(self.student, self.base, time)
        live = self.teacher if isinstance(self.teacher, nn.Module) else None
        return speed.training_flops(self.student, time, teacher=live, shared=self.shared)

    def backward(self, batch: Batch) -> StepLosses:
        """Accumulate the gradient of the batch's loss: the weighted mean over all its tokens."""
        found = StepLosses()
        mine, processes = parallel.rank(), parallel.count()
        parts = [part.dealt(mine, processes) for part in batch.split(self.settings.accumulate)]
        masses = [self._mass(part) for part in parts]
        (mass_of_all,) = parallel.summed([sum(masses)])
        for part, mass in zip(parts, masses, strict=True):
            share = mass / max(mass_of_all, 1e-8)
            found.add(self._backward(part.to(self.device), share), share)
        return found.summed() if processes > 1 else found

    def _mass(self, batch: Batch) -> float:
        """What a micro-batch counts: the sum of the weights that its loss is a mean over."""
        if self.settings.loss == "orientation":
            return float(len(batch.tokens))
        if self.settings.loss == "align":
            return float((batch.weight > 0).sum())
        return float(batch.weight[:, 1:].sum(dtype=torch.float64))

    def _backward(self, batch: Batch, scale: float) -> StepLosses:
        if self.settings.loss in LAYERWISE:
            return self._layerwise(batch, scale)
        with speed.precision(self.device, self.autocast):
            total, parts = parallel.inside(self.student, lambda: self._token_losses(batch))
        (scale * total).backward()
        parallel.release(self.teacher)
        return StepLosses(total.item(), {name: value.item() for name, value in parts.items()})

    # --- logits ---------------------------------------------------------------------------

    def _token_losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Total loss and its unweighted parts."""
        stage, head = self.settings, head_of(self.student)
        hidden, targets = self.hidden(batch)
        parts: dict[str, Tensor] = {}
        terms = []
        if targets is not None:
            parts["kl"] = losses.distillation_loss(
                hidden,
                head,
                targets,
                batch.weight,
                kind=stage.divergence,
                temperature=stage.temperature,
                vocabulary=self.vocabulary,
            )
            terms.append(stage.kl_weight * parts["kl"])
        ce_weight = 1.0 if stage.loss == "ce" else stage.ce_weight
        if ce_weight:
            parts["ce"] = losses.ce_loss_from_hidden(hidden, head, batch.tokens, batch.weight)
            terms.append(ce_weight * parts["ce"])
        return torch.stack(terms).sum(), parts

    def hidden(self, batch: Batch) -> tuple[Tensor, Targets | None]:
        """Final hidden states (B,T,E) of the student, and the teacher's targets."""
        if self.teacher is not None and not isinstance(self.teacher, nn.Module):
            targets: Targets = self.teacher.targets(
                batch.tokens, batch.rows, boundaries=batch.boundaries
            )
            return self._isolated(self._student_alone, batch)[0], targets
        hidden, theirs = self._isolated(self._both, batch)
        if self.teacher is None:
            return hidden, None
        head = head_of(self.teacher).detach()
        return hidden, Targets("hidden", hidden=theirs, head=head)

    def _isolated(
        self, run: Callable[[Tensor], tuple[Tensor, Tensor]], batch: Batch
    ) -> tuple[Tensor, Tensor]:
        """`run` on the rows, or on each of their documents by itself."""
        if batch.boundaries is None:
            return run(batch.tokens)
        parts = unfold(batch.tokens, batch.boundaries)
        # the layers are whole in all processes at once: those with fewer parts run one again
        spare = parallel.most(len(parts)) - len(parts)
        outputs = [run(part.tokens) for part in parts]
        shape = batch.tokens.shape
        mine, theirs = (fold([output[i] for output in outputs], parts, *shape) for i in (0, 1))
        for _ in range(spare):
            mine = mine + 0 * run(parts[0].tokens)[0].sum()
        return mine, theirs

    def _student_alone(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        hidden = final_hidden(self.student, tokens)
        return hidden, hidden.detach()

    def _both(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Student's and teacher's final hidden states; the shared layers are run once."""
        if self.teacher is None:
            return self._student_alone(tokens)
        if not self.shared:
            with torch.no_grad():
                theirs = parallel.inside(self.teacher, lambda: final_hidden(self.teacher, tokens))
            return final_hidden(self.student, tokens), theirs
        with torch.no_grad(), layer_input(self.base, self.shared) as entered:
            theirs = final_hidden(self.base, tokens)
        with starting_at(self.student, self.shared, entered[0]):
            return final_hidden(self.student, tokens), theirs

    # --- layer by layer -------------------------------------------------------------------

    def _layerwise(self, batch: Batch, scale: float) -> StepLosses:
        parts = [(batch.tokens, batch.weight)]
        if batch.boundaries is not None:
            parts = [
                (part.tokens, part.take(batch.weight))
                for part in unfold(batch.tokens, batch.boundaries)
            ]
        found = StepLosses()
        counts = [float((weight > 0).sum()) for _, weight in parts]
        # the layers are whole in all processes at once: those with fewer parts run one again
        spare = parallel.most(len(parts)) - len(parts)
        parts, counts = parts + [parts[0]] * spare, counts + [0.0] * spare
        for (tokens, weight), count in zip(parts, counts, strict=True):
            share = count / max(sum(counts), 1.0)
            layers = layerwise_backward(
                self.student,
                self.base,
                tokens,
                weight,
                self.settings,
                scale=scale * share,
                autocast=self.autocast,
            )
            mean = sum(layers.values()) / len(layers)
            by_layer = {str(layer): value for layer, value in layers.items()}
            found.add(StepLosses(mean, {self.settings.loss: mean}, by_layer), share)
        return found
