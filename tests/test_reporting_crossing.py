"""When a curve first has a value: crossings, what is no crossing, and the three intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rad.reporting.crossing import (
    NEVER,
    START,
    Curve,
    Reached,
    bracket,
    mean_curve,
    position,
    ratio,
    reached,
)


def curve(*values: float, tokens: tuple[float, ...] = (0, 100, 200, 300)) -> Curve:
    return Curve(np.array(tokens[: len(values)], dtype=float), np.array(values))


def test_the_logarithm_is_interpolated() -> None:
    # exp(-t / 100) is a straight line in its logarithm: the crossing is exact
    falling = curve(*np.exp(-np.arange(4.0)))
    assert position(falling, math.exp(-1.25), falling=True, log=True) == pytest.approx(125)
    assert position(falling, math.exp(-1.25), falling=True) > 125.5
    assert bracket(falling, math.exp(-1.25), falling=True) == (100, 200)


def test_scores_are_interpolated_linearly_and_the_first_crossing_counts() -> None:
    wavy = curve(0.0, 0.5, 0.2, 0.9)
    assert position(wavy, 0.4) == pytest.approx(80)
    assert position(wavy, 0.5) == 100
    assert position(wavy, 0.6) == pytest.approx(200 + 100 * 0.4 / 0.7)


def test_nothing_is_extrapolated() -> None:
    rising = curve(0.2, 0.4, 0.6)
    assert position(rising, 0.61) == NEVER
    assert position(rising, 0.2) == START
    later = curve(0.2, 0.4, tokens=(50, 100))
    assert position(later, 0.1) == START  # not 25, and not 50 either
    assert bracket(later, 0.1) == (START, START)
    assert bracket(rising, 0.61) == (NEVER, NEVER)
    assert position(curve(0.3), 0.2) == START
    assert position(curve(0.3), 0.4) == NEVER


def test_a_kl_of_zero_has_no_logarithm() -> None:
    assert position(curve(1.0, 0.0), 0.0, falling=True, log=True) == 100
    assert position(curve(1.0, 0.0), 0.5, falling=True, log=True) == 50


def test_ratios_of_what_is_no_number() -> None:
    assert ratio(300, 150) == 2
    assert ratio(300, NEVER) == 0
    assert ratio(300, START) == math.inf
    assert ratio(START, START) == 1


def test_one_seed_gives_the_logged_points_around() -> None:
    found = reached(
        [curve(4.0, 1.0, 0.25, 0.2)], [curve(4.0, 2.0, 1.0, 0.5)], falling=True, log=True
    )
    assert found is not None
    assert found.interval == "points"
    assert found.target == 0.5
    assert (found.tokens.value, found.tokens.low, found.tokens.high) == (150, 100, 200)
    assert found.baseline == 300
    assert found.ratio is not None
    # uniform gets there somewhere in (200, 300], the other in (100, 200]
    assert (found.ratio.value, found.ratio.low, found.ratio.high) == (2, 1, 3)


def test_without_a_number_of_tokens_there_is_no_ratio() -> None:
    baseline = curve(4.0, 2.0, 1.0)
    for own, at in ((curve(0.5, 0.4, 0.3), START), (curve(5.0, 4.0, 3.0), NEVER)):
        found = reached([own], [baseline], falling=True, log=True)
        assert found is not None
        assert found.tokens.value == at
        assert found.ratio is None
        assert not found.counts
    flat = reached([curve(0.0, 0.5)], [curve(0.5, 0.4, 0.5)])
    assert flat is not None
    assert flat.baseline == START
    assert flat.ratio is None
    assert reached([], [baseline]) is None


def seeds_of(own: list[Curve], baseline: list[Curve]) -> Reached:
    found = reached(own, baseline, list(zip(own, baseline, strict=True)))
    assert found is not None
    return found


def test_several_seeds_give_their_range() -> None:
    baseline = [curve(0.0, 0.1, 0.2, 0.3), curve(0.0, 0.1, 0.2, 0.5)]
    found = seeds_of([curve(0.0, 0.3, 0.6, 0.9), curve(0.0, 0.25, 0.5, 0.75)], baseline)
    assert found.interval == "seeds"
    assert found.target == pytest.approx(0.4)
    # seed by seed: 0.3 at 100, and 0.5 at 200
    assert (found.tokens.low, found.tokens.high) == pytest.approx((100, 200))
    assert found.tokens.value == pytest.approx(100 + 100 * (0.4 - 0.275) / 0.275)
    assert found.ratio is not None
    assert (found.ratio.low, found.ratio.high) == pytest.approx((1.5, 3))
    missed = seeds_of([curve(0.0, 0.3, 0.6, 0.9), curve(0.0, 0.1, 0.2, 0.3)], baseline)
    assert missed.tokens.high == NEVER
    assert missed.ratio is not None
    assert missed.ratio.low == 0


def test_means_of_seeds_use_shared_points_only() -> None:
    mean = mean_curve([curve(0.0, 1.0, 2.0), curve(2.0, 4.0, tokens=(0, 200))])
    assert mean.tokens.tolist() == [0, 200]
    assert mean.values.tolist() == [1.0, 3.0]


def answered(thresholds: np.ndarray, skills: tuple[float, ...]) -> Curve:
    """A curve whose document d is right where the skill at a point exceeds its threshold."""
    documents = (np.array(skills)[:, None] > thresholds).astype(float)
    return Curve(np.arange(len(skills)) * 100.0, documents.mean(axis=1), documents)


def test_documents_are_resampled_for_both_curves_alike() -> None:
    thresholds = np.random.default_rng(5).random(40)
    skills = (0.0, 0.3, 0.5, 0.7, 0.85)
    own = answered(thresholds, skills)
    same = reached([own], [own])
    assert same is not None
    assert same.interval == "documents"
    # the same answers to the same documents: no resample can tell them apart
    assert same.ratio is not None
    assert (same.ratio.low, same.ratio.high) == (1, 1)
    slower = answered(thresholds, (0.0, 0.1, 0.2, 0.3, 0.42))
    found = reached([own], [slower])
    assert found is not None
    # between the skills 0.3 and 0.5 whichever documents are drawn; uniform only at its end
    assert 100 < found.tokens.low < found.tokens.value < found.tokens.high <= 200
    assert found.ratio is not None
    assert found.ratio.value == pytest.approx(400 / found.tokens.value)
    assert 2 <= found.ratio.low < found.ratio.value < found.ratio.high < 4
    assert reached([own], [slower]) == found


def test_few_documents_say_little() -> None:
    generator = np.random.default_rng(3)
    widths = []
    for size in (24, 2400):
        # answers of their own at every point, as a curve of few documents looks
        mine, other = (
            (generator.random((5, size)) < np.array(levels)[:, None]).astype(float)
            for levels in ((0.05, 0.3, 0.5, 0.7, 0.8), (0.05, 0.15, 0.25, 0.35, 0.45))
        )
        tokens = np.arange(5) * 100.0
        found = reached(
            [Curve(tokens, mine.mean(axis=1), mine)], [Curve(tokens, other.mean(axis=1), other)]
        )
        assert found is not None
        widths.append(found.tokens.high - found.tokens.low)
    assert widths[0] > 4 * widths[1] > 0
