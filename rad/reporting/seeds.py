"""Pooling runs of several training seeds: intervals of documents *and* seeds.

Every seed's student answers the same documents, so scores are a seeds x documents table and both
are a sample: another test set has other documents, another training run another seed. The value is
the mean over seeds. Its variance is that of a crossed random-effects design,

    var(seeds) / S + var(documents) / D - interaction,

where the first term is taken from the seeds' values, the second from the documents' means over
seeds, and the interaction, which both contain, is taken off once (never more than the first term).
Degrees of freedom are Satterthwaite's, so that few seeds widen the interval. Shares get a Wilson
interval with the number of documents that would have this variance, which stays within 0 and 1.

References: Searle, Casella and McCulloch, Variance Components (1992), chapter 4; Satterthwaite,
Biometrics Bulletin 2 (1946); Korn and Graubard, Survey Methodology 24 (1998); Bouthillier et al.,
arXiv 2103.03098 (why seeds belong into the interval).

Legend: S seeds, D documents of a task.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from rad.reporting.significance import sign_flips
from rad.reporting.statistics import (
    LEVEL,
    Array,
    Difference,
    Estimate,
    mean_estimate,
    paired_difference,
    wilson,
)

Run = Sequence[Array]  # scores of one seed: an array of documents per task
NOTHING = 1e-16  # a variance that is rounding: one document of a million has more
STUDENT = "t over seeds and documents"


def contributions(
    run: Run, weights: Run | None = None, shares: Sequence[float] | None = None
) -> tuple[float, list[Array]]:
    """The mean of task means, and what each document adds to it beyond its task's mean."""
    share = np.ones(len(run)) if shares is None else np.asarray(shares, dtype=np.float64)
    means, parts = [], []
    for index, scores in enumerate(run):
        own = np.ones(len(scores)) if weights is None else weights[index]
        means.append(float(np.average(scores, weights=None if weights is None else own)))
        parts.append(share[index] / share.sum() * own / own.sum() * (scores - means[-1]))
    return float(np.average(means, weights=share)), parts


@dataclass(frozen=True)
class Spread:
    """Variances of a mean over seeds, and the degrees of freedom of their sum."""

    seeds: float
    documents: float
    interaction: float
    count: int  # of seeds
    size: int  # of documents

    @property
    def variance(self) -> float:
        """Of the mean, over seeds and documents."""
        return self.documents + max(0.0, self.seeds - self.interaction)

    @property
    def df(self) -> float:
        """Satterthwaite's degrees of freedom, at least those of the seeds."""
        parts = self.seeds**2 / (self.count - 1) + self.documents**2 / max(1, self.size - 1)
        return max(self.count - 1, self.variance**2 / parts) if parts else float(self.count - 1)


def spread(values: Sequence[float], parts: Sequence[Sequence[Array]]) -> Spread:
    """Variances from the seeds' `values` and from what documents add, by seed and task."""
    documents = interaction = 0.0
    seeds = len(values)
    for index in range(len(parts[0])):
        table = np.stack([own[index] for own in parts])  # (S, D)
        size = table.shape[1]
        unbiased = size / max(1, size - 1)
        mean = table.mean(axis=0)  # (D,)
        documents += unbiased * float((mean**2).sum())
        if seeds > 1:
            interaction += unbiased * float(((table - mean) ** 2).sum()) / ((seeds - 1) * seeds)
    between = float(np.var(values, ddof=1)) / seeds if seeds > 1 else 0.0
    total = sum(len(own) for own in parts[0])
    return Spread(between, documents, interaction, seeds, total)


def _exp(values: Array) -> Array:
    return np.exp(values)


def _mean_run(runs: Sequence[Run]) -> list[Array]:
    """Each document's mean over seeds."""
    return [np.mean([run[index] for run in runs], axis=0) for index in range(len(runs[0]))]


def pooled_estimate(
    runs: Sequence[Run],
    *,
    weights: Run | None = None,
    shares: Sequence[float] | None = None,
    exponential: bool = False,
    level: float = LEVEL,
) -> Estimate:
    """Mean over seeds of the mean of task means; `exponential` for perplexities.

    One run has an interval over documents only: Wilson or the bootstrap.
    """
    total = sum(len(scores) for scores in runs[0])
    if len(runs) == 1:
        transform = _exp if exponential else None
        return mean_estimate(runs[0], transform, weights, shares=shares, level=level)
    found = [contributions(run, weights, shares) for run in runs]
    values = np.array([value for value, _ in found])
    own = spread(values.tolist(), [parts for _, parts in found])
    value, variance = float(values.mean()), own.variance
    sd = float(np.std(np.exp(values) if exponential else values, ddof=1))
    inside = all(
        bool((scores >= 0).all() and (scores <= 1).all()) for run in runs for scores in run
    )
    if inside and not exponential and weights is None:
        # a share beyond doubt would have no variance at all: as many documents as there are
        certain = variance < NOTHING or not 0 < value < 1
        size = float(total) if certain else value * (1 - value) / variance
        df = None if certain else own.df
        low, high = wilson(value * size, size, level, df=df)
        return Estimate(value, low, high, total, len(runs), sd)
    half = float(stats.t.ppf(0.5 + level / 2, own.df)) * math.sqrt(variance)
    if exponential:
        low, high = math.exp(value - half), math.exp(value + half)
        return Estimate(math.exp(value), low, high, total, len(runs), sd)
    return Estimate(value, value - half, value + half, total, len(runs), sd)


def pooled_difference(
    first: Sequence[Run],
    second: Sequence[Run],
    *,
    weights: Run | None = None,
    exponential: bool = False,
    matched: bool = True,
    level: float = LEVEL,
) -> Difference:
    """`first` minus `second` on the same documents, with interval and p-value.

    Two single runs: paired bootstrap, and the sign-flip test (McNemar's where it applies). With
    several seeds: the crossed design above; `matched` says that seed i of both sides belongs
    together. A side with one run adds no variance of seeds, as there is nothing to take it from.
    """
    if len(first) == len(second) == 1:
        return _single_difference(first[0], second[0], weights, exponential, level)
    sides = []
    for runs in (first, second):
        found = [contributions(run, weights) for run in runs]
        values = np.array([value for value, _ in found])
        # in the unit that is shown, to first order
        slope = math.exp(float(values.mean())) if exponential else 1.0
        parts = [[slope * part for part in own] for _, own in found]
        sides.append((np.exp(values) if exponential else values, parts, slope))
    (left, left_parts, left_slope), (right, right_parts, right_slope) = sides
    if exponential:
        value = left_slope - right_slope
    else:
        value = float(left.mean() - right.mean())
    count = min(len(part) for part in (first, second) if len(part) > 1)
    if matched and len(first) == len(second):
        gaps = [
            [a - b for a, b in zip(mine, theirs, strict=True)]
            for mine, theirs in zip(left_parts, right_parts, strict=True)
        ]
        own = spread((left - right).tolist(), gaps)
        sd: float | None = float(np.std(left - right, ddof=1))
    else:
        each = [spread(values.tolist(), parts) for values, parts, _ in sides]
        mean = [a - b for a, b in zip(_mean_run(left_parts), _mean_run(right_parts), strict=True)]
        documents = spread([0.0], [mean]).documents
        seeds = sum(part.seeds for part in each)
        own = Spread(seeds, documents, sum(part.interaction for part in each), count, each[0].size)
        sd = None
    if own.variance < NOTHING:
        # the same on every document and in every seed: only the number of documents says anything
        alike = _mean_run(first), _mean_run(second)
        plain = _single_difference(*alike, weights, exponential, level)
        return replace(plain, seeds=count, seed_sd=sd)
    scale = math.sqrt(own.variance)
    half = float(stats.t.ppf(0.5 + level / 2, own.df)) * scale
    p = float(2 * stats.t.sf(abs(value) / scale, own.df))
    return Difference(value, value - half, value + half, own.size, count, sd, p, STUDENT)


def _single_difference(
    first: Run, second: Run, weights: Run | None, exponential: bool, level: float
) -> Difference:
    """Of two single runs: paired bootstrap over documents and the sign-flip test."""

    def documents(run: Run) -> list[dict[int, float]]:
        return [dict(enumerate(scores.tolist())) for scores in run]

    found = paired_difference(
        documents(first),
        documents(second),
        _exp if exponential else None,
        None if weights is None else documents(weights),
        level=level,
    )
    gaps = []
    for index, (mine, theirs) in enumerate(zip(first, second, strict=True)):
        own = np.ones(len(mine)) if weights is None else weights[index]
        gaps.append((mine - theirs) * own / own.sum())
    p, test = sign_flips(gaps)
    return Difference(found.value, found.low, found.high, found.n, 1, None, p, test)
