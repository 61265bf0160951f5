"""Intervals for scores of one run: Wilson, bootstrap, paired and stratified. No I/O.

A *stratum* is the documents of one task. A family is a list of strata and its value is the mean of
the task means, so that a task with more documents does not weigh more; `shares` weigh the task
means against each other where they stand for families of different size. Within a task documents
may have weights (tokens, for perplexity). All bootstraps resample documents within their stratum
with a fixed seed and take percentiles, so the same call gives the same numbers. Runs of several
seeds are pooled in `seeds.py`; p-values are in `significance.py`.

References: Wilson, JASA 22 (1927); Efron and Tibshirani, An Introduction to the Bootstrap (1993),
chapter 13; Miller, arXiv 2411.00640 (paired differences between models).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.float64]
Documents = Mapping[int, float]
Transform = Callable[[Array], Array]
Values = Sequence[float] | Array

LEVEL = 0.95
RESAMPLES = 2000
SEED = 20260


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; `n` documents and `seeds` training seeds went into it.

    `seed_sd` is the standard deviation between seeds in the unit of the value, None for one seed.
    """

    value: float
    low: float
    high: float
    n: int
    seeds: int = 1
    seed_sd: float | None = None

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero (for differences)."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Difference(Estimate):
    """A paired difference with its two-sided p-value, as `test` has it, not adjusted."""

    p: float = 1.0
    test: str = ""


def wilson(
    successes: float, n: float, level: float = LEVEL, *, df: float | None = None
) -> tuple[float, float]:
    """Wilson score interval of a share; `n` need not be whole, it may be an effective size.

    With `df` the quantile is Student's instead of the normal one. Raises `ValueError` when the
    counts make no sense.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson: {successes} successes of {n} trials")
    upper = 0.5 + level / 2
    z = float(stats.norm.ppf(upper) if df is None else stats.t.ppf(upper, df))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # at 0 and n the bound is the share itself; rounding must not push it past
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return low, high


@functools.lru_cache(maxsize=64)
def _resample_weights(n: int, resamples: int, seed: int, stratum: int) -> Array:
    """(resamples, n) weights, rows sum to 1: how often each document is drawn, over n."""
    # the stratum is part of the seed: equal draws in two strata would correlate their means
    generator = np.random.default_rng([seed, stratum, n])
    counts = generator.multinomial(n, np.full(n, 1 / n), size=resamples)
    return counts / n


def resampled_counts(n: int, resamples: int = RESAMPLES, seed: int = SEED) -> Array:
    """(resamples, n) how often each of `n` documents is drawn, as whole numbers."""
    return np.rint(_resample_weights(n, resamples, seed, 0) * n)


def _resampled_means(
    values: Array, weights: Array | None, stratum: int, resamples: int, seed: int
) -> Array:
    """Means of `resamples` bootstrap samples of `values`."""
    n = len(values)
    products = values if weights is None else values * weights
    if n * resamples <= 2_000_000:
        draws = _resample_weights(n, resamples, seed, stratum)
        return draws @ products if weights is None else (draws @ products) / (draws @ weights)
    # too large to keep: draw in blocks, same distribution
    generator = np.random.default_rng([seed, stratum, n])
    block = max(1, 2_000_000 // n)
    means = []
    for start in range(0, resamples, block):
        drawn = generator.integers(0, n, size=(min(block, resamples - start), n))
        scale = n if weights is None else weights[drawn].sum(axis=1)
        means.append(products[drawn].sum(axis=1) / scale)
    return np.concatenate(means)


def _means(
    arrays: Sequence[Array],
    weights: Sequence[Array] | None,
    transform: Transform | None,
    resamples: int,
    seed: int,
    shares: Sequence[float] | None = None,
) -> tuple[Array, Array]:
    """The mean of stratum means, and its bootstrap samples, both transformed."""
    own: Sequence[Array | None] = weights if weights is not None else [None] * len(arrays)
    pairs = list(zip(arrays, own, strict=True))
    point = np.average(
        [np.average(array, weights=weight) for array, weight in pairs], weights=shares
    )
    samples: Array = np.average(
        [
            _resampled_means(array, weight, index, resamples, seed)
            for index, (array, weight) in enumerate(pairs)
        ],
        axis=0,
        weights=shares,
    )
    if transform is None:
        return np.asarray(point), samples
    return transform(np.asarray(point)), transform(samples)


def _percentiles(samples: Array, level: float) -> tuple[float, float]:
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _as_strata(strata: Sequence[Values]) -> list[Array]:
    arrays = [np.asarray(stratum, dtype=np.float64) for stratum in strata]
    if not arrays or any(array.size == 0 for array in arrays):
        raise ValueError("cannot estimate a mean from no documents")
    return arrays


def _is_binary(arrays: Sequence[Array]) -> bool:
    return all(bool(np.isin(array, (0.0, 1.0)).all()) for array in arrays)


def bootstrap_mean(
    strata: Sequence[Values],
    transform: Transform | None = None,
    weights: Sequence[Values] | None = None,
    *,
    shares: Sequence[float] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """Mean of stratum means with a percentile interval; `transform` is applied to the means."""
    arrays = _as_strata(strata)
    scales = None if weights is None else _as_strata(weights)
    point, samples = _means(arrays, scales, transform, resamples, seed, shares)
    low, high = _percentiles(samples, level)
    return Estimate(float(point), low, high, sum(array.size for array in arrays))


def mean_estimate(
    strata: Sequence[Values],
    transform: Transform | None = None,
    weights: Sequence[Values] | None = None,
    *,
    shares: Sequence[float] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """Mean with the interval that fits: Wilson for one task of 0/1 scores, else the bootstrap.

    When the 0/1 documents of each of several tasks agree, resampling cannot spread and the
    bootstrap would claim certainty; the Wilson interval of as many documents is used instead.
    """
    arrays = _as_strata(strata)
    total = sum(array.size for array in arrays)
    if transform is None and weights is None and _is_binary(arrays):
        unanimous = all(array.min() == array.max() for array in arrays)
        if len(arrays) == 1 or unanimous:
            value = float(np.average([array.mean() for array in arrays], weights=shares))
            low, high = wilson(value * total, total, level)
            return Estimate(value, low, high, total)
    return bootstrap_mean(
        strata, transform, weights, shares=shares, level=level, resamples=resamples, seed=seed
    )


def paired_difference(
    first: Sequence[Documents],
    second: Sequence[Documents],
    transform: Transform | None = None,
    weights: Sequence[Documents] | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Estimate:
    """`first` minus `second`, resampling documents that both answered; strata are in order.

    Raises `ValueError` when the two sides were not scored on the same documents.
    """
    if len(first) != len(second):
        raise ValueError(f"paired difference: {len(first)} tasks against {len(second)}")
    left: list[Array] = []
    right: list[Array] = []
    scales: list[Array] = []
    for index, (mine, theirs) in enumerate(zip(first, second, strict=True)):
        if mine.keys() != theirs.keys():
            odd = sorted(mine.keys() ^ theirs.keys())
            raise ValueError(
                f"paired difference: task {index} has {len(odd)} documents on one side only, "
                f"first: {odd[0]}"
            )
        order = sorted(mine)
        left.append(np.array([mine[key] for key in order], dtype=np.float64))
        right.append(np.array([theirs[key] for key in order], dtype=np.float64))
        if weights is not None:
            scales.append(np.array([weights[index][key] for key in order], dtype=np.float64))
    _as_strata([*left, *right])
    # equal seeds draw the same documents on both sides, which is what pairs them
    shared = scales if weights is not None else None
    point_a, samples_a = _means(left, shared, transform, resamples, seed)
    point_b, samples_b = _means(right, shared, transform, resamples, seed)
    low, high = _percentiles(samples_a - samples_b, level)
    return Estimate(float(point_a - point_b), low, high, sum(array.size for array in left))
