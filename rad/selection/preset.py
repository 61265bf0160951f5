"""Presets: a selection that a paper published, for a base of the same shape (no torch).

`name` picks one list, or `paper`, `model`, `selector` and `probe_mixer` narrow them down and the
budget decides; rankings give any budget up to their length. What is published is in
`rad/assets/selections.json`, with the source of each list.

Try it: `rad select preset --base FOLDER --budget layers:7 --set paper=kl_guided --set selector=ar`.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from rad.field_settings import PresetSettings
from rad.placement import BudgetError, Placement, Scores
from rad.selection.base import SelectionContext, SelectionError
from rad.selection.published import Pair, Published, published, without_list

KEYS = ("paper", "model", "selector", "probe_mixer")


def select(context: SelectionContext) -> Placement:
    """The published list that fits the settings, the base's shape and the budget.

    Raises `SelectionError` naming what is available when none or several different ones do.
    """
    settings = context.settings
    assert isinstance(settings, PresetSettings)
    if settings.keep is not None:
        return _written(context, settings.keep)
    matching = _of_this_shape(context, _matching(settings))
    kept: dict[str, list[Pair]] = {}
    refused: BudgetError | None = None
    for item in matching:
        try:
            pairs = _kept(context, item)
        except BudgetError as error:  # not whole layers; a list of heads may still fit
            refused = error
            continue
        if pairs is not None:
            kept[item.name] = pairs
    if not kept and refused is not None:
        raise refused
    if not kept:
        raise SelectionError(
            f"preset: no list keeps budget {context.budget.slug}; available: {_sizes(matching)}"
        )
    if context.budget.kv_bytes_per_token is not None:  # the most that fits
        most = max(len(pairs) for pairs in kept.values())
        kept = {name: pairs for name, pairs in kept.items() if len(pairs) == most}
    if len({frozenset(pairs) for pairs in kept.values()}) > 1:
        raise SelectionError(
            f"preset: {len(kept)} different lists fit budget {context.budget.slug}; name one of "
            f"{_shorten(list(kept))}, or narrow down by {', '.join(KEYS)}"
        )
    name, pairs = next(iter(kept.items()))
    item = next(item for item in matching if item.name == name)
    scores = None
    if item.complete and item.layers is not None:
        places = [float(item.layers.index(layer)) for layer in range(context.layers)]
        scores = Scores(
            kind="layer", name="place in the published ranking", values=places, higher_is_kept=False
        )
    record = {key: item.record[key] for key in ("source", "provenance", "note")}
    return context.placement(
        pairs,
        scores=scores,
        provenance={
            "list": name,
            "same_list": [other for other in kept if other != name],
            "published_for": item.model,
            "role": item.role,
            "published": record,
        },
    )


def _written(context: SelectionContext, layers: Sequence[int]) -> Placement:
    """The first layers of a list given in the settings; raises `SelectionError` when too few."""
    count = context.layer_count()
    if len(set(layers)) != len(layers) or not set(layers) <= set(range(context.layers)):
        raise SelectionError(
            f"preset.keep {list(layers)}: expected different layers from 0 to {context.layers - 1}"
        )
    if count > len(layers):
        raise SelectionError(
            f"preset.keep has {len(layers)} layers, budget {context.budget.slug} keeps {count}"
        )
    return context.layer_placement(list(layers[:count]))


def _matching(settings: PresetSettings) -> list[Published]:
    """The lists that the settings name."""
    found = list(published())
    if settings.name is not None:
        reason = without_list().get(settings.name)
        if reason:
            raise SelectionError(f"preset: {settings.name} is no selection: {reason}")
        chosen = [item for item in found if item.name == settings.name]
        if not chosen:
            names = [item.name for item in found]
            close = difflib.get_close_matches(settings.name, names, n=5, cutoff=0.3)
            raise SelectionError(
                f"preset: no list {settings.name!r}; close to it: {', '.join(close) or 'none'} "
                f"({len(names)} in all)"
            )
        found = chosen
    else:
        found = [item for item in found if item.searchable]
    for key in KEYS:
        wanted = getattr(settings, key)
        if wanted is None:
            continue
        have = {str(getattr(item, key)) for item in found if getattr(item, key) is not None}
        found = [item for item in found if str(getattr(item, key)).lower() == wanted.lower()]
        if not found:
            raise SelectionError(
                f"preset: no list with {key} {wanted!r}; available: {', '.join(sorted(have))}"
            )
    return found


def _of_this_shape(context: SelectionContext, found: list[Published]) -> list[Published]:
    """The lists whose model has the base's layers and, where heads are named, its heads."""
    fitting = [
        item
        for item in found
        if item.num_layers in (None, context.layers) and item.num_heads in (None, context.heads)
    ]
    if not fitting:
        shapes = {
            f"{item.model} ({item.num_layers} layers"
            + (f" x {item.num_heads} heads)" if item.num_heads else ")")
            for item in found
        }
        raise SelectionError(
            f"preset: the base has {context.layers} layers x {context.heads} heads; the lists are "
            f"for {_shorten(sorted(shapes))}"
        )
    return fitting


def _kept(context: SelectionContext, item: Published) -> list[Pair] | None:
    """The pairs that `item` keeps under the budget, or None when it has no set of that size."""
    limited = context.budget.kv_bytes_per_token is not None
    if item.layers is not None:
        count = context.layer_count()
        if item.ordered:
            layers = item.layers[:count] if limited or count <= item.size else None
        else:
            layers = item.layers if item.size == count or (limited and item.size < count) else None
        if layers is None:
            return None
        return [(layer, head) for layer in layers for head in range(context.heads)]
    assert item.pairs is not None
    for layer, head in item.pairs:
        if layer >= context.layers or head >= context.heads:
            raise SelectionError(
                f"preset: {item.name} names layer {layer} head {head}, the base has "
                f"{context.layers} layers x {context.heads} heads"
            )
    named = list(item.pairs)
    # best first, so that every budget cuts where it would cut a ranking of the base's own
    scores = [[0.0] * context.heads for _ in range(context.layers)]
    for place, (layer, head) in enumerate(named):
        scores[layer][head] = float(len(named) - place)
    chosen = context.best_heads(scores)
    inside = [pair for pair in chosen if pair in set(named)]
    if item.ordered:
        return inside if limited or len(chosen) == len(inside) else None
    whole = len(inside) == len(named)
    return inside if whole and (limited or len(chosen) == len(named)) else None


def _sizes(found: Sequence[Published]) -> str:
    """What the lists keep: `ga_s2 Qwen2.5-3B-Instruct 5 layers`, rankings as `up to`."""
    sizes = [
        f"{item.selector} {item.model} {'up to ' if item.ordered else ''}{item.size} "
        f"{'heads' if item.layers is None else 'layers'}"
        for item in found
    ]
    return _shorten(list(dict.fromkeys(sizes)))


def _shorten(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
