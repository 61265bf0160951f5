"""KL-guided layer selection (arXiv 2512.20569): which layers, kept as softmax, help most.

| variant | start            | move of a candidate | score                             | kept     |
|---------|------------------|---------------------|-----------------------------------|----------|
| ga_s2   | all linear       | restore one layer   | KL after training                 | lowest   |
| gr_s2   | all softmax      | linearise one layer | KL after training                 | highest  |
| ga_s1   | all linear       | restore one layer   | stage-1 loss                      | lowest   |
| gr_s1   | all softmax      | linearise one layer | stage-1 loss                      | highest  |
| avg_s2, avg_s1 | both      | both                | mean of the two ranks             | lowest   |
| swap    | all linear       | restore one layer   | KL without training (our variant) | lowest   |

The linear layers are those of one stage-1 alignment. One-shot takes the K best at once, as
published; `sequential` scores the remaining layers again after every move. The trained variants
report the rank correlation of the training-free score with theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rad.distillation.shared_prefix import share_frozen
from rad.placement import Placement, Scores
from rad.selection.agreement import spearman
from rad.selection.base import SelectionContext, ranked
from rad.selection.candidates import Candidate, Candidates, Result, Shared
from rad.selection.early_stop import StableTopK, top
from rad.selection.swap_score import SwapScore, residuals
from rad.settings import KLGuidedSettings

Provenance = dict[str, Any]

UNITS = {
    "ga_s2": "KL to the base after restoring this layer and training (nats per token)",
    "gr_s2": "KL to the base after linearising this layer and training (nats per token)",
    "ga_s1": "stage-1 loss of the all-linear student with this layer restored (rms error)",
    "gr_s1": "stage-1 loss of the base with this layer linearised (rms error)",
    "avg_s2": "mean of this layer's GA-S2 and GR-S2 ranks (0 is the most important)",
    "avg_s1": "mean of this layer's GA-S1 and GR-S1 ranks (0 is the most important)",
    "swap": "held-out KL to the base after restoring this layer, untrained (nats per token)",
}


def select(context: SelectionContext) -> Placement:
    """Keep the K layers that the variant ranks first.

    Needs the resource `mixer` (settings) and, for mixers that can be aligned, `aligned` (folder of
    the stage-1 alignment); `state` is a folder for finished candidates, which a resumed selection
    does not repeat. Raises `BudgetError` for a budget that is not whole layers, `SelectionError`
    when a resource is missing or training diverges.
    """
    settings = context.settings
    assert isinstance(settings, KLGuidedSettings)
    run = _Run(context, settings, context.layer_count())
    # stage 1 is teacher-forced: no layer's loss depends on what was chosen before
    sequential = settings.greedy == "sequential" and not settings.variant.endswith("_s1")
    scores, higher = run.sequential() if sequential else run.one_shot()
    if context.meter.reused.tokens:
        run.report["reused"] = {
            "candidates": run.candidates.reused,
            "trained_tokens": round(context.meter.reused.trained),
        }
    kept = context.best_layers(scores, higher)
    name = UNITS[settings.variant]
    if sequential:
        name = f"place in the order of sequential choice by: {name}"
    return context.layer_placement(
        kept,
        scores=Scores(kind="layer", name=name, values=scores, higher_is_kept=higher),
        provenance={
            "ranking": ranked(scores, higher, "kl_guided"),
            "kl_guided": run.report,
        },
    )


class _Run:
    """One selection; what a reader of the placement wants to know gathers in `report`."""

    def __init__(self, context: SelectionContext, settings: KLGuidedSettings, kept: int) -> None:
        self.context, self.settings, self.kept = context, settings, kept
        self.shared = Shared(context, settings)
        self.candidates = Candidates(self.shared)
        self.layers = list(range(context.layers))
        self.linear = self.shared.hybrid([]).requires_grad_(False)
        share_frozen(self.linear, self.shared.base)
        self.swap = SwapScore(
            self.shared.base,
            self.linear,
            self.shared.tokens,
            self.shared.weight,
            batch_size=self.shared.held_out_batch,
            meter=context.meter,
        )
        self.report: Provenance = {"variant": settings.variant, "greedy": settings.greedy}

    # --- scores of a set of candidates ----------------------------------------------------

    def _softmax(self, move: str, fixed: Sequence[int]) -> set[int]:
        """Softmax layers when the layers `fixed` have been moved."""
        return set(fixed) if move == "ga" else set(self.layers) - set(fixed)

    def _named(self, move: str, fixed: Sequence[int], layers: Sequence[int]) -> list[Candidate]:
        before, word = self._softmax(move, fixed), {"ga": "restore", "gr": "linearise"}[move]
        return [
            Candidate(
                f"{word}-{len(fixed):02d}-layer{layer:03d}",
                layer,
                tuple(sorted(before ^ {layer})),
            )
            for layer in layers
        ]

    def trained(
        self, moves: Sequence[str], fixed: Sequence[int], layers: Sequence[int], count: int
    ) -> dict[str, list[float]]:
        """Scores after training per move; `count` layers are chosen from them (early stop)."""
        named = {move: self._named(move, fixed, layers) for move in moves}
        every = [candidate for move in moves for candidate in named[move]]
        choice = 0 < count < len(layers)
        stable = {move: StableTopK(count) for move in moves if choice}

        def check(losses: list[list[float]]) -> bool:
            window, done, calm = self.settings.check_every, len(losses[0]), []
            for move, rule in stable.items():
                start = list(moves).index(move) * len(layers)
                mine = losses[start : start + len(layers)]
                recent = [sum(loss[-window:]) / window for loss in mine]
                # a sequential round of GR moves the layer that is missed least
                highest = move == "gr" and self.settings.greedy == "one_shot"
                chosen = top(recent, layers, rule.count, highest)
                calm.append(rule.update(chosen, done / self.shared.last))
            return all(calm)

        early = self.settings.early_stop and choice
        rule = {
            "every": self.settings.check_every,
            "keep": count,
            "greedy": self.settings.greedy,
        }
        results = self.candidates.score(every, check if early else None, rule)
        if early:
            self.report.setdefault("early_stop", []).append(
                {
                    "steps": results[0].steps,
                    "of": self.shared.last,
                    "chosen": {move: rule.history for move, rule in stable.items()},
                }
            )
        self.report["steps"] = results[0].steps
        found = {}
        for index, move in enumerate(moves):
            mine = results[index * len(layers) : (index + 1) * len(layers)]
            found[move] = [self._value(result) for result in mine]
            if not fixed:
                self._compare(move, layers, mine)
        return found

    def _value(self, result: Result) -> float:
        held_out = self.settings.score == "held_out"
        return result.held_out if held_out else result.training_loss

    def _compare(self, move: str, layers: Sequence[int], results: Sequence[Result]) -> None:
        """Report how the scores of all layers agree with each other and with the swap score."""
        trained = [result.held_out for result in results]
        recent = [result.training_loss for result in results]
        intact, swap = self._swapped(move, (), layers)
        self.report[f"{move}_s2"] = {
            "held_out_kl": trained,
            "training_loss": recent,
            "spearman_held_out_training_loss": spearman(trained, recent),
            "swap": swap,
            "swap_before": intact,
            "spearman_swap_trained": spearman(swap, [self._value(result) for result in results]),
        }

    def _swapped(
        self, move: str, fixed: Sequence[int], layers: Sequence[int]
    ) -> tuple[float, list[float]]:
        with self.shared.precision():
            intact, found = self.swap(self._softmax(move, fixed), layers)
        return intact, [found[layer] for layer in layers]

    def stage1(self) -> dict[str, list[float]]:
        """GA-S1 and GR-S1 of every layer, from one table of residuals."""
        with self.shared.precision():
            errors = residuals(
                self.shared.base,
                self.linear,
                self.shared.tokens,
                self.shared.weight,
                self.shared.held_out_batch,
                self.context.meter,
            )
        self.report["residuals"] = errors
        total, count = sum(errors), len(errors)
        return {
            "ga": [(total - error) / count for error in errors],
            "gr": [error / count for error in errors],
        }

    # --- which layers are kept ------------------------------------------------------------

    def one_shot(self) -> tuple[list[float], bool]:
        """Scores of all layers and whether the higher ones are kept."""
        variant = self.settings.variant
        if variant == "swap":
            self.report["swap_before"], scores = self._swapped("ga", (), self.layers)
            return scores, False
        method, stage = variant.split("_")
        moves = ["ga", "gr"] if method == "avg" else [method]
        if stage == "s1":
            found = self.stage1()
        else:
            found = self.trained(moves, (), self.layers, self.kept)
        if method != "avg":
            return found[method], method == "gr"
        ranks = []
        for move in moves:
            order = ranked(found[move], move == "gr", "kl_guided")
            ranks.append([order.index(layer) for layer in self.layers])
        self.report["scores"] = found
        return [(a + b) / 2 for a, b in zip(*ranks, strict=True)], False

    def sequential(self) -> tuple[list[float], bool]:
        """The place of every layer in the order of choice; each move is scored on the last."""
        variant = self.settings.variant
        move = "gr" if variant == "gr_s2" else "ga"
        moves_left = self.kept if move == "ga" else len(self.layers) - self.kept
        fixed: list[int] = []
        rounds = []
        order = list(self.layers)
        for _ in range(moves_left):
            left = [layer for layer in self.layers if layer not in fixed]
            if variant == "swap":
                scores = self._swapped(move, fixed, left)[1]
            else:
                scores = self.trained([move], fixed, left, 1)[move]
            # lowest KL: the layer whose return helps most, or whose loss is felt least
            order = [left[index] for index in ranked(scores, False, "kl_guided")]
            rounds.append({"layers": left, "scores": scores, "moved": order[0]})
            fixed.append(order.pop(0))
        self.report["rounds"] = rounds
        if move == "gr":
            order, fixed = fixed[::-1], order[::-1]
        places = {layer: float(place) for place, layer in enumerate([*fixed, *order])}
        return [places[layer] for layer in self.layers], False
