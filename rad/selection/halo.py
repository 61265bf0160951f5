"""HALO: keep the layers that recall needs more than common sense does (arXiv 2601.22156).

After stage-1 alignment each layer i of the base alone becomes linear. With R(i) and C(i) the
accuracy on recall and on common-sense tasks that remains, s(i) = (max R - R(i)) / (max C - C(i) +
epsilon); the layers with the largest s stay (HALO, arXiv 2601.22156). Small bases can do none
of the paper's tasks: here R is the mean accuracy on recall prompts and C the next-token accuracy
on the corpus (default). A layer that costs next to nothing on either side has a ratio of two small
numbers, so one prompt more or less can decide; ask for many samples.
"""

from __future__ import annotations

from collections.abc import Sequence

from rad.field_settings import HaloSettings
from rad.placement import Placement, Scores
from rad.selection import recall_probes
from rad.selection.base import SelectionContext, SelectionError, ranked
from rad.selection.layer_moves import stand_ins, sweep, text_batches, text_loss
from rad.selection.recall_ablation import answer_score, check_probe


def halo_scores(
    recall: Sequence[float], common: Sequence[float], epsilon: float = 1e-6, clip: float = 50.0
) -> list[float]:
    """Scores of layers from what remains of `recall` and `common` sense when one is linear."""
    best_recall, best_common = max(recall), max(common)
    return [
        min(clip, (best_recall - r) / (best_common - c + epsilon))
        for r, c in zip(recall, common, strict=True)
    ]


def select(context: SelectionContext) -> Placement:
    """Keep the K layers of the largest score.

    Needs a corpus and the resources `mixer` and `aligned`. Raises `SelectionError` when the base is
    at chance on a recall probe, or when keeping both `endpoints` exceeds the budget.
    """
    settings = context.settings
    assert isinstance(settings, HaloSettings)
    kept = context.layer_count()
    base = context.need_model()
    text = text_batches(context.need_corpus(), settings.rows, settings.batch_size, settings.seed)
    modules = stand_ins(context, "linearise")
    per_task: dict[str, list[float]] = {}
    intact_recall: dict[str, float] = {}
    for task in settings.recall:
        asked = recall_probes.questions(
            task,
            settings.style,
            context.tokenizer,
            settings.samples,
            pairs=settings.pairs,
            tokens=settings.tokens,
            seed=settings.seed,
        )
        longest = base.config.max_position_embeddings
        parts = recall_probes.batches(context.tokenizer, asked, settings.batch_size, longest)
        intact, changed = sweep(context, parts, modules, answer_score, f"halo {task}")
        intact_recall[task] = float(intact[0])
        check_probe(task, asked, intact_recall[task])
        per_task[task] = changed[:, 0].tolist()
    recall = [sum(column) / len(column) for column in zip(*per_task.values(), strict=True)]
    intact, changed = sweep(context, text, modules, text_loss, "halo common sense")
    common = changed[:, 1].tolist()
    if settings.score == "ratio":
        scores = halo_scores(recall, common, settings.epsilon, settings.clip)
        name = "recall lost per next-token accuracy lost when the layer alone is linear (ratio)"
    else:
        scores = [max(recall) - value for value in recall]
        name = "recall accuracy lost when the layer alone is linear (share of prompts)"
    order = context.best_layers(scores)
    if settings.endpoints and kept:
        ends = list(dict.fromkeys([0, context.layers - 1]))
        if kept < len(ends):
            raise SelectionError(f"halo: endpoints are {len(ends)} layers, the budget keeps {kept}")
        ranking = ranked(scores, True, "halo")
        order = ends + [layer for layer in ranking if layer not in ends][: kept - len(ends)]
    return context.layer_placement(
        order,
        scores=Scores(kind="layer", name=name, values=scores),
        provenance={
            "recall": recall,
            "recall_by_task": per_task,
            "common": common,
            "intact_recall": intact_recall,
            "intact_common": float(intact[1]),
            "ranking": ranked(scores, True, "halo"),
        },
    )
