"""p-values of paired differences between two runs, and their correction for many comparisons.

The null hypothesis of a paired difference is that the two models may be exchanged on every
document, so each document's difference may as well have the other sign. With 0/1 scores that count
equally this is McNemar's exact test on the discordant documents; otherwise the signs are drawn.

References: McNemar, Psychometrika 12 (1947); Good, Permutation, Parametric and Bootstrap Tests
(2005), chapter 3; Holm, Scandinavian Journal of Statistics 6 (1979).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

from rad.reporting.statistics import SEED, Array

DRAWS = 9999
LEVELS = 64  # more different sizes than this are drawn document by document
MCNEMAR = "McNemar exact"
SIGN_FLIPS = "sign flips"


def sign_flips(
    contributions: Sequence[Array], *, draws: int = DRAWS, seed: int = SEED
) -> tuple[float, str]:
    """Two-sided p-value of a sum of paired differences being zero, and the name of the test.

    `contributions` has, per task, what each document adds to the difference. Exact where all that
    are not zero have the same size, else from `draws` random signs (then p is at least
    1 / (draws + 1)).
    """
    values = np.concatenate([np.asarray(each, dtype=np.float64) for each in contributions])
    # sums of products differ in the last digits where they should be equal
    sizes, inverse = np.unique(np.round(np.abs(values), 12), return_inverse=True)
    counts = np.bincount(inverse)
    if sizes[0] == 0:
        sizes, counts = sizes[1:], counts[1:]
    if not len(sizes):
        return 1.0, MCNEMAR
    if len(sizes) == 1:
        wins = int((values > 0).sum())
        return float(stats.binomtest(wins, int(counts[0])).pvalue), MCNEMAR
    generator = np.random.default_rng([seed, len(values)])
    if len(sizes) <= LEVELS:
        wins_drawn = generator.binomial(counts, 0.5, size=(draws, len(counts)))
        drawn = (2 * wins_drawn - counts) @ sizes
    else:
        moving = values[values != 0]
        block = max(1, 4_000_000 // len(moving))
        parts = []
        for start in range(0, draws, block):
            signs = generator.integers(0, 2, size=(min(block, draws - start), len(moving)))
            parts.append((2 * signs - 1) @ moving)
        drawn = np.concatenate(parts)
    observed = abs(float(values.sum()))
    extreme = int((np.abs(drawn) >= observed - 1e-9 * float(sizes.max())).sum())
    return (1 + extreme) / (1 + draws), SIGN_FLIPS


def holm(values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p-values that keep the chance of any false finding."""
    order = np.argsort(values, kind="stable")
    adjusted = np.empty(len(values))
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        adjusted[index] = highest
    return [float(value) for value in adjusted]
