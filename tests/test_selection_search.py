"""Uniform placement, and the search over subsets."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rad.placement import Budget, BudgetError
from rad.selection import SELECTORS, SelectionContext, SelectionError, load_selector, select
from rad.selection.search import neighbours, search, threshold, top_k
from rad.selection.surrogate import expected_improvement
from rad.selection.uniform import uniform_layers
from rad.settings import UniformSettings

PUBLISHED = [  # layers, kept, offset, list: the uniform rows of the KL-guided study
    (36, 5, 0, [0, 8, 16, 24, 32]),
    (36, 9, 0, list(range(0, 33, 4))),
    (36, 12, 0, list(range(0, 34, 3))),
    (36, 18, 0, list(range(0, 35, 2))),
    (28, 4, 6, [6, 13, 20, 27]),
    (28, 7, 3, list(range(3, 28, 4))),
    (28, 9, 0, list(range(0, 25, 3))),
    (28, 14, 1, list(range(1, 28, 2))),
    (28, 7, 0, list(range(0, 25, 4))),
]


@pytest.mark.parametrize(("layers", "kept", "offset", "expected"), PUBLISHED)
def test_uniform_gives_the_published_lists(
    layers: int, kept: int, offset: int, expected: list[int]
) -> None:
    assert uniform_layers(layers, kept, offset) == expected


def test_uniform_is_centred_without_an_offset() -> None:
    assert uniform_layers(12, 2) == [3, 9]
    assert uniform_layers(8, 2) == [2, 6]
    assert uniform_layers(9, 3) == [1, 4, 7]


@given(st.integers(1, 48).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), st.data())
def test_uniform_meets_every_budget(shape: tuple[int, int], data: st.DataObject) -> None:
    layers, kept = shape
    step = -(-layers // kept) if kept else 1
    offset = data.draw(st.none() | st.integers(0, step - 1))
    found = uniform_layers(layers, kept, offset)
    assert len(set(found)) == kept and found == sorted(found)
    assert all(0 <= layer < layers for layer in found)
    gaps = {after - before for before, after in itertools.pairwise(found)}
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.data())
def test_uniform_placement_is_valid(
    layers: int, kv_heads: int, group: int, data: st.DataObject
) -> None:
    heads = kv_heads * group
    count = data.draw(st.integers(0, layers * heads))
    context = SelectionContext(
        "base", layers, heads, kv_heads, Budget(heads=count), UniformSettings()
    )
    if count % heads:
        with pytest.raises(BudgetError):
            select(context)
        return
    placement = select(context)
    assert len(placement.softmax) == count
    assert placement.selector == "uniform" and placement.cost.forward_passes == 0


def test_uniform_refuses_an_offset_beyond_the_step() -> None:
    with pytest.raises(SelectionError, match="expected 0-3"):
        uniform_layers(28, 7, 4)


def test_registry_imports_no_torch() -> None:
    code = (
        "import sys; import rad.selection as s; from rad.placement import Budget;"
        "from rad.settings import UniformSettings;"
        "s.select(s.SelectionContext('b', 8, 4, 2, Budget(layers=2), UniformSettings()));"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_selector_is_named() -> None:
    with pytest.raises(SelectionError, match="unknown selector 'magic'"):
        load_selector("magic")
    assert {"uniform", "rad", "kl_guided", "retrieval_aware"} <= set(SELECTORS)


class Toy:
    """An additive objective with pairwise interactions that counts its evaluations."""

    def __init__(self, seed: int, items: int) -> None:
        rng = np.random.default_rng(1000 + seed)
        self.single = rng.normal(size=items)
        self.pairs = rng.normal(size=(items, items)) * 0.15
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, chosen: tuple[int, ...]) -> float:
        self.seen.append(chosen)
        members = list(chosen)
        return float(self.single[members].sum() + self.pairs[members][:, members].sum())


def test_search_beats_random() -> None:
    searched, drawn = [], []
    for seed in range(3):
        toy = Toy(seed, 24)
        found = search(toy, 24, 6, evaluations=40, seed=seed)
        assert len(toy.seen) == len(set(toy.seen)) == 40 and not found.exhaustive
        rng = np.random.default_rng(seed)
        drawn.append(max(toy(top_k(rng.random(24), 6)) for _ in range(40)))
        searched.append(found.value)
        assert found.value == toy(found.best)
    assert np.mean(searched) > np.mean(drawn) + 1.0


def test_search_is_deterministic() -> None:
    first = search(Toy(0, 16), 16, 5, evaluations=20, seed=3)
    again = search(Toy(0, 16), 16, 5, evaluations=20, seed=3)
    other = search(Toy(0, 16), 16, 5, evaluations=20, seed=4)
    assert first == again
    assert first.history != other.history


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), st.data())
def test_search_returns_the_best_of_what_it_tried(
    shape: tuple[int, int], data: st.DataObject
) -> None:
    items, size = shape
    toy = Toy(0, items)
    evaluations = data.draw(st.integers(1, 40))
    found = search(toy, items, size, evaluations=evaluations, initial=2)
    every = list(itertools.combinations(range(items), size))
    assert found.exhaustive == (len(every) <= evaluations)
    assert len(found.history) == min(len(every), evaluations)
    assert found.value == max(value for _, value in found.history)
    if found.exhaustive:
        assert found.value == max(map(toy, every))


def test_search_survives_a_flat_objective() -> None:
    assert len(search(lambda chosen: 0.0, 12, 4, evaluations=15).history) == 15


def test_search_tries_given_sets_first() -> None:
    toy = Toy(0, 12)
    search(toy, 12, 3, evaluations=12, first=[(9, 0, 4), (1, 2, 3), (0, 4, 9)])
    assert toy.seen[:2] == [(0, 4, 9), (1, 2, 3)]


def test_helpers() -> None:
    assert top_k(np.array([0.1, 0.9, 0.9, 0.2]), 2) == (1, 2)
    assert sorted(neighbours((0, 1), 4)) == [(0, 2), (0, 3), (1, 2), (1, 3)]
    gain = expected_improvement(np.array([1.0, 0.0]), np.array([1e-6, 1.0]), 0.5)
    assert gain[0] == pytest.approx(0.5) and 0 < gain[1] < 0.5
    with pytest.raises(ValueError, match="cannot choose"):
        search(lambda chosen: 0.0, 3, 4, evaluations=1)


@pytest.mark.parametrize("method", ["auto", "bayesian", "exhaustive"])
def test_searches_of_a_small_space_find_the_optimum(method: str) -> None:
    for seed in range(3):
        toy = Toy(seed, 6)
        best = max(map(toy, itertools.combinations(range(6), 3)))
        assert search(toy, 6, 3, evaluations=20, seed=seed, method=method).value == best


def test_greedy_is_optimal_when_layers_add_up() -> None:
    toy = Toy(0, 9)
    toy.pairs[:] = 0
    found = search(toy, 9, 4, evaluations=1, method="greedy")
    assert found.best == top_k(toy.single, 4) and found.method == "greedy"
    assert len(found.history) == 9 + 8 + 7 + 6
    assert all(len(chosen) == 4 for chosen, _ in found.top(3))


def test_sets_of_any_size_can_be_searched() -> None:
    for seed in range(3):
        toy = Toy(seed, 10)
        every = [s for k in range(11) for s in itertools.combinations(range(10), k)]
        best = max(map(toy, every))
        assert search(toy, 10, None, evaluations=1024).value == best
        assert search(toy, 10, None, evaluations=60, seed=seed).value > 0.95 * best
        assert search(toy, 10, None, evaluations=1, method="greedy").value <= best


def test_known_values_of_other_sizes_inform_the_search() -> None:
    """Values of sets of other sizes find the optimum of this size sooner."""
    plain, informed = [], []
    for seed in range(5):
        toy = Toy(seed, 14)
        known = dict(search(toy, 14, None, evaluations=60, seed=seed).history)
        options = {"evaluations": 6, "initial": 2, "seed": seed}
        plain.append(search(toy, 14, 5, **options).value)
        informed.append(search(toy, 14, 5, **options, known=known).value)
    assert np.mean(informed) > np.mean(plain) + 0.5


def test_a_large_history_is_searched_with_the_kernel_fitted_now_and_then() -> None:
    toy = Toy(2, 20)
    found = search(toy, 20, 6, evaluations=130, seed=1)
    assert len(found.history) == 130
    rng = np.random.default_rng(0)
    assert found.value > max(toy(top_k(rng.random(20), 6)) for _ in range(500))


def test_points_of_the_box_become_sets() -> None:
    assert threshold(np.array([0.2, 0.9, 0.5, 0.51])) == (1, 3)
    assert sorted(neighbours((0,), 2, free=True)) == [(), (0, 1), (1,)]


def test_what_a_search_cannot_do_is_named() -> None:
    toy = Toy(0, 12)
    with pytest.raises(SelectionError, match="exhaustive search would try 924 sets"):
        search(toy, 12, 6, evaluations=80, method="exhaustive")
    with pytest.raises(SelectionError, match="cannot choose -1 of 12 layers"):
        search(toy, 12, -1, evaluations=80)
    with pytest.raises(SelectionError, match="unknown search 'annealing'"):
        search(toy, 12, 6, evaluations=80, method="annealing")
    for method in ("bayesian", "greedy", "exhaustive"):
        with pytest.raises(SelectionError, match=r"skipping layers \[.*\] is nan, not a finite"):
            search(lambda chosen: float("nan"), 6, 2, evaluations=80, method=method)


def test_ties_go_to_the_set_tried_first_and_are_counted() -> None:
    found = search(lambda chosen: float(3 in chosen), 6, 2, evaluations=20)
    assert found.best == (0, 3) and found.ties() == 4
