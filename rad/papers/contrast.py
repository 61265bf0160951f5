"""Effects over training seeds and documents: differences, ratios and interactions of arms.

An arm is one model, or one model per seed, that answered the same documents as the others. A
contrast is a weighted sum of the arms' mean scores; its variance is that of the crossed design of
`rad.reporting.seeds` (seeds and documents are both samples), which is hierarchical in the sense
that a seed brings a whole table of documents. A model without seeds, such as an untouched base,
shares the documents and adds no variance of seeds.

    interval = value +- t(df) x standard error

No interval may be narrower than what one document more or less would change. Where fewer than four
documents differ from the others their variance says nothing: no interval is narrower than Wilson's
for a difference that no document has shown. A ratio a / b is linearised around its value (delta
method) and has no interval where b is not clearly away from zero (Fieller's condition).

References: Searle, Casella and McCulloch, Variance Components (1992); Satterthwaite (1946);
Fieller, JRSS B 16 (1954).

Legend: S seeds, D documents of all tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from rad.reporting.seeds import Run, Spread, contributions, spread
from rad.reporting.statistics import LEVEL, Array, wilson


@dataclass(frozen=True)
class Effect:
    """A number with its uncertainty; infinite `error`: there is nothing to take one from.

    `low` and `high` are given where the interval is not symmetric (a ratio of tokens). `seeds` is
    the smallest number of seeds of any trained arm, `documents` those of one model.
    """

    value: float
    error: float = 0.0
    df: float = math.inf
    documents: int = 0
    seeds: int = 0
    basis: str = ""
    ends: tuple[float, float] | None = None
    p_below: float | None = None  # one-sided p-value where it does not follow from `error`
    identical: bool = False  # the arms are the same model: no sampling error at all

    @property
    def _half(self) -> float:
        if self.error == 0:
            return 0.0
        return float(stats.t.ppf(0.5 + LEVEL / 2, self.df)) * self.error

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.ends[0] if self.ends else self.value - self._half

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.ends[1] if self.ends else self.value + self._half

    def p(self, margin: float) -> float | None:
        """One-sided p-value of an effect no larger than `margin`; None for exact numbers."""
        if self.p_below is not None:
            return self.p_below
        if self.error == 0:
            return None
        if math.isinf(self.error):
            return 1.0
        return float(stats.t.sf((self.value - margin) / self.error, self.df))


@dataclass(frozen=True)
class Arm:
    """What one side of a contrast scored: per seed and task an array of documents.

    `seeds` are None for a model that is not trained.
    """

    runs: tuple[Run, ...]
    seeds: tuple[int, ...] | None


@dataclass(frozen=True)
class _Sum:
    """A weighted sum of arms: per seed its value and what each document adds, by task."""

    value: float
    variance: float
    df: float
    documents: int
    seeds: int
    basis: str


def _floor(weights: Sequence[float], parts: Sequence[Array]) -> float:
    """Least variance: one document of another score; of few that differ, Wilson's of nothing seen.

    `parts`: what documents add, by task. Tasks count alike, so that the smallest decides what could
    be hidden. From z^2 documents (3.8) on, the interval of their variance is as wide as Wilson's.
    """
    size = len(parts) * min(map(len, parts))
    least, z = 1 / size, float(stats.norm.ppf(0.5 + LEVEL / 2))
    differing = sum(int((np.abs(part - np.median(part)) > 1e-12).sum()) for part in parts)
    if differing < z**2:
        least = max(least, wilson(0, size)[1] / z)
    return (max(map(abs, weights)) * least) ** 2


def _ordered(arm: Arm, seeds: Sequence[int] | None, matched: bool) -> list[Run]:
    """The arm's runs in the order of `seeds`, where they are the same seeds."""
    if arm.seeds is None or seeds is None or not matched:
        return list(arm.runs)
    return [arm.runs[arm.seeds.index(seed)] for seed in seeds]


Contribution = tuple[float, list[Array]]  # of a run: its mean, and each document's part of it


def _combined(arms: Sequence[tuple[float, Sequence[Contribution]]], seed: int) -> Contribution:
    """The contrast of one seed; models without seeds have the same run for all."""
    chosen = [(weight, own[seed % len(own)]) for weight, own in arms]
    tasks = range(len(chosen[0][1][1]))
    parts = [np.sum([weight * own[i] for weight, (_, own) in chosen], axis=0) for i in tasks]
    return sum(weight * value for weight, (value, _) in chosen), parts


def _averaged(own: Sequence[Contribution]) -> list[Contribution]:
    """The mean over seeds, as if it were one run."""
    tasks = range(len(own[0][1]))
    parts = [np.mean([part[i] for _, part in own], axis=0) for i in tasks]
    return [(float(np.mean([value for value, _ in own])), parts)]


def _sum(arms: Sequence[tuple[float, Arm]]) -> _Sum:
    trained = [arm for _, arm in arms if arm.seeds is not None]
    first = trained[0].seeds if trained else None
    matched = all(sorted(arm.seeds or ()) == sorted(first or ()) for arm in trained)
    found = [
        (weight, [contributions(run) for run in _ordered(arm, first, matched)])
        for weight, arm in arms
    ]
    value, mean = _combined([(weight, _averaged(own)) for weight, own in found], 0)
    size = sum(len(part) for part in mean)
    fewest = min((len(arm.runs) for arm in trained), default=0)
    if fewest > 1 and matched:
        each = [_combined(found, seed) for seed in range(fewest)]
        own = spread([value for value, _ in each], [parts for _, parts in each])
        variance, df = own.variance, own.df
    else:
        documents = spread([0.0], [mean]).documents
        variance, df = documents, float(max(1, size - 1))
        each_arm = [
            (weight**2, spread([value for value, _ in runs], [parts for _, parts in runs]))
            for (weight, runs), (_, arm) in zip(found, arms, strict=True)
            if arm.seeds is not None and len(runs) > 1
        ]
        if each_arm:
            seeds = sum(square * part.seeds for square, part in each_arm)
            interaction = sum(square * part.interaction for square, part in each_arm)
            count = min(part.count for _, part in each_arm)
            own = Spread(seeds, documents, interaction, count, size)
            variance, df = own.variance, own.df
    basis = "seeds and documents" if fewest > 1 else "documents"
    if trained and fewest == 1:
        basis = "documents, one seed"
    floor = _floor([weight for weight, _ in arms], mean)
    return _Sum(value, max(variance, floor), df, size, fewest, basis)


def linear(arms: Sequence[tuple[float, Arm]]) -> Effect:
    """Weighted sum of the arms' means. Raises `ValueError` on no arms."""
    if not arms:
        raise ValueError("a contrast needs arms")
    found = _sum(arms)
    return Effect(
        found.value, math.sqrt(found.variance), found.df, found.documents, found.seeds, found.basis
    )


def ratio(top: Arm, bottom: Arm) -> Effect:
    """`top` over `bottom`; without an interval where `bottom` may be zero."""
    below = _sum([(1.0, bottom)])
    above = _sum([(1.0, top)])
    if below.value <= 0:
        nothing = math.nan if above.value == 0 else math.inf
        return Effect(nothing, math.inf, 1.0, above.documents, above.seeds, above.basis)
    value = above.value / below.value
    found = _sum([(1.0, top), (-value, bottom)])
    error = math.sqrt(found.variance) / below.value
    quantile = float(stats.t.ppf(0.5 + LEVEL / 2, found.df))
    if quantile * math.sqrt(below.variance) >= below.value:
        error = math.inf
    return Effect(value, error, found.df, found.documents, found.seeds, found.basis)


def per_seed(values: Sequence[float], basis: str = "seeds") -> Effect:
    """Mean of one number per seed, with a t interval; one seed has none."""
    count = len(values)
    mean = float(np.mean(values))
    if count < 2:
        return Effect(mean, math.inf, 1.0, 0, count, f"one seed, no {basis}")
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return Effect(mean, max(error, 1e-12), float(count - 1), 0, count, basis)


def seed_ratio(values: Sequence[float], margin: float) -> Effect:
    """Ratios of tokens, one per seed; 0 is never, infinite is before training.

    Finite ones have a t interval of their logarithms. Otherwise the value is the median and the
    interval goes from the smallest to the largest, which covers the median of all seeds with
    1 - 2 / 2^S: with fewer than six seeds that is no 95 % interval, and there is none. The p-value
    is that of the sign test against `margin`.
    """
    count = len(values)
    if count < 2:
        return Effect(values[0], math.inf, 1.0, 0, count, "one seed", (0.0, math.inf), 1.0)
    if all(0 < value < math.inf for value in values):
        logs = per_seed([math.log(value) for value in values])
        return Effect(
            math.exp(logs.value),
            logs.error,
            logs.df,
            0,
            count,
            "seeds",
            (math.exp(logs.low), math.exp(logs.high)),
            logs.p(math.log(margin)),
        )
    ordered = sorted(values)
    middle = ordered[count // 2] if count % 2 else ordered[count // 2 - 1]
    above = sum(value > margin for value in values)
    p = float(stats.binom.sf(above - 1, count, 0.5))
    if 1 - 2 / 2**count < LEVEL:
        return Effect(middle, math.inf, 1.0, 0, count, "too few seeds", (0.0, math.inf), p)
    return Effect(middle, 0.0, math.inf, 0, count, "seeds (range)", (ordered[0], ordered[-1]), p)


def exact(value: float, basis: str) -> Effect:
    """A number without sampling error, as bytes are."""
    return Effect(value, basis=basis, ends=(value, value))


def same_model(effect: Effect) -> Effect:
    """The difference of a model to itself: exactly nothing.

    What was measured between two trainings of it is the noise of the machine.
    """
    return replace(effect, value=0.0, error=0.0, ends=(0.0, 0.0), identical=True)
