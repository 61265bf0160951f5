"""Intervals against published values and against their own promises."""

from __future__ import annotations

import numpy as np
import pytest

from rad.reporting.statistics import (
    bootstrap_mean,
    mean_estimate,
    paired_difference,
    wilson,
)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [  # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_the_published_examples(
    successes: int, n: int, low: float, high: float
) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=6e-5)


def test_wilson_is_symmetric_and_stays_inside() -> None:
    low, high = wilson(20, 20)
    assert high == 1.0
    assert low == pytest.approx(1 - wilson(0, 20)[1])
    for successes, n in ((1, 0), (5, 4), (-1, 4)):
        with pytest.raises(ValueError, match="wilson"):
            wilson(successes, n)


def test_bootstrap_covers_the_true_mean_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    hits = 0
    for _ in range(300):
        estimate = bootstrap_mean([generator.normal(2.0, 1.0, 60)], resamples=500)
        hits += estimate.low <= 2.0 <= estimate.high
    # the percentile bootstrap is a little short at n = 60; 3 standard errors of 300 trials
    assert 0.90 <= hits / 300 <= 0.985


def test_bootstrap_repeats_and_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).random(400)
    first, second = bootstrap_mean([values]), bootstrap_mean([values])
    assert first == second
    half = 1.96 * values.std() / np.sqrt(400)
    assert first.value == pytest.approx(values.mean())
    assert (first.high - first.low) / 2 == pytest.approx(half, rel=0.1)
    assert first.n == 400


def test_large_strata_are_resampled_in_blocks_with_the_same_spread() -> None:
    values = np.random.default_rng(2).random(30_000)
    estimate = bootstrap_mean([values], resamples=200)
    assert estimate.high - estimate.low == pytest.approx(
        2 * 1.96 * values.std() / np.sqrt(30_000), rel=0.25
    )


def test_strata_count_equally_and_are_drawn_independently() -> None:
    generator = np.random.default_rng(3)
    small, large = generator.random(50), generator.random(500)
    estimate = bootstrap_mean([small, large])
    assert estimate.value == pytest.approx((small.mean() + large.mean()) / 2)
    twins = bootstrap_mean([small, small])
    single = bootstrap_mean([small])
    # two independent strata: the spread shrinks by the root of two; shared draws would keep it
    ratio = (twins.high - twins.low) / (single.high - single.low)
    assert ratio == pytest.approx(1 / np.sqrt(2), rel=0.1)


def test_mean_estimate_picks_wilson_for_zero_one_scores() -> None:
    scores = [1.0] * 15 + [0.0] * 133
    estimate = mean_estimate([scores])
    assert (estimate.low, estimate.high) == wilson(15, 148)
    # one score between: not a share of successes any more
    assert mean_estimate([[0.5, *scores]]) == bootstrap_mean([[0.5, *scores]])
    # all right in every task: resampling alone would say [1, 1]
    perfect = mean_estimate([[1.0] * 10, [1.0] * 30])
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert perfect.low == pytest.approx(wilson(40, 40)[0])


def test_transform_is_applied_to_means_not_to_documents() -> None:
    values = np.random.default_rng(4).random(80)
    plain, exponential = bootstrap_mean([values]), bootstrap_mean([values], np.exp)
    assert exponential.value == pytest.approx(np.exp(plain.value))
    assert exponential.low == pytest.approx(np.exp(plain.low))


def test_weights_count_documents_by_their_tokens() -> None:
    values, tokens = [1.0, 3.0], [3.0, 1.0]
    estimate = bootstrap_mean([values], weights=[tokens])
    assert estimate.value == pytest.approx(1.5)
    assert (estimate.low, estimate.high) == (1.0, 3.0)
    even = bootstrap_mean([values * 20], weights=[[2.0] * 40])
    plain = bootstrap_mean([values * 20])
    assert (even.value, even.low, even.high) == pytest.approx((plain.value, plain.low, plain.high))
    paired = paired_difference(
        [dict(enumerate(values))], [{0: 0.0, 1: 0.0}], weights=[dict(enumerate(tokens))]
    )
    assert paired.value == pytest.approx(1.5)


def test_paired_difference_of_a_constant_shift_is_exact() -> None:
    values = np.random.default_rng(5).random(60)
    first = [{index: value + 0.25 for index, value in enumerate(values)}]
    second = [dict(enumerate(values))]
    estimate = paired_difference(first, second)
    assert [estimate.value, estimate.low, estimate.high] == pytest.approx([0.25] * 3)
    assert estimate.excludes_zero
    opposite = paired_difference(second, first)
    assert opposite.value == pytest.approx(-0.25)


def test_pairing_is_sharper_than_two_separate_intervals() -> None:
    generator = np.random.default_rng(6)
    hard = generator.random(200)
    first = [{i: float(h + generator.normal(0, 0.05) < 0.7) for i, h in enumerate(hard)}]
    second = [{i: float(h + generator.normal(0, 0.05) < 0.6) for i, h in enumerate(hard)}]
    paired = paired_difference(first, second)
    alone = mean_estimate([list(first[0].values())])
    assert paired.high - paired.low < alone.high - alone.low
    assert paired.value == pytest.approx(
        np.mean(list(first[0].values())) - np.mean(list(second[0].values()))
    )


def test_document_order_does_not_matter() -> None:
    first = {3: 1.0, 1: 0.0, 2: 1.0}
    second = {1: 0.0, 2: 0.0, 3: 1.0}
    assert paired_difference([first], [second]) == paired_difference(
        [dict(sorted(first.items()))], [second]
    )


def test_paired_difference_refuses_other_documents() -> None:
    with pytest.raises(ValueError, match="documents on one side only, first: 2"):
        paired_difference([{1: 1.0, 2: 0.0}], [{1: 1.0}])
    with pytest.raises(ValueError, match="1 tasks against 2"):
        paired_difference([{1: 1.0}], [{1: 1.0}, {1: 1.0}])


def test_no_documents_is_an_error() -> None:
    for strata in ([], [[]]):
        with pytest.raises(ValueError, match="no documents"):
            mean_estimate(strata)


def test_shares_weigh_task_means() -> None:
    strata = [[1.0, 0.0, 1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]
    weighed = mean_estimate(strata, shares=[1.0, 0.5, 0.5])
    assert weighed.value == pytest.approx((0.75 + (0.0 + 0.5) / 2) / 2)
    assert weighed.low < weighed.value < weighed.high
    # a share of zero leaves a task out of the value and of the interval
    alone = mean_estimate(strata, shares=[1.0, 0.0, 0.0])
    assert (alone.value, alone.low, alone.high) == pytest.approx((0.75, 0.25, 1.0))
    assert mean_estimate(strata, shares=[2.0, 2.0, 2.0]) == mean_estimate(strata)
