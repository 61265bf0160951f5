"""The uniform baseline: evenly spaced layers (no torch).

Try it: `uniform_layers(28, 7, offset=3)` -> [3, 7, 11, 15, 19, 23, 27].
"""

from __future__ import annotations

from rad.placement import BudgetError, Placement
from rad.selection.base import SelectionContext, SelectionError
from rad.settings import UniformSettings


def uniform_layers(layers: int, kept: int, offset: int | None = None) -> list[int]:
    """`kept` evenly spaced indices of `layers`, ascending.

    Without an offset the indices are the middles of `kept` equal parts. With one, the first index
    is `offset` and the step is ceil(layers / kept), or the largest that still fits: this gives all
    published lists of the KL-guided study, whose convention differs between models.

    Raises `BudgetError` when `kept` exceeds `layers` and `SelectionError` for an offset that
    leaves room for another index before the first.
    """
    if not 0 <= kept <= layers:
        raise BudgetError(f"cannot keep {kept} of {layers} layers")
    if kept == 0:
        return []
    if offset is None:
        return [(2 * index + 1) * layers // (2 * kept) for index in range(kept)]
    step = -(-layers // kept)
    if not 0 <= offset < step:
        raise SelectionError(
            f"uniform offset {offset}: expected 0-{step - 1} when {kept} of {layers} layers stay"
        )
    if kept > 1:
        step = min(step, (layers - 1 - offset) // (kept - 1))
    return [offset + index * step for index in range(kept)]


def select(context: SelectionContext) -> Placement:
    """Evenly spaced whole layers; raises `BudgetError` when the budget is not whole layers."""
    settings = context.settings
    assert isinstance(settings, UniformSettings)
    kept = context.layer_count()
    return context.layer_placement(uniform_layers(context.layers, kept, settings.offset))
