"""p-values and intervals against scipy, Holm's correction against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rad.reporting.significance import DRAWS, MCNEMAR, SIGN_FLIPS, holm, sign_flips
from rad.reporting.statistics import Array, bootstrap_mean, paired_difference, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (1, 29), (15, 148), (81, 263), (40, 40)])
@pytest.mark.parametrize("level", [0.9, 0.95])
def test_wilson_is_that_of_scipy(successes: int, n: int, level: float) -> None:
    theirs = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    assert wilson(successes, n, level) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_the_bootstrap_is_that_of_scipy() -> None:
    values = np.random.default_rng(3).exponential(size=150)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(4)
    )
    ours = bootstrap_mean([values])
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.015)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.015)


def pair(seed: int, n: int = 120) -> tuple[Array, Array]:
    """0/1 answers of two models to the same documents."""
    generator = np.random.default_rng(seed)
    hard = generator.random(n)
    noise = generator.normal(0, 0.1, (2, n))
    return (hard + noise[0] < 0.7).astype(float), (hard + noise[1] < 0.62).astype(float)


def test_one_task_of_zero_one_scores_is_mcnemars_exact_test() -> None:
    first, second = pair(1)
    wins = int(((first == 1) & (second == 0)).sum())
    losses = int(((first == 0) & (second == 1)).sum())
    assert min(wins, losses) > 0
    p, test = sign_flips([(first - second) / 120])
    assert test == MCNEMAR
    assert p == pytest.approx(stats.binomtest(wins, wins + losses).pvalue)


def test_equal_answers_are_no_evidence() -> None:
    assert sign_flips([np.zeros(10), np.zeros(4)]) == (1.0, MCNEMAR)


@pytest.mark.parametrize("kind", ["two tasks", "real values"])
def test_sign_flips_are_scipys_permutation_test(kind: str) -> None:
    first, second = pair(2)
    if kind == "two tasks":
        # of different size: documents of the smaller count for more
        parts = [(first - second)[:80] / 160, (first - second)[80:] / 80]
    else:
        parts = [(first - second + np.random.default_rng(5).normal(0.0, 0.3, 120)) / 120]
    p, test = sign_flips(parts)
    assert test == SIGN_FLIPS
    theirs = stats.permutation_test(
        (np.concatenate(parts),),
        lambda sample, axis: sample.sum(axis=axis),
        permutation_type="samples",
        n_resamples=DRAWS,
        vectorized=True,
        rng=np.random.default_rng(6),
    )
    assert 0.01 < theirs.pvalue < 0.9
    # both draw: three standard errors of the difference
    error = 3 * np.sqrt(2 * theirs.pvalue * (1 - theirs.pvalue) / DRAWS)
    assert p == pytest.approx(theirs.pvalue, abs=error)


def test_p_values_are_uniform_when_there_is_no_difference() -> None:
    generator = np.random.default_rng(8)
    found = [sign_flips([generator.normal(size=40)], draws=499)[0] for _ in range(400)]
    # three standard errors of 400 trials
    for level in (0.05, 0.5):
        share = float(np.mean([p <= level for p in found]))
        assert share == pytest.approx(level, abs=3 * np.sqrt(level * (1 - level) / 400))


def test_interval_and_p_value_agree_far_from_the_border() -> None:
    first, second = pair(4, 400)
    worse = np.where(np.arange(400) % 4 == 0, 0.0, second)
    sides = [[dict(enumerate(side.tolist()))] for side in (first, worse)]
    assert paired_difference(sides[0], sides[1]).excludes_zero
    assert sign_flips([(first - worse) / 400])[0] < 1e-6


def test_holm_by_hand() -> None:
    # sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2 = 0.06, and 0.04 x 1 may not fall below that
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_keeps_false_findings_rare() -> None:
    generator = np.random.default_rng(9)
    alone = adjusted = 0
    for _ in range(1000):
        values = generator.random(10).tolist()
        alone += min(values) < 0.05
        adjusted += min(holm(values)) < 0.05
    assert alone > 300
    assert adjusted / 1000 == pytest.approx(0.05, abs=0.02)
