"""Selection contexts and probes that the retrieval-aware tests build on."""

from __future__ import annotations

from typing import Any

from rad.placement import Budget
from rad.selection import SelectionContext
from rad.selection import probes as probe_module
from rad.selection.probes import Probe
from rad.settings import RetrievalAwareSettings


class Plain:
    """A tokenizer-like object with special ids only."""

    bos_token_id = 1
    all_special_ids = (0, 1, 2)


def context_of(model: Any, budget: Budget, **chosen: Any) -> SelectionContext:
    fields = {name: chosen.pop(name) for name in ("corpus",) if name in chosen}
    tokenizer = chosen.pop("tokenizer", Plain())
    # a random base knows nothing: its probes are unfit, and only say so
    small = {"probe": "copy", "samples": 4, "tokens": 24, "batch_size": 3, "unfit_probe": "warn"}
    settings = RetrievalAwareSettings(**{**small, **chosen})
    return SelectionContext.for_model(model, budget, settings, tokenizer=tokenizer, **fields)


def build(context: SelectionContext) -> Probe:
    assert isinstance(context.settings, RetrievalAwareSettings)
    return probe_module.build(context, context.settings)


def nano(**chosen: Any) -> SelectionContext:
    from rad.models import sources

    settings = RetrievalAwareSettings(**{"probe": "nano", "samples": 16, **chosen})
    return SelectionContext.for_model(
        sources.load("nano:base"),
        Budget(heads=4),
        settings,
        tokenizer=sources.load_tokenizer("nano:base"),
    )
