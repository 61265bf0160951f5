"""The claims ledger: every claim of the papers tested on a study, with a verdict.

The rules, for an effect counted in the claimed direction, its 95 % interval and the margin:

    supported       the whole interval is above the margin
    not supported   the whole interval is at or below the margin: an effect beyond it is excluded
    inconclusive    the interval has the margin inside, or there is no interval (one seed)
    not run         the study lacks an arm, a task, or the results of one

A claim that a study tests in several places (budgets, teachers) needs all of them and is as good as
its worst, and no better than inconclusive while one is not run; a claim that something exists (a
few heads) needs one and is as good as its best.
Intervals are not adjusted for the number of claims; Holm's adjustment of the one-sided p-values is
given beside them, and a supported claim that does not survive it says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rad.papers.claims import Claim, Comparison, Test, absent, claims, comparisons
from rad.papers.contrast import (
    Arm,
    Effect,
    exact,
    linear,
    per_seed,
    ratio,
    same_model,
    seed_ratio,
)
from rad.papers.evidence import (
    SELF,
    Cell,
    Evidence,
    Findings,
    Side,
    cache_bytes,
    contexts,
    same_students,
    scores_of,
    tasks_of,
)
from rad.reporting.crossing import Curve, position
from rad.reporting.crossing import ratio as token_ratio
from rad.reporting.describe import budget_text
from rad.reporting.significance import holm
from rad.reporting.statistics import LEVEL

SUPPORTED, NOT_SUPPORTED = "supported", "not supported"
INCONCLUSIVE, NOT_RUN = "inconclusive", "not run"
VERDICTS = (SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE, NOT_RUN)
ALPHA = (1 - LEVEL) / 2  # of a one-sided test with the same decisions as the interval
# what each arm counts for in the effect
WEIGHTS = {
    "difference": {"first": 1.0, "second": -1.0},
    "interaction": {"kept": -1.0, "kept_small": 1.0, "none": 1.0, "none_small": -1.0},
}


class Missing(ValueError):
    """Results that a comparison needs are not there; the message says which."""


@dataclass(frozen=True)
class Finding:
    """One comparison of a claim."""

    where: str
    verdict: str
    effect: Effect | None
    note: str = ""
    p: float | None = None


@dataclass(frozen=True)
class Entry:
    """A claim with its comparisons and the verdict over all of them."""

    claim: Claim
    findings: tuple[Finding, ...]
    verdict: str
    p: float | None = None
    p_adjusted: float | None = None

    @property
    def survives(self) -> bool:
        """Whether a supported claim stays so after Holm's adjustment."""
        return self.p_adjusted is None or self.p_adjusted < ALPHA


def verdict(effect: Effect, margin: float) -> str:
    """What an effect says about a claim of more than `margin`."""
    if math.isnan(effect.value):
        return INCONCLUSIVE
    if effect.low > margin:
        return SUPPORTED
    return NOT_SUPPORTED if effect.high <= margin else INCONCLUSIVE


def overall(verdicts: Sequence[str], needs: str = "all") -> str:
    """The verdict over several comparisons; where all are needed, one not run leaves it open."""
    if all(each == NOT_RUN for each in verdicts):
        return NOT_RUN
    order = (NOT_SUPPORTED, INCONCLUSIVE, SUPPORTED)
    found = next(
        each for each in (order if needs == "all" else reversed(order)) if each in verdicts
    )
    open_still = needs == "all" and NOT_RUN in verdicts and found == SUPPORTED
    return INCONCLUSIVE if open_still else found


# --- effects of each kind -------------------------------------------------------------------


def _arm(side: Side, family: str) -> Arm:
    tasks = tasks_of(side.members[0], family)
    runs = tuple(scores_of(member, tasks) for member in side.members)
    return Arm(runs, side.seeds if isinstance(side, Cell) else None)


def _score(test: Test, comparison: Comparison) -> Effect:
    for member in comparison.members:
        if member.samples is None:
            raise Missing(f"{member.id} is not scored")
    family = next(
        (
            name
            for name in test.families
            if all(tasks_of(member, name) for member in comparison.members)
        ),
        None,
    )
    if family is None:
        raise Missing(f"no task of the family {' or '.join(test.families)} was scored")
    arms = {name: _arm(side, family) for name, side in comparison.arms.items()}
    if test.effect == "ratio":
        return ratio(arms["first"], arms["second"])
    weights = WEIGHTS[test.effect]
    return linear([(weights[name], arm) for name, arm in arms.items()])


def _final_kl(member: Evidence) -> float:
    for point in reversed(member.curve):
        if point.held_out_kl is not None:
            return point.held_out_kl
    raise Missing(f"{member.id} has no held-out KL yet")


def _by_seed(side: Side) -> dict[int | None, Evidence]:
    return {member.seed: member for member in side.members}


def _held_out_kl(test: Test, comparison: Comparison) -> Effect:
    """Final held-out KL, which is better when lower: the sign is turned."""
    by_seed = {name: _by_seed(side) for name, side in comparison.arms.items()}
    shared = set.intersection(*(set(own) for own in by_seed.values()))
    if not shared:
        raise Missing("the arms have no seed in common")
    weights = WEIGHTS[test.effect]
    values = [
        -sum(weights[name] * _final_kl(own[seed]) for name, own in by_seed.items())
        for seed in sorted(shared, key=str)
    ]
    return per_seed(values)


def _curve(member: Evidence) -> Curve:
    import numpy as np

    points = [point for point in member.curve if point.held_out_kl is not None]
    if not points:
        raise Missing(f"{member.id} has no held-out KL yet")
    return Curve(
        np.array([point.tokens for point in points], dtype=np.float64),
        np.array([point.held_out_kl for point in points], dtype=np.float64),
    )


def _tokens(test: Test, comparison: Comparison) -> Effect:
    """Tokens of `second` to its own final KL over those of `first` to the same KL, per seed."""
    first, second = (_by_seed(comparison.arms[name]) for name in ("first", "second"))
    ratios = []
    for seed in sorted(first.keys() & second.keys(), key=str):
        own, other = _curve(first[seed]), _curve(second[seed])
        target = float(other.values[-1])
        at = position(own, target, falling=True, log=True)
        ratios.append(token_ratio(position(other, target, falling=True, log=True), at))
    if not ratios:
        raise Missing("the arms have no seed in common")
    return seed_ratio(ratios, test.margin)


def _cache(test: Test, comparison: Comparison) -> Effect:
    """Measured bytes of `second` over those of `first`, at the longest common context."""
    one = [comparison.arms[name].members[0] for name in ("first", "second")]
    for member in one:
        if member.efficiency is None:
            raise Missing(f"{member.id} was not measured")
    shared = contexts(one)
    if not shared:
        raise Missing("the caches were not measured at a common context")
    small, large = (cache_bytes(member, shared[-1]) for member in one)
    assert small and large
    return exact(large / small, f"measured bytes at {shared[-1]:,} tokens")


EFFECTS = {"score": _score, "held_out_kl": _held_out_kl, "tokens": _tokens, "cache": _cache}


def _formula(test: Test) -> list[Finding]:
    from rad.evaluation.memory_accounting import layer_wise, retrieval_aware, saving

    assert test.formula is not None
    found = []
    hybrid = layer_wise(test.formula.layers)
    for kept, state in test.formula.points:
        effect = exact(
            saving(retrieval_aware(kept, state), hybrid, test.formula.tokens),
            f"formula at {test.formula.tokens:,} tokens",
        )
        where = f"{kept} heads, state {state}, against {test.formula.layers} layers"
        found.append(Finding(where, verdict(effect, test.margin), effect))
    return found


# --- claims ---------------------------------------------------------------------------------


def describe(side: Side) -> str:
    """An arm as it is in the study."""
    if not isinstance(side, Cell):
        return f"untouched {side.id.removeprefix('model-')}"
    run = side.run
    parts = [run.selector, budget_text(run.budget.slug), run.mixer, run.initialisation]
    return ", ".join([*parts, f"{run.teacher} teacher"])


def where(comparison: Comparison) -> str:
    """The comparison in words; what all students share is named once."""
    named = {name: describe(side).split(", ") for name, side in comparison.arms.items()}
    cells = [named[name] for name, side in comparison.arms.items() if isinstance(side, Cell)]
    shared = [part for part in cells[0] if all(part in other for other in cells)]
    if len(cells) < 2:
        shared = [f"{SELF} teacher"]
    own = {
        name: ", ".join(part for part in parts if part not in shared)
        for name, parts in named.items()
    }
    text = " against ".join(own.values())
    if len(own) > 2:
        text = f"{own['none']} → {own['none_small']} against {own['kept']} → {own['kept_small']}"
    told = [part for part in shared if part != f"{SELF} teacher"]
    return f"{text} ({', '.join(told)})" if told and len(cells) > 1 else text


def _test(claim: Claim, comparison: Comparison) -> Finding:
    test, name = claim.test, where(comparison)
    try:
        effect = EFFECTS[test.kind](test, comparison)
    except Missing as error:
        return Finding(name, NOT_RUN, None, str(error))
    notes = []
    cells = comparison.cells
    if test.effect == "difference" and len(cells) == 2 and same_students(*cells):
        notes.append("both kept the same attention, so they are the same students")
        if effect.value:
            notes.append(f"measured between them: {effect.value:.3g}")
        effect = same_model(effect)
    elif effect.seeds == 1:
        notes.append("one seed")
    if math.isnan(effect.value):
        notes.append("both are zero")
    return Finding(name, verdict(effect, test.margin), effect, "; ".join(notes), _p(effect, test))


def _p(effect: Effect, test: Test) -> float | None:
    if effect.identical:
        return None if effect.value > test.margin else 1.0
    return effect.p(test.margin)


def judge(claim: Claim, findings: Findings) -> Entry:
    """A claim on a study."""
    if claim.test.kind == "formula":
        found = _formula(claim.test)
    else:
        found = [_test(claim, comparison) for comparison in comparisons(findings, claim.test)]
    if not found:
        found = [Finding("", NOT_RUN, None, absent(findings, claim.test))]
    result = overall([each.verdict for each in found], claim.test.needs)
    return Entry(claim, tuple(found), result, _joint([each.p for each in found], claim.test.needs))


def _joint(values: Sequence[float | None], needs: str) -> float | None:
    """Where all must hold the largest p-value is that of the claim; of any, Bonferroni's."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return max(known) if needs == "all" else min(1.0, len(known) * min(known))


def ledger(findings: Findings, chosen: Iterable[Claim] | None = None) -> list[Entry]:
    """Every claim on a study, with p-values adjusted over those that were tested."""
    entries = [judge(claim, findings) for claim in (claims() if chosen is None else chosen)]
    tested = [entry for entry in entries if entry.p is not None]
    adjusted = dict(zip(map(id, tested), holm([e.p or 0.0 for e in tested]), strict=True))
    return [Entry(e.claim, e.findings, e.verdict, e.p, adjusted.get(id(e))) for e in entries]
