"""Retrieval-aware selection: keep the heads whose loss hurts looking things up most.

Every query head is zeroed alone and the base is asked a retrieval probe; heads are ranked by what
the probe loses, and the top k stay (retrieval-aware distillation, sections 4.1 and 4.2, which ranks
by the accuracy; by default the margin between the right answer and the likeliest wrong one ranks,
which moves where accuracy does not, and both are reported).

Legend: N probe rows, H query heads, L layers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rad.files import digest
from rad.placement import BudgetError, Placement, Scores
from rad.selection import probes
from rad.selection.agreement import spearman
from rad.selection.base import SelectionContext, SelectionError, ranked
from rad.selection.head_ablation import (
    MEASURES,
    Ablation,
    ablate_heads,
    gate_gradients,
    intact_scores,
)
from rad.selection.probe_fit import check_ceiling, check_chance, tune_pairs
from rad.selection.probes import Probe
from rad.selection.recall_probes import is_nano
from rad.selection.reuse import remembered
from rad.settings import RetrievalAwareSettings

TUNING_ROWS = 64  # probe prompts per number of pairs tried
TUNING_SEED = 1_000_003  # added to the seed: the prompts that rank are not those that tune
UNITS = {
    "margin": "drop of the answer's log-probability margin when the head is zeroed (nats)",
    "accuracy": "drop of full-vocabulary accuracy when the head is zeroed (share of answers)",
    "candidate_accuracy": "drop of accuracy among the candidates when the head is zeroed (share)",
}
Pair = tuple[int, int]


def select(context: SelectionContext) -> Placement:
    """Keep the heads with the largest drop, or those of a control.

    Raises `BudgetError` when the budget is out of range or the threshold keeps another number of
    heads, `SelectionError` when the base does not fit the probe or a score is not finite.
    """
    settings = context.settings
    assert isinstance(settings, RetrievalAwareSettings)
    if context.budget.kv_bytes_per_token is None:
        context.budget.head_count(context.layers, context.heads)  # early, before any work
    if settings.control == "random":
        order = list(range(context.layers * context.heads))
        random.Random(f"retrieval_aware/random/{settings.seed}").shuffle(order)
        kept = _budgeted(context, order)
        return context.placement(kept, provenance={"control": "random"})
    return _Run(context, settings).placement()


def rank(scores: Tensor) -> list[Pair]:
    """All (layer, head) pairs of `scores` (L,H), largest first; ties in index order."""
    heads = scores.shape[1]
    return [divmod(i, heads) for i in ranked(scores.flatten().tolist(), True, "retrieval_aware")]


def _budgeted(context: SelectionContext, order: Sequence[int]) -> list[Pair]:
    """The first entries of `order` (indices of (layer, head) pairs) that the budget keeps."""
    place = {index: float(-position) for position, index in enumerate(order)}
    flat = [place[index] for index in range(context.layers * context.heads)]
    rows = [flat[layer * context.heads :][: context.heads] for layer in range(context.layers)]
    return context.best_heads(rows)


@dataclass
class _Measured:
    """Scores (L,H) that rank, the exact ones (NaN where not ablated), and the filter's record."""

    scores: Tensor
    ablation: Ablation
    exact: set[Pair]
    prefilter: dict[str, Any] | None


class _Run:
    """One selection by ablation."""

    def __init__(self, context: SelectionContext, settings: RetrievalAwareSettings) -> None:
        self.context, self.settings = context, settings
        self.model = context.need_model()
        self.tuning: dict[int, float] | None = None
        if settings.probe == "auto":
            known = context.tokenizer is not None and is_nano(context.tokenizer)
            settings = settings.model_copy(update={"probe": "nano" if known else "dictionary"})
            self.settings = settings
        if settings.probe == "dictionary" and settings.pairs == "auto":
            pairs, self.tuning = tune_pairs(self._tuning_accuracy)
            self.settings = settings = settings.model_copy(update={"pairs": pairs})
            context.progress(f"retrieval_aware: {pairs} pairs, tried {self.tuning}")
        seeds = range(settings.seed, settings.seed + settings.seeds)
        self.probes = [
            probes.build(context, settings.model_copy(update={"seed": seed})) for seed in seeds
        ]
        self.every = [
            (layer, head) for layer in range(context.layers) for head in range(context.heads)
        ]

    def _tuning_accuracy(self, pairs: int) -> float:
        settings = self.settings.model_copy(
            update={
                "pairs": pairs,
                "samples": min(self.settings.samples, TUNING_ROWS),
                "seed": self.settings.seed + TUNING_SEED,
            }
        )
        return float(self._intact([probes.build(self.context, settings)])[self._fit].mean())

    @property
    def _fit(self) -> str:
        """The measure by which the intact base has to fit."""
        by = self.settings.score
        return "candidate_accuracy" if by == "candidate_accuracy" else "accuracy"

    def _intact(self, found: Sequence[Probe]) -> dict[str, Tensor]:
        parts = [
            intact_scores(self.model, probe, self.settings.batch_size, self.context.meter)
            for probe in found
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in MEASURES}

    def placement(self) -> Placement:
        """Check the base, measure, choose."""
        settings, context = self.settings, self.context
        rows = sum(len(probe.tokens) for probe in self.probes)
        chance = sum(probe.chance() * len(probe.tokens) for probe in self.probes) / rows
        intact = {name: float(value.mean()) for name, value in self._intact(self.probes).items()}
        # a base that never says the answer may still prefer it to the other candidates
        able = intact["accuracy" if settings.score == "accuracy" else "candidate_accuracy"]
        warnings = [check_chance(settings, able, chance, rows, self.tuning)]
        measured = self._measure()
        flat = measured.scores.flatten().tolist()
        kept = self._choose(flat, rank(measured.scores))
        tied = _tied(flat, kept, context.heads)
        warnings.append(check_ceiling(settings, intact[self._fit], len(tied)))
        said = [text for text in warnings if text]
        for text in said:
            context.progress(f"retrieval_aware: {text}")
        ranking = rank(measured.scores)
        context.progress(
            f"retrieval_aware: intact accuracy {intact['accuracy']:.3f}, first heads {ranking[:4]}"
        )
        report = {
            "name": settings.probe,
            "rows": rows,
            "answers": sum(len(probe.rows) for probe in self.probes),
            "answer_tokens": max(int((probe.positions >= 0).sum(1).max()) for probe in self.probes),
            "pairs": settings.pairs if settings.probe == "dictionary" else None,
            "tuning": self.tuning,
            "chance": chance,
            **{f"intact_{name}": value for name, value in intact.items()},
            **self._drops(measured),
            "stability": self._stability(measured, len(kept)),
            "prefilter": measured.prefilter,
            "warnings": said,
            "ranking": [list(pair) for pair in ranking],
            "tied_at_the_cut": [list(pair) for pair in tied],
        }
        return context.placement(
            kept,
            scores=Scores(kind="head", name=UNITS[settings.score], values=measured.scores.tolist()),
            provenance={"control": settings.control, "probe": report},
        )

    # --- measuring ------------------------------------------------------------------------

    def _measure(self) -> _Measured:
        settings, share = self.settings, self.settings.prefilter
        if share is None:
            ablation = self._ablate(None)
            return _Measured(
                ablation.drop(settings.score).mean(-1), ablation, set(self.every), None
            )
        slopes = remembered(
            self.context, "retrieval_aware-slopes", self._key(), lambda: {"slopes": self._slopes()}
        )["slopes"]
        first = rank(slopes)[: max(1, round(share * len(self.every)))]
        count = len(_budgeted(self.context, self._indices(rank(slopes))))
        if count > len(first):
            raise SelectionError(
                f"prefilter {share:g} ablates {len(first)} heads, the budget keeps {count}: raise "
                f"prefilter to at least {count / len(self.every):.3g}"
            )
        ablation = self._ablate(None if settings.prefilter_recall else set(first))
        exact = ablation.drop(settings.score).mean(-1)
        scores = self._completed(exact, slopes, first)
        mine = [float(exact[pair]) for pair in first]
        record: dict[str, Any] = {
            "ablated": len(first),
            "gradient": slopes.tolist(),
            "spearman_among_ablated": spearman([float(slopes[pair]) for pair in first], mine),
        }
        if settings.prefilter_recall:
            true = rank(exact)
            found = len(set(true[:count]) & set(first))
            record["recall"] = {"of_first": count, "found": found / count if count else 1.0}
            record["spearman"] = spearman(slopes.flatten().tolist(), exact.flatten().tolist())
        return _Measured(scores, ablation, set(first), record)

    def _slopes(self) -> Tensor:
        """Mean gradient of the margin with respect to each head's gate, (L,H)."""
        settings, total = self.settings, sum(len(probe.rows) for probe in self.probes)
        slopes = torch.zeros(self.context.layers, self.context.heads, dtype=torch.float64)
        for probe in self.probes:
            slope = gate_gradients(self.model, probe, settings.batch_size, self.context.meter)
            slopes += slope * len(probe.rows) / total
        return slopes

    def _key(self) -> str:
        """Digest of all that the scores are a function of; the budget is not."""
        context, unused = self.context, {"control", "shift", "threshold", "unfit_probe"}
        return digest(
            {
                "settings": self.settings.model_dump(mode="json", exclude=unused),
                "base": [context.base, context.provenance.get("base_weights_sha256")],
                "probes": [digest(probe.tokens.tolist()) for probe in self.probes],
            }
        )

    def _ablate(self, only: set[Pair] | None) -> Ablation:
        """Scores of the intact base and with each head (or those of `only`) zeroed alone."""

        def work() -> dict[str, Tensor]:
            found = self._ablated(only)
            parts = {"intact": found.intact, "zeroed": found.zeroed}
            return {f"{part}.{name}": parts[part][name] for part in parts for name in MEASURES}

        found = remembered(self.context, "retrieval_aware-ablation", self._key(), work)
        return Ablation(
            {name: found[f"intact.{name}"] for name in MEASURES},
            {name: found[f"zeroed.{name}"] for name in MEASURES},
        )

    def _ablated(self, only: set[Pair] | None) -> Ablation:
        settings, context = self.settings, self.context
        return Ablation.join(
            [
                ablate_heads(
                    self.model,
                    probe,
                    settings.batch_size,
                    context.meter,
                    context.progress,
                    only=only,
                    head_batch=settings.head_batch,
                )
                for probe in self.probes
            ]
        )

    def _completed(self, exact: Tensor, slopes: Tensor, first: list[Pair]) -> Tensor:
        """Exact scores of `first`; the others get their slope, but below every exact score."""
        lowest = min(float(exact[pair]) for pair in first)
        steepest = max((float(slopes[pair]) for pair in set(self.every) - set(first)), default=0.0)
        scores = slopes - max(0.0, steepest - lowest)
        for pair in first:
            scores[pair] = exact[pair]
        return scores

    def _drops(self, measured: _Measured) -> dict[str, Any]:
        """Mean drops (L,H) with standard errors of the paired differences; null: not ablated."""
        report = {}
        for name in MEASURES:
            drop = measured.ablation.drop(name)
            rows = drop.shape[-1]
            error = drop.std(-1) / rows**0.5 if rows > 1 else torch.full(drop.shape[:2], torch.nan)
            report[f"{name}_drop"] = _json(drop.mean(-1))
            report[f"{name}_drop_error"] = _json(error)
        return report

    def _stability(self, measured: _Measured, kept: int) -> dict[str, Any] | None:
        """Agreement of the rankings by each seed's probe, or by its halves when there is one."""
        drop = measured.ablation.drop(self.settings.score)
        sizes = [len(probe.tokens) for probe in self.probes]
        if len(sizes) == 1:
            sizes = [sizes[0] // 2, sizes[0] - sizes[0] // 2]
        if min(sizes) == 0:
            return None
        pairs = sorted(measured.exact)
        parts = [part.mean(-1) for part in drop.split(sizes, dim=-1)]
        lists = [[float(part[pair]) for pair in pairs] for part in parts]
        orders = [ranked(values, True, "retrieval_aware") for values in lists]
        both = list(combinations(range(len(parts)), 2))
        agreed = [spearman(lists[a], lists[b]) for a, b in both]
        known = [value for value in agreed if value is not None]
        shared = [len(set(orders[a][:kept]) & set(orders[b][:kept])) for a, b in both]
        return {
            "of": "seeds" if len(self.probes) > 1 else "halves",
            "spearman": float(np.mean(known)) if known else None,
            "overlap_of_kept": float(np.mean(shared)) / kept if kept else None,
        }

    # --- choosing -------------------------------------------------------------------------

    def _indices(self, pairs: Sequence[Pair]) -> list[int]:
        return [layer * self.context.heads + head for layer, head in pairs]

    def _choose(self, flat: list[float], ranking: list[Pair]) -> list[Pair]:
        settings, context = self.settings, self.context
        order = self._indices(ranking)
        if settings.control == "bottom":
            order = ranked(flat, False, "retrieval_aware")
        elif settings.control == "shifted":
            order = self._shifted(order)
        kept = _budgeted(context, order)
        if settings.threshold is None:
            return kept
        above = sum(value > settings.threshold for value in flat)
        if context.budget.kv_bytes_per_token is not None:
            return self._within(ranking[: min(above, len(kept))])
        if above != len(kept):
            raise BudgetError(
                f"threshold {settings.threshold:g} keeps {above} heads, budget "
                f"{context.budget.slug} is {len(kept)}: ask for heads:{above}, or give a budget in "
                "kv_bytes_per_token, which is only a limit"
            )
        return kept

    def _shifted(self, order: list[int]) -> list[int]:
        count = len(_budgeted(self.context, order))
        shift = self.settings.shift or 3 * count
        if shift + count > len(order):
            raise SelectionError(
                f"control shifted: {count} heads after the first {shift} of {len(order)} do not "
                f"exist; set shift to at most {len(order) - count}"
            )
        return order[shift:] + order[:shift]

    def _within(self, pairs: list[Pair]) -> list[Pair]:
        """The longest prefix of `pairs` whose cache fits the budget in bytes.

        Fewer heads can cache more: a whole layer shares keys and values, single heads do not.
        """
        context, budget = self.context, self.context.budget.kv_bytes_per_token
        assert budget is not None and context.kv_head_bytes is not None
        for count in range(len(pairs), 0, -1):
            kept = Placement(
                schema=1,
                base=context.base,
                layers=context.layers,
                heads=context.heads,
                kv_heads=context.kv_heads,
                softmax=pairs[:count],
                selector="retrieval_aware",
            )
            if kept.cached_kv_heads() * context.kv_head_bytes <= budget:
                return pairs[:count]
        return []


def _tied(flat: Sequence[float], kept: Sequence[Pair], heads: int) -> list[Pair]:
    """The heads that share the lowest kept score, if any of them is not kept."""
    if not kept:
        return []
    last = min(flat[layer * heads + head] for layer, head in kept)
    tied = [divmod(index, heads) for index, value in enumerate(flat) if value == last]
    return tied if set(tied) - set(kept) else []


def _json(values: Tensor) -> list[list[float | None]]:
    return [[None if value != value else value for value in row] for row in values.tolist()]
