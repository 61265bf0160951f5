"""RAD: replace the layers whose attention the model misses least when it drafts for itself.

Which attention sub-layers can be skipped is asked of self-speculative decoding: the skip set that
keeps the draft's tokens acceptable is redundant (RAD, section 3.1). With a budget the number of
skipped layers is fixed, so the cost of a draft step is too, and tokens per second become a
function of what is accepted; that makes the diagnosis free of timing noise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rad.placement import Placement, Scores
from rad.selection.base import SelectionContext, SelectionError, calibration_rows
from rad.selection.search import SearchResult, Subset, search, top_k
from rad.selection.uniform import uniform_layers
from rad.settings import RadSettings

SCORES = {
    "acceptance": "accepted share of drafted tokens when only this layer's attention is skipped",
    "speed_up": "modelled speed-up of decoding when only this layer's attention is skipped",
    "matchness": "share of tokens predicted alike when only this layer's attention is skipped",
}


def select(context: SelectionContext) -> Placement:
    """Keep the complement of the best skip set; raises `BudgetError` unless it is whole layers.

    The scores skip one layer at a time and are reported only: the search decides.
    """
    settings = context.settings
    assert isinstance(settings, RadSettings)
    kept = context.layer_count()
    measure, statistics = _measures(context, settings)

    found = search(
        measure,
        context.layers,
        context.layers - kept,
        evaluations=settings.evaluations,
        initial=settings.initial,
        seed=settings.seed,
        first=_known_patterns(context.layers, context.layers - kept),
        progress=lambda message: context.progress(f"rad: {message}"),
    )
    alone = [measure((layer,)) for layer in range(context.layers)]
    context.progress(f"rad: skipping {list(found.best)} scores {found.value:.4f}")
    return context.layer_placement(
        [layer for layer in range(context.layers) if layer not in found.best],
        scores=Scores(
            kind="layer", name=SCORES[settings.objective], values=alone, higher_is_kept=False
        ),
        provenance={"search": _report(found), "decoding": statistics(found.best)},
    )


def _measures(
    context: SelectionContext, settings: RadSettings
) -> tuple[Callable[[Subset], float], Callable[[Subset], dict[str, Any]]]:
    """The objective of a skip set, and the full decoding statistics of one."""
    import torch

    from rad.selection.acceptance import Calibration, draft_cost
    from rad.selection.speculative import DraftExit

    model = context.need_model()
    rows = calibration_rows(context.need_corpus(), settings.prompts, settings.seed)
    if rows.shape[1] < settings.prompt_tokens:
        raise SelectionError(
            f"rad.prompt_tokens is {settings.prompt_tokens}, but rows of the corpus have only "
            f"{rows.shape[1]} tokens"
        )
    prompts = torch.from_numpy(rows[:, : settings.prompt_tokens])
    calibration = Calibration(model, prompts, settings.new_tokens, context.meter)
    leave = DraftExit(settings.exit_threshold, settings.adaptive_exit)

    def objective(skip: Subset) -> float:
        if settings.objective == "matchness":
            return calibration.matchness(skip)
        counts = calibration.statistics(skip, settings.max_draft, leave)
        if settings.objective == "acceptance":
            return counts.acceptance_rate
        return counts.speed_up(draft_cost(model, len(skip)))

    def statistics(skip: Subset) -> dict[str, Any]:
        counts = calibration.statistics(skip, settings.max_draft, leave)
        return {
            "drafted": counts.drafted,
            "accepted": counts.accepted,
            "verifications": counts.verifications,
            "acceptance_rate": counts.acceptance_rate,
            "acceptance_length": counts.acceptance_length,
            "modelled_speed_up": counts.speed_up(draft_cost(model, len(skip))),
            "matchness": calibration.matchness(skip),
        }

    return objective, statistics


def _known_patterns(layers: int, skipped: int) -> list[Subset]:
    """Sets worth trying first: evenly spaced, and the latest layers but the last."""
    import numpy as np

    late = np.arange(layers, dtype=np.float64)
    late[-1] = -1.0  # published skip sets leave the last layer in (RAD, section 3.3)
    return [tuple(uniform_layers(layers, skipped)), top_k(late, skipped)]


def _report(found: SearchResult) -> dict[str, Any]:
    return {
        "skipped": list(found.best),
        "value": found.value,
        "evaluated": len(found.history),
        "exhaustive": found.exhaustive,
        "random_mean": found.random_mean(),
        "best_sets": [[list(chosen), value] for chosen, value in found.top(5)],
    }
