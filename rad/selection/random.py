"""The random baseline: layers or heads drawn by a seed (no torch). Report at least three seeds."""

from __future__ import annotations

import numpy as np

from rad.placement import Placement
from rad.selection.base import SelectionContext
from rad.selector_settings import RandomSettings


def select(context: SelectionContext) -> Placement:
    """Whole layers or single heads in a random order, cut where the budget ends.

    The order is a function of the seed and the base's shape alone, so sets of one seed are nested.
    Raises `BudgetError` for unit layers when the budget is not whole layers.
    """
    settings = context.settings
    assert isinstance(settings, RandomSettings)
    draws = np.random.default_rng(settings.seed)
    if settings.unit == "layers":
        return context.layer_placement(context.best_layers(draws.random(context.layers).tolist()))
    return context.placement(
        context.best_heads(draws.random((context.layers, context.heads)).tolist())
    )
