"""RAD: replace the layers whose attention the model misses least when it drafts for itself.

Which attention sub-layers can be skipped is asked of self-speculative decoding: the skip set that
decodes fastest is redundant (RAD, section 3.1). With a budget the number of skipped layers is
fixed, so the cost of a draft step is too, and tokens per second become a function of what is
accepted: every objective but `throughput` is free of timing noise.
"""

from __future__ import annotations

import statistics as stats
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rad.placement import Placement, Scores
from rad.selection.base import SelectionContext, SelectionError, calibration_rows
from rad.selection.search import SearchResult, search, top_k
from rad.selection.speculation_report import agreement, decoding_report, measured_report
from rad.selection.surrogate import Subset
from rad.selection.uniform import uniform_layers
from rad.settings import RadSettings

SCORES = {
    "acceptance": "accepted share of drafted tokens when only this layer's attention is skipped",
    "speed_up": "modelled speed-up of decoding when only this layer's attention is skipped",
    "matchness": "share of tokens predicted alike when only this layer's attention is skipped",
    "throughput": "measured speed-up of decoding when only this layer's attention is skipped",
}


def select(context: SelectionContext) -> Placement:
    """Keep the complement of the best skip set; raises `BudgetError` unless it is whole layers.

    The scores skip one layer at a time and are reported only: the search decides.
    """
    settings = _settings(context)
    size = context.layers - context.layer_count()
    diagnosis = Diagnosis(context, settings)
    found, report = diagnosis.search(size)
    alone = [diagnosis.objective((layer,)) for layer in range(context.layers)]
    context.progress(f"rad: skipping {list(found.best)} scores {found.value:.4f}")
    provenance: dict[str, Any] = {"search": report, "decoding": diagnosis.report(found.best)}
    if settings.agreement_seeds:
        chosen: dict[str, Subset] = {str(settings.objective): found.best}
        for seed in range(settings.seed + 1, settings.seed + 1 + settings.agreement_seeds):
            other = _changed(settings, "matchness", seed)
            chosen[f"matchness, seed {seed}"] = choose(context, other, size).best
        provenance["agreement"] = agreement(chosen, context.layers)
    return context.layer_placement(
        [layer for layer in range(context.layers) if layer not in found.best],
        scores=Scores(
            kind="layer", name=SCORES[settings.objective], values=alone, higher_is_kept=False
        ),
        provenance=provenance,
    )


def choose(context: SelectionContext, settings: RadSettings, size: int) -> SearchResult:
    """The search's result under other settings: the best set of `size` layers to skip."""
    return Diagnosis(context, settings).search(size)[0]


def compare_choices(
    context: SelectionContext, objectives: Iterable[str], seeds: Iterable[int]
) -> dict[str, Any]:
    """Agreement of the skip sets chosen under each objective and seed (prompts and search)."""
    settings = _settings(context)
    size = context.layers - context.layer_count()
    seeds = list(seeds)
    chosen: Mapping[str, Subset] = {
        f"{objective}, seed {seed}": choose(context, _changed(settings, objective, seed), size).best
        for objective in objectives
        for seed in seeds
    }
    return agreement(chosen, context.layers)


def _changed(settings: RadSettings, objective: str, seed: int) -> RadSettings:
    """Other prompts, search and objective; the free search of `threshold` is left out."""
    changes = {"objective": objective, "seed": seed, "discretisation": "top_k"}
    return RadSettings.model_validate({**settings.model_dump(), **changes})


def _settings(context: SelectionContext) -> RadSettings:
    settings = context.settings
    assert isinstance(settings, RadSettings)
    return settings


class Diagnosis:
    """The value of skip sets on one draw of calibration prompts, and the search for the best."""

    def __init__(self, context: SelectionContext, settings: RadSettings) -> None:
        from rad.selection.acceptance import Calibration
        from rad.selection.speculative import DraftExit

        if settings.discretisation == "threshold" and settings.objective not in (
            "speed_up",
            "throughput",
        ):
            raise SelectionError(
                f"discretisation: threshold needs an objective of speed (speed_up, throughput); by "
                f"{settings.objective} skipping nothing is always best"
            )
        self.context, self.settings = context, settings
        self.model = context.need_model()
        self.calibration = Calibration(
            self.model, self._prompts(), settings.new_tokens, context.meter
        )
        self.leave = DraftExit(settings.exit_threshold, settings.adaptive_exit)
        objectives: dict[str, Callable[[Subset], float]] = {
            "acceptance": lambda skip: self.counts(skip).acceptance_rate,
            "speed_up": self._modelled,
            "matchness": self.calibration.matchness,
            "throughput": lambda skip: self.timed(skip, settings.prompts).speed_up,
        }
        self.objective = objectives[settings.objective]
        if settings.objective == "throughput":
            self.timed((), 1)  # the first calls of a process are slow

    def _prompts(self) -> Any:
        """The calibration prompts (B,T)."""
        import torch

        settings, limit = self.settings, self.model.config.max_position_embeddings
        corpus = self.context.need_corpus()
        rows = calibration_rows(corpus, settings.prompts, settings.seed)
        if rows.shape[1] < settings.prompt_tokens:
            raise SelectionError(
                f"rad.prompt_tokens is {settings.prompt_tokens}, but rows of the corpus have only "
                f"{rows.shape[1]} tokens"
            )
        if settings.prompt_tokens + settings.new_tokens > limit:
            raise SelectionError(
                f"rad.prompt_tokens {settings.prompt_tokens} and new_tokens {settings.new_tokens} "
                f"exceed the base's {limit} positions; lower one of them"
            )
        return torch.from_numpy(rows[:, : settings.prompt_tokens])

    def counts(self, skip: Subset) -> Any:
        """Counts of decoding all prompts with `skip`."""
        return self.calibration.statistics(skip, self.settings.max_draft, self.leave)

    def _modelled(self, skip: Subset) -> float:
        from rad.selection.acceptance import draft_cost

        return float(self.counts(skip).speed_up(draft_cost(self.model, skip)))

    def timed(self, skip: Subset, prompts: int) -> Any:
        """Measured decoding of the first `prompts`, plainly and with `skip`."""
        from rad.selection.throughput import compare

        return compare(
            self.model,
            self.calibration.prompts[:prompts],
            skip,
            self.settings.new_tokens,
            max_draft=self.settings.max_draft,
            draft_exit=self.leave,
            meter=self.context.meter,
        )

    def search(self, size: int) -> tuple[SearchResult, dict[str, Any]]:
        """The best set of `size` layers, and the report of the search."""
        report: dict[str, Any] = {}
        known: dict[Subset, float] = {}
        if self.settings.discretisation == "threshold":
            free = self._search(None, [(), *_known_patterns(self.context.layers, size)])
            known = dict(free.history)
            report["unconstrained"] = _report(free)
        found = self._search(size, _known_patterns(self.context.layers, size), known)
        if self.settings.objective == "throughput":
            found, report["finalists"] = self._timed_again(found)
        return found, {**_report(found), **report}

    def _search(
        self,
        size: int | None,
        first: list[Subset],
        known: Mapping[Subset, float] | None = None,
    ) -> SearchResult:
        settings = self.settings
        return search(
            self.objective,
            self.context.layers,
            size,
            method=settings.search,
            evaluations=settings.evaluations,
            initial=settings.initial,
            seed=settings.seed,
            first=first,
            known=known,
            progress=lambda message: self.context.progress(f"rad: {message}"),
        )

    def _timed_again(self, found: SearchResult) -> tuple[SearchResult, list[list[Any]]]:
        """The best sets timed `repeats` times: the largest of many noisy values is too good."""
        medians = [
            (
                stats.median(self.objective(skip) for _ in range(self.settings.repeats)),
                skip,
            )
            for skip, _ in found.top(self.settings.finalists)
        ]
        value, best = max(medians, key=lambda pair: pair[0])
        found.best, found.value = best, value
        return found, [[list(skip), median] for median, skip in medians]

    def report(self, skip: Subset) -> dict[str, Any]:
        """Acceptance, analytic and, unless `timed_prompts` is 0, measured speed-up of `skip`."""
        settings = self.settings
        report = decoding_report(self.model, skip, self.counts(skip), settings.max_draft)
        report["matchness"] = self.calibration.matchness(skip)
        if settings.timed_prompts:
            self.timed(skip, 1)
            timed = self.timed(skip, settings.timed_prompts)
            report["measured"] = measured_report(timed, greedy=True)
        return report


def _known_patterns(layers: int, skipped: int) -> list[Subset]:
    """Sets worth trying first: evenly spaced, and the latest layers but the last."""
    import numpy as np

    late = np.arange(layers, dtype=np.float64)
    late[-1] = -1.0  # published skip sets leave the last layer in (RAD, section 3.3)
    return [tuple(uniform_layers(layers, skipped)), top_k(late, skipped)]


def _report(found: SearchResult) -> dict[str, Any]:
    return {
        "method": found.method,
        "skipped": list(found.best),
        "value": found.value,
        "ties": found.ties(),
        "evaluated": len(found.history),
        "exhaustive": found.exhaustive,
        "random_mean": found.random_mean(),
        "best_sets": [[list(chosen), value] for chosen, value in found.top(5)],
    }
