"""Intervals over seeds and documents: against known truth, and by properties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rad.papers.contrast import Arm, Effect, exact, linear, per_seed, ratio, same_model, seed_ratio
from rad.papers.ledger import INCONCLUSIVE, NOT_SUPPORTED, SUPPORTED, overall, verdict
from rad.reporting.seeds import pooled_difference
from rad.reporting.statistics import wilson


def answers(
    generator: np.random.Generator, mean: float, seeds: int, sd: float, difficulty: np.ndarray
) -> Arm:
    """A crossed design: documents are hard or easy for all, seeds good or bad at all."""
    runs = []
    for _ in range(seeds):
        level = mean + generator.normal(0, sd)
        noise = generator.normal(0, 0.15, len(difficulty))
        runs.append([np.clip(level + difficulty + noise, -1, 2)])
    return Arm(tuple(runs), tuple(range(seeds)))


def test_intervals_cover_a_known_difference() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    trials = 300
    for _ in range(trials):
        difficulty = generator.normal(0, 0.2, 60)
        first = answers(generator, 0.55, 5, 0.03, difficulty)
        second = answers(generator, 0.50, 5, 0.03, difficulty)
        effect = linear([(1.0, first), (-1.0, second)])
        covered += effect.low <= 0.05 <= effect.high
    # 95 % within three standard errors of 300 trials
    assert 0.91 <= covered / trials <= 0.99


def test_intervals_cover_a_known_ratio() -> None:
    generator = np.random.default_rng(6)
    covered = 0
    trials = 300
    for _ in range(trials):
        difficulty = generator.normal(0, 0.2, 80)
        first = answers(generator, 0.45, 5, 0.02, difficulty)
        second = Arm(answers(generator, 0.5, 1, 0.0, difficulty).runs, None)
        effect = ratio(first, second)
        covered += effect.low <= 0.9 <= effect.high
    assert 0.91 <= covered / trials <= 0.99


def arm(values: list[list[float]], seeds: tuple[int, ...] | None = None) -> Arm:
    runs = tuple([np.array(run)] for run in values)
    return Arm(runs, tuple(range(len(values))) if seeds is None else seeds)


scores = st.lists(
    st.lists(st.sampled_from([0.0, 1.0]), min_size=12, max_size=12), min_size=3, max_size=3
)


@settings(max_examples=60, deadline=None)
@given(first=scores, second=scores, margin=st.sampled_from([0.0, 0.05, -0.05]))
def test_swapping_the_arms_turns_the_effect(
    first: list[list[float]], second: list[list[float]], margin: float
) -> None:
    there = linear([(1.0, arm(first)), (-1.0, arm(second))])
    back = linear([(1.0, arm(second)), (-1.0, arm(first))])
    assert back.value == pytest.approx(-there.value, abs=1e-12)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=1e-9)
    if verdict(there, margin) == SUPPORTED:
        # beyond a margin in one direction is not beyond its opposite in the other
        assert verdict(back, -margin) == NOT_SUPPORTED
    if verdict(there, 0.0) == INCONCLUSIVE:
        assert verdict(back, 0.0) == INCONCLUSIVE


@settings(max_examples=40, deadline=None)
@given(first=scores, second=scores, order=st.permutations(range(3)))
def test_the_order_of_seeds_does_not_matter(
    first: list[list[float]], second: list[list[float]], order: list[int]
) -> None:
    plain = linear([(1.0, arm(first)), (-1.0, arm(second))])
    shuffled = arm([second[index] for index in order], tuple(order))
    again = linear([(1.0, arm(first)), (-1.0, shuffled)])
    assert (again.low, again.high) == pytest.approx((plain.low, plain.high), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(first=scores, second=scores)
def test_a_difference_is_that_of_the_report(
    first: list[list[float]], second: list[list[float]]
) -> None:
    effect = linear([(1.0, arm(first)), (-1.0, arm(second))])
    theirs = pooled_difference(arm(first).runs, arm(second).runs)
    assert effect.value == pytest.approx(theirs.value, abs=1e-12)
    if effect.error > 1.001 * wilson(0, 12)[1] / 1.96:  # what few that differ are widened to
        assert (effect.low, effect.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


def test_agreement_on_every_document_is_no_certainty() -> None:
    first, second = arm([[1.0] * 40] * 3), arm([[1.0] * 40] * 3)
    effect = linear([(1.0, first), (-1.0, second)])
    assert effect.value == 0 and effect.low < 0 < effect.high
    assert effect.error == pytest.approx(wilson(0, 40)[1] / 1.96, rel=1e-4)
    assert verdict(effect, 0.0) == INCONCLUSIVE
    # nor is a small loss excluded by forty documents
    assert verdict(effect, -0.05) == INCONCLUSIVE
    # but a margin far below is met
    assert verdict(effect, -0.2) == SUPPORTED
    # the same students are exactly as good
    assert verdict(same_model(effect), 0.0) == NOT_SUPPORTED
    # whatever the noise of the machine between two trainings of them
    assert verdict(same_model(Effect(0.01, 0.001, 10)), 0.0) == NOT_SUPPORTED


def test_documents_of_the_smallest_task_decide_what_is_hidden() -> None:
    runs = ([np.ones(1000), np.ones(10)],)
    effect = linear([(1.0, Arm(runs, None)), (-1.0, Arm(runs, None))])
    # one document of the small task moves the mean of the two by a twentieth
    assert effect.low < -0.05


def test_a_true_loss_is_seldom_denied() -> None:
    generator = np.random.default_rng(8)
    denied = 0
    for _ in range(400):
        first = (generator.random(150) >= 0.02).astype(float)  # loses two points
        effect = linear([(1.0, arm([first.tolist()])), (-1.0, arm([[1.0] * 150]))])
        denied += verdict(effect, -0.02) == SUPPORTED
    assert denied / 400 <= 0.025


def test_an_interaction_is_a_difference_of_differences() -> None:
    generator = np.random.default_rng(2)
    tables = {name: generator.random((4, 50)) for name in "abcd"}
    arms = {name: arm(table.tolist()) for name, table in tables.items()}
    weights = {"a": 1.0, "b": -1.0, "c": -1.0, "d": 1.0}
    effect = linear([(weights[name], arms[name]) for name in "abcd"])
    expected = sum(weights[name] * tables[name].mean() for name in "abcd")
    assert effect.value == pytest.approx(expected)
    assert (effect.seeds, effect.documents, effect.basis) == (4, 50, "seeds and documents")


def test_one_seed_has_an_interval_of_documents_only() -> None:
    generator = np.random.default_rng(3)
    first, second = generator.random((2, 1, 200))
    effect = linear([(1.0, arm(first.tolist())), (-1.0, arm(second.tolist()))])
    gaps = first[0] - second[0]
    assert effect.error == pytest.approx(gaps.std(ddof=1) / math.sqrt(200))
    assert effect.basis == "documents, one seed" and effect.seeds == 1


def test_different_seeds_are_not_paired() -> None:
    generator = np.random.default_rng(4)
    levels = np.array([0.2, 0.4, 0.5, 0.6, 0.8])  # seeds differ far more than documents
    table = levels[:, None] + 0.1 * generator.random((5, 80))
    paired = linear([(1.0, arm(table.tolist())), (-1.0, arm(table.tolist()))])
    others = arm(table[:3].tolist(), (7, 8, 9))
    apart = linear([(1.0, arm(table.tolist())), (-1.0, others)])
    assert paired.value == 0 and apart.error > 3 * paired.error
    assert apart.seeds == 3


def test_a_ratio_to_nothing_has_no_interval() -> None:
    nothing = ratio(arm([[0.0] * 30] * 3), arm([[0.0] * 30] * 3))
    assert math.isnan(nothing.value) and verdict(nothing, 0.9) == INCONCLUSIVE
    barely = ratio(arm([[1.0] * 30] * 3), arm([[1.0] + [0.0] * 29] * 3))
    assert math.isinf(barely.error) and verdict(barely, 0.9) == INCONCLUSIVE


def test_numbers_per_seed() -> None:
    effect = per_seed([0.1, 0.2, 0.3])
    assert effect.value == pytest.approx(0.2)
    assert effect.low == pytest.approx(0.2 - 4.3027 * 0.1 / math.sqrt(3), abs=1e-4)
    alone = per_seed([0.4])
    assert verdict(alone, 0.0) == INCONCLUSIVE and alone.p(0.0) == 1.0


def test_ratios_of_tokens() -> None:
    effect = seed_ratio([2.0, 2.0 * math.exp(0.1), 2.0 * math.exp(-0.1)], 1.0)
    assert effect.value == pytest.approx(2.0)
    assert effect.low < 2 < effect.high and verdict(effect, 1.0) == SUPPORTED
    assert verdict(effect, 3.0) == NOT_SUPPORTED
    # before training in every seed: the range of six covers the median with 97 %, of five with 94
    at_once = seed_ratio([math.inf] * 6, 2.0)
    assert verdict(at_once, 2.0) == SUPPORTED
    assert at_once.p(2.0) == pytest.approx(0.5**6)
    for few in (2, 5):
        too_few = seed_ratio([math.inf] * few, 2.0)
        assert verdict(too_few, 2.0) == INCONCLUSIVE and too_few.value == math.inf
        assert too_few.p(2.0) == pytest.approx(0.5**few)
    # never in one of them
    mixed = seed_ratio([math.inf, math.inf, 0.0, 3.0, 4.0], 1.0)
    assert (mixed.low, mixed.value, mixed.high) == (0.0, 4.0, math.inf)
    assert verdict(mixed, 1.0) == INCONCLUSIVE
    assert verdict(seed_ratio([5.0], 1.0), 1.0) == INCONCLUSIVE


def test_exact_numbers_and_their_margins() -> None:
    assert verdict(exact(5.2, "bytes"), 5.0) == SUPPORTED
    assert verdict(exact(5.0, "bytes"), 5.0) == NOT_SUPPORTED  # a tie is not more
    assert exact(5.2, "bytes").p(5.0) is None


def test_what_several_comparisons_say() -> None:
    yes, no, open_, absent = SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE, "not run"
    assert overall([yes, yes]) == yes
    assert overall([yes, open_]) == open_
    assert overall([yes, open_, no]) == no
    assert overall([yes, absent]) == open_  # all are needed
    assert overall([no, absent]) == no
    assert overall([yes, absent], "any") == yes
    assert overall([absent, absent]) == absent
    assert overall([]) == absent
    assert overall([no, yes], "any") == yes
    assert overall([no, open_], "any") == open_
    assert overall([no, no], "any") == no
