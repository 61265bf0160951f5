"""KL-guided layer selection, GA-S2 (arXiv 2512.20569): which layer, put back, helps most.

For every layer: the all-linear student (mixers from stage-1 alignment) gets that one layer's
softmax attention back, is trained briefly on forward KL to the base, and is scored by its KL on
a fixed held-out slice. Layers are ranked by that KL, lowest first, and the top K are kept at once.
All candidates see the same batches in the same order, so their differences are paired.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from rad.data.corpus import Corpus
from rad.distillation import losses
from rad.distillation import optimiser as optimisers
from rad.distillation.batches import Batches
from rad.distillation.measure import HeldOut
from rad.files import digest, read_json, write_json
from rad.models.convert import convert
from rad.placement import Placement, Scores
from rad.selection.base import SelectionContext, SelectionError
from rad.settings import KLGuidedSettings, StageSettings

# the base's logits are kept for all candidates up to this many values (4 bytes each)
SHARED_LOGITS = 200_000_000


def select(context: SelectionContext) -> Placement:
    """Keep the K layers whose return lowers the held-out KL most.

    Needs `resources`: `aligned` (folder), `mixer` (settings), `state` (folder for finished
    candidates; a resumed selection does not repeat them).
    """
    settings = context.settings
    assert isinstance(settings, KLGuidedSettings)
    kept = context.layer_count()
    base = context.need_model()
    base.requires_grad_(False)
    corpus = Corpus(context.need_corpus())
    held_out = HeldOut(corpus, base, rows=settings.held_out_rows)
    teacher = _Teacher(base, corpus, settings, context)
    scores = []
    for layer in range(context.layers):
        score = _finished(context, layer, teacher.digest)
        if score is None:
            score = _candidate(context, settings, layer, base, teacher, held_out)
            _finish(context, layer, teacher.digest, score)
        scores.append(score)
        context.progress(f"kl_guided: layer {layer}: held-out KL {score:.4f}")
    ranking = sorted(range(context.layers), key=lambda layer: (scores[layer], layer))
    return context.layer_placement(
        ranking[:kept],
        scores=Scores(
            kind="layer",
            name="held-out KL to the base after restoring this layer (nats per token)",
            values=scores,
            higher_is_kept=False,
        ),
        provenance={"ranking": ranking},
    )


class _Teacher:
    """Batches with the base's logits, computed once for all candidates when they fit in memory."""

    def __init__(
        self, base: Any, corpus: Corpus, settings: KLGuidedSettings, context: SelectionContext
    ) -> None:
        self.base, self.context = base, context
        self.batches = Batches(corpus, settings.batch_size, seed=0)
        self.steps = max(1, settings.tokens // self.batches.tokens_per_batch)
        values = self.steps * self.batches.tokens_per_batch * base.config.vocab_size
        self.kept: dict[int, torch.Tensor] | None = {} if values <= SHARED_LOGITS else None
        self.digest = digest(
            {
                "settings": settings.model_dump(mode="json"),
                "corpus": corpus.manifest["settings_sha256"],
                "base": context.provenance.get("base_weights_sha256"),
            }
        )

    @torch.no_grad()
    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens (B,T), weights (B,T) and base logits (B,T,V) of a step."""
        tokens, weight = self.batches(step)
        if self.kept is not None and step in self.kept:
            return tokens, weight, self.kept[step]
        logits = self.base(tokens, use_cache=False).logits
        self.context.meter.add(tokens.numel())
        if self.kept is not None:
            self.kept[step] = logits
        return tokens, weight, logits


def _candidate(
    context: SelectionContext,
    settings: KLGuidedSettings,
    layer: int,
    base: Any,
    teacher: _Teacher,
    held_out: HeldOut,
) -> float:
    """Held-out KL (nats per token) of the student that keeps `layer` alone, after training."""
    for name in ("aligned", "mixer"):
        if name not in context.resources:
            raise SelectionError(f"kl_guided needs the resource {name!r}")
    placement = Placement.from_layers(
        [layer],
        layers=context.layers,
        heads=context.heads,
        kv_heads=context.kv_heads,
        base=context.base,
        selector="kl_guided",
    )
    student = convert(
        base,
        placement,
        context.resources["mixer"],
        "aligned",
        aligned=Path(context.resources["aligned"]),
    )
    stage = StageSettings(
        tokens=settings.tokens,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
    )
    optimiser, _ = optimisers.build(student, stage)
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    student.train()
    for step in range(teacher.steps):
        tokens, weight, target = teacher(step)
        optimisers.set_rate(optimiser, stage, step, teacher.steps)
        loss = losses.kl_loss(target, student(tokens, use_cache=False).logits, weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, stage.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        context.meter.add(tokens.numel())
    student.eval()
    context.meter.add(held_out.tokens.numel())
    return float(held_out(student)["held_out_kl"])


def _file(context: SelectionContext, layer: int) -> Path | None:
    state = context.resources.get("state")
    return Path(state) / f"layer{layer:03d}.json" if state else None


def _finished(context: SelectionContext, layer: int, owner: str) -> float | None:
    file = _file(context, layer)
    if file is None or not file.exists():
        return None
    record = read_json(file)
    return float(record["score"]) if record.get("digest") == owner else None


def _finish(context: SelectionContext, layer: int, owner: str, score: float) -> None:
    file = _file(context, layer)
    if file is not None:
        write_json(file, {"digest": owner, "layer": layer, "score": score})
