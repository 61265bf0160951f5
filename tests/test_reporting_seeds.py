"""Pooling training seeds: coverage by simulation, and cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rad.reporting.seeds import STUDENT, pooled_difference, pooled_estimate
from rad.reporting.statistics import Array, mean_estimate

DOCUMENTS, TRIALS = 200, 500


def logistic(values: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-values)))


def answers(generator: np.random.Generator, seeds: int, spread: float, hard: Array) -> Array:
    """(seeds, documents) 0/1 answers: some documents are harder, some seeds came out better."""
    luck = generator.normal(0, spread, (seeds, 1))
    noise = generator.normal(0, 0.6, (seeds, len(hard)))
    return (generator.random(noise.shape) < logistic(0.5 + luck + hard + noise)).astype(float)


def truth(spread: float) -> float:
    """Expected score over documents and seeds."""
    generator = np.random.default_rng(0)
    parts = [generator.normal(0, scale, 400_000) for scale in (spread, 1.5, 0.6)]
    return float(logistic(0.5 + sum(parts)).mean())


# twenty to thirty points of coverage are missing where the interval knows documents only
@pytest.mark.parametrize(
    ("seeds", "spread", "documents_only"),
    [(3, 0.0, (0.91, 0.99)), (3, 0.4, (0.55, 0.8)), (5, 0.4, (0.6, 0.85))],
)
def test_coverage_is_near_nominal_where_documents_alone_undercover(
    seeds: int, spread: float, documents_only: tuple[float, float]
) -> None:
    generator = np.random.default_rng([seeds, round(10 * spread)])
    expected, pooled, alone = truth(spread), 0, 0
    for _ in range(TRIALS):
        table = answers(generator, seeds, spread, generator.normal(0, 1.5, DOCUMENTS))
        ours = pooled_estimate([[row] for row in table])
        pooled += ours.low <= expected <= ours.high
        plain = mean_estimate([table.mean(axis=0)], resamples=200)
        alone += plain.low <= expected <= plain.high
    assert documents_only[0] < alone / TRIALS < documents_only[1]
    assert 0.91 < pooled / TRIALS < 0.99


def test_false_findings_between_equal_methods_are_rare() -> None:
    generator = np.random.default_rng(11)
    found = covered = 0
    for _ in range(TRIALS):
        hard = generator.normal(0, 1.5, DOCUMENTS)
        sides = [answers(generator, 3, 0.4, hard) for _ in range(2)]
        gap = pooled_difference([[row] for row in sides[0]], [[row] for row in sides[1]])
        found += gap.p < 0.05
        covered += gap.low <= 0 <= gap.high
        assert (gap.p < 0.05) == (not gap.low <= 0 <= gap.high)
    assert 0.02 < found / TRIALS < 0.09
    assert found + covered == TRIALS


def test_seeds_without_document_noise_are_a_t_interval() -> None:
    # every document of a seed has the same loss: only seeds vary
    values = [1.0, 1.2, 1.7]
    ours = pooled_estimate([[np.full(50, value)] for value in values])
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / np.sqrt(3)
    assert [ours.value, ours.low, ours.high] == pytest.approx([1.3, 1.3 - half, 1.3 + half])
    assert ours.seed_sd == pytest.approx(np.std(values, ddof=1))
    assert (ours.seeds, ours.n) == (3, 50)


def test_equal_seeds_are_an_interval_of_documents() -> None:
    row = (np.random.default_rng(1).random(300) < 0.4).astype(float)
    ours, alone = pooled_estimate([[row], [row]]), pooled_estimate([[row]])
    assert ours.value == pytest.approx(alone.value)
    assert ours.seed_sd == 0
    assert (alone.seeds, alone.seed_sd) == (1, None)
    assert (ours.low, ours.high) == pytest.approx((alone.low, alone.high), abs=2e-3)


def test_all_right_is_not_beyond_doubt() -> None:
    ours = pooled_estimate([[np.ones(30), np.ones(10)]] * 3)
    assert (ours.value, ours.high) == (1.0, 1.0)
    assert 0.9 < ours.low < 0.92  # Wilson of 40
    gap = pooled_difference([[np.ones(40)]] * 2, [[np.zeros(40)]] * 2)
    assert gap.value == 1.0
    assert gap.p < 1e-9


def test_tasks_and_families_weigh_as_they_should() -> None:
    generator = np.random.default_rng(2)
    runs = [[generator.random(20), generator.random(400)] for _ in range(3)]
    mean = np.mean([[part.mean() for part in run] for run in runs], axis=0)
    assert pooled_estimate(runs).value == pytest.approx(mean.mean())
    weighed = pooled_estimate(runs, shares=[3.0, 1.0])
    assert weighed.value == pytest.approx((3 * mean[0] + mean[1]) / 4)
    assert weighed.high - weighed.low > pooled_estimate(runs).high - pooled_estimate(runs).low


def test_perplexities_are_pooled_as_losses() -> None:
    generator = np.random.default_rng(3)
    losses = [[2.0 + 0.1 * seed + generator.random(60)] for seed in range(3)]
    tokens = [generator.integers(10, 100, 60).astype(float)]
    ours = pooled_estimate(losses, weights=tokens, exponential=True)
    means = [float(np.average(run[0], weights=tokens[0])) for run in losses]
    assert ours.value == pytest.approx(np.exp(np.mean(means)))
    assert ours.seed_sd == pytest.approx(np.std(np.exp(means), ddof=1))
    assert ours.low < ours.value < ours.high
    shifted = [[run[0] - 0.5] for run in losses]
    gap = pooled_difference(shifted, losses, weights=tokens, exponential=True)
    assert gap.value == pytest.approx(np.exp(np.mean(means) - 0.5) - np.exp(np.mean(means)))
    assert gap.test == STUDENT
    assert gap.p < 0.05


def test_matched_seeds_are_compared_seed_by_seed() -> None:
    generator = np.random.default_rng(4)
    hard = generator.normal(0, 1.5, 400)
    table = answers(generator, 4, 1.0, hard)
    better = np.maximum(table, (generator.random(table.shape) < 0.1).astype(float))
    runs, others = [[row] for row in better], [[row] for row in table]
    matched = pooled_difference(runs, others)
    apart = pooled_difference(runs, others, matched=False)
    assert matched.value == pytest.approx(apart.value)
    # the luck of a seed is in both sides and falls out
    assert matched.high - matched.low < 0.5 * (apart.high - apart.low)
    assert matched.p < apart.p
    assert (matched.seeds, apart.seed_sd) == (4, None)


def test_one_run_against_several() -> None:
    generator = np.random.default_rng(5)
    hard = generator.normal(0, 1.5, 300)
    several, single = answers(generator, 3, 0.3, hard), answers(generator, 1, 0.3, hard)
    gap = pooled_difference([[row] for row in several], [[single[0]]], matched=False)
    assert gap.value == pytest.approx(several.mean() - single.mean())
    assert gap.low < gap.value < gap.high
    assert gap.seeds == 3


def test_two_single_runs_are_bootstrapped() -> None:
    generator = np.random.default_rng(6)
    first, second = (generator.random((2, 100)) < 0.5).astype(float)
    gap = pooled_difference([[first]], [[second]])
    assert (gap.seeds, gap.seed_sd, gap.test) == (1, None, "McNemar exact")
    assert gap.low <= gap.value <= gap.high
