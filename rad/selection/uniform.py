"""The uniform baseline: evenly spaced layers or heads (no torch).

Try it: `uniform_layers(28, 7, offset=3)` -> [3, 7, 11, 15, 19, 23, 27].
"""

from __future__ import annotations

from rad.placement import BudgetError, Placement
from rad.selection.base import SelectionContext, SelectionError
from rad.selector_settings import UniformSettings


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


def uniform_heads(
    layers: int, heads: int, kept: int, spread: str = "per_layer", offset: int | None = None
) -> list[tuple[int, int]]:
    """`kept` evenly spread (layer, head) pairs of layers x heads, in order.

    `flat` spaces them over all heads, layer after layer, as `uniform_layers` spaces layers.
    `per_layer` gives every layer the same number, left-over heads going to evenly spaced layers;
    the heads of a layer are evenly spaced too, and `offset` rotates them.

    Raises `BudgetError` when `kept` exceeds the heads and `SelectionError` for an offset that is
    out of range.
    """
    if not 0 <= kept <= layers * heads:
        raise BudgetError(f"cannot keep {kept} of {layers} x {heads} heads")
    if spread == "flat":
        return [divmod(index, heads) for index in uniform_layers(layers * heads, kept, offset)]
    if offset is not None and not 0 <= offset < heads:
        raise SelectionError(f"uniform offset {offset}: expected 0-{heads - 1} for {heads} heads")
    each, extra = divmod(kept, layers)
    favoured = set(uniform_layers(layers, extra))
    pairs = []
    for layer in range(layers):
        chosen = uniform_layers(heads, each + (layer in favoured))
        turned = sorted((head + (offset or 0)) % heads for head in chosen)
        pairs += [(layer, head) for head in turned]
    return pairs


def select(context: SelectionContext) -> Placement:
    """Evenly spaced whole layers or heads; raises `BudgetError` when the budget does not allow it.

    Unlike rankings, sets of different budgets are not nested.
    """
    settings = context.settings
    assert isinstance(settings, UniformSettings)
    if settings.unit == "layers":
        kept = context.layer_count()
        return context.layer_placement(uniform_layers(context.layers, kept, settings.offset))
    shape = (context.layers, context.heads)
    limit = context.budget.kv_bytes_per_token
    if limit is None:
        count = context.budget.head_count(*shape)
        return context.placement(uniform_heads(*shape, count, settings.spread, settings.offset))
    if context.kv_head_bytes is None:
        raise SelectionError("selector uniform: bytes per key/value head not known")
    for count in range(context.layers * context.heads, 0, -1):
        pairs = _fitting(shape, count, settings)
        if pairs is None:
            continue
        per_layer = [sum(owner == layer for owner, _ in pairs) for layer in range(context.layers)]
        cached = sum(context.kv_heads if n == context.heads else n for n in per_layer)
        if cached * context.kv_head_bytes <= limit:
            return context.placement(pairs)
    return context.placement([])


def _fitting(
    shape: tuple[int, int], count: int, settings: UniformSettings
) -> list[tuple[int, int]] | None:
    """The spread of `count` heads, or None when its offset exists for fewer heads only."""
    if settings.spread == "flat" and (settings.offset or 0) >= -(-shape[0] * shape[1] // count):
        return None
    return uniform_heads(*shape, count, settings.spread, settings.offset)
