"""Rules of the field's selectors, without a model: spreads, constraints, scores and prompts."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rad.placement import Budget, Placement
from rad.selection import SelectionContext, SelectionError, recall_probes, select
from rad.selection.agreement import agreement, spearman
from rad.selection.halo import halo_scores
from rad.selection.recall_ablation import check_drops, check_probe
from rad.selection.recall_probes import Question
from rad.selection.smart import smart_layers, violation
from rad.selection.uniform import uniform_heads
from rad.settings import SELECTOR_SETTINGS

shapes = st.tuples(st.integers(1, 9), st.sampled_from([1, 2, 4, 6]))


def _shaped(shape: tuple[int, int], budget: Budget, method: str, **keys: Any) -> Placement:
    return select(
        SelectionContext(
            base="base",
            layers=shape[0],
            heads=shape[1],
            kv_heads=1 if shape[1] % 2 else shape[1] // 2,
            budget=budget,
            settings=SELECTOR_SETTINGS[method].model_validate({"method": method, **keys}),
            kv_head_bytes=128,
        )
    )


# --- random and uniform ---------------------------------------------------------------------


@given(shapes, st.sampled_from(["layers", "heads"]), st.integers(0, 5), st.data())
def test_random_sets_meet_the_budget_and_are_nested(
    shape: tuple[int, int], unit: str, seed: int, data: st.DataObject
) -> None:
    total = shape[0] * (1 if unit == "layers" else shape[1])
    few = data.draw(st.integers(0, total))
    many = data.draw(st.integers(few, total))
    small, again, large = (
        _shaped(shape, Budget(**{unit: k}), "random", unit=unit, seed=seed)
        for k in (few, few, many)
    )
    assert small.softmax == again.softmax
    assert set(small.softmax) <= set(large.softmax)


def test_random_seeds_differ() -> None:
    found = {
        tuple(_shaped((8, 4), Budget(layers=2), "random", seed=seed).kept_layers())
        for seed in range(20)
    }
    assert len(found) > 8


@given(shapes, st.sampled_from(["flat", "per_layer"]), st.data())
def test_uniform_heads_are_spread_evenly(
    shape: tuple[int, int], spread: str, data: st.DataObject
) -> None:
    layers, heads = shape
    kept = data.draw(st.integers(0, layers * heads))
    pairs = uniform_heads(layers, heads, kept, spread)
    assert len(set(pairs)) == len(pairs) == kept
    assert all(layer < layers and head < heads for layer, head in pairs)
    per_layer = [sum(owner == layer for owner, _ in pairs) for layer in range(layers)]
    assert max(per_layer) - min(per_layer) <= 1
    placement = _shaped(shape, Budget(heads=kept), "uniform", unit="heads", spread=spread)
    assert placement.softmax == sorted(pairs)


def test_offsets_of_uniform_heads_rotate_or_shift() -> None:
    assert uniform_heads(2, 4, 2) == [(0, 2), (1, 2)]
    assert uniform_heads(2, 4, 2, offset=1) == [(0, 3), (1, 3)]
    assert uniform_heads(2, 4, 2, offset=2) == [(0, 0), (1, 0)]
    assert uniform_heads(4, 4, 4, "flat", 3) == [(0, 3), (1, 3), (2, 3), (3, 3)]
    with pytest.raises(SelectionError, match="uniform offset 4: expected 0-3"):
        uniform_heads(2, 4, 2, offset=4)


@given(shapes, st.sampled_from(["flat", "per_layer"]), st.integers(0, 3000))
def test_uniform_heads_fit_a_budget_in_bytes(
    shape: tuple[int, int], spread: str, limit: int
) -> None:
    budget = Budget(kv_bytes_per_token=limit)
    placement = _shaped(shape, budget, "uniform", unit="heads", spread=spread)
    assert placement.footprint is not None
    assert placement.footprint.kv_bytes_per_token <= limit


# --- SMART ----------------------------------------------------------------------------------


def _brute_force(scores: list[float], kept: int) -> float:
    """The largest sum over all sets that SMART's constraints allow, by trying every set."""
    layers, window = len(scores), len(scores) // kept
    first = scores.index(max(scores[:window]))
    last = layers - window + scores[layers - window :].index(max(scores[layers - window :]))
    sums = []
    for chosen in itertools.combinations(range(layers), kept):
        if chosen[0] != first or chosen[-1] != last:
            continue
        mean = (last - first) / max(1, kept - 1)
        gaps = {b - a for a, b in itertools.pairwise(chosen)}
        if gaps <= {math.floor(mean), math.ceil(mean)}:
            sums.append(sum(scores[layer] for layer in chosen))
    return max(sums)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=11, unique=True), st.data())
def test_smart_is_feasible_and_maximal(values: list[int], data: st.DataObject) -> None:
    scores = [float(value) for value in values]
    kept = data.draw(st.integers(1, len(scores)))
    chosen = smart_layers(scores, kept)
    assert len(chosen) == kept
    assert violation(chosen, len(scores)) is None
    assert sum(scores[layer] for layer in chosen) == _brute_force(scores, kept)


def test_smart_breaks_ties_by_the_earlier_layers() -> None:
    assert smart_layers([0.0] * 8, 3) == [0, 3, 6]
    assert smart_layers([0.0] * 8, 0) == []


@pytest.mark.parametrize(
    ("kept", "layers", "message"),
    [
        ([4, 7], 8, "first kept layer 4 is not among the first 4"),
        ([0, 3], 8, "last kept layer 3 is not among the last 4"),
        ([0, 1, 6], 8, "gap 0 to 1 is not one of"),
        ([0, 8], 8, "not different layers of 8"),
    ],
)
def test_the_smart_checker_names_the_fault(kept: list[int], layers: int, message: str) -> None:
    assert message in (violation(kept, layers) or "")


def test_smart_refuses_what_it_cannot_do() -> None:
    with pytest.raises(SelectionError, match="cannot keep 4 of 3"):
        smart_layers([1.0, 2.0, 3.0], 4)
    with pytest.raises(SelectionError, match="score 1 of 3 is nan"):
        smart_layers([1.0, math.nan, 3.0], 1)


# --- HALO's formula -------------------------------------------------------------------------

HALO = json.loads((Path(__file__).parent / "halo_scores.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("model", ["Qwen3-1.7B", "Qwen3-4B", "Qwen3-8B"])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-10])
def test_halo_scores_give_the_published_sets(model: str, epsilon: float) -> None:
    table = np.array(HALO[model]["layers"])
    scores = halo_scores(table[:, :3].mean(1).tolist(), table[:, 3:].mean(1).tolist(), epsilon)
    best = sorted(range(len(scores)), key=lambda layer: -scores[layer])
    assert sorted(best[: len(scores) // 4]) == HALO[model]["kept"]


def test_halo_scores_are_clipped() -> None:
    assert halo_scores([0.0, 1.0], [0.5, 0.5]) == [50.0, 0.0]


# --- agreement ------------------------------------------------------------------------------


def test_spearman_shares_ranks_of_equal_values() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 1.5 1.5 3 against 1 2 3
    assert spearman([1, 1, 3], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert spearman([1, 1, 1], [1, 2, 3]) is None
    with pytest.raises(ValueError, match="cannot correlate 2 with 3"):
        spearman([1, 2], [1, 2, 3])


def test_agreement_of_placements() -> None:
    a = _shaped((4, 2), Budget(layers=2), "random", seed=0)
    b = Placement.from_layers(
        a.kept_layers(), layers=4, heads=2, kv_heads=1, base="b", selector="b"
    )
    c = Placement(
        base="b", layers=4, heads=2, kv_heads=1, softmax=[(a.kept_layers()[0], 0)], selector="c"
    )
    found = agreement({"a": a, "b": b, "c": c})
    assert found["jaccard"]["a"]["b"] == 1
    assert found["jaccard"]["a"]["c"] == 1 / 4
    assert found["spearman"]["a"]["b"] is None
    assert found["kept_by"][a.kept_layers()[0]] == 3
    other = _shaped((5, 2), Budget(layers=2), "random")
    with pytest.raises(ValueError, match="different shape"):
        agreement({"a": a, "other": other})


# --- recall prompts -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano_tokenizer() -> Any:
    from rad.data.nano import tokenizer

    return tokenizer.load()


def _asked(tokenizer: Any, task: str, style: str, count: int = 20) -> list[Question]:
    return recall_probes.questions(task, style, tokenizer, count, pairs=12, tokens=96, seed=3)


class _Words:
    """A tokenizer with enough words to be keys."""

    def get_vocab(self) -> dict[str, int]:
        return {f"Ġ{a}{b}{c}": 0 for a in "klmnp" for b in "aeiou" for c in "rst"}


@pytest.mark.parametrize("style", ["nano", "text"])
@pytest.mark.parametrize("task", ["ar", "ar_mh", "vt", "cwe"])
def test_questions_are_a_function_of_the_seed(task: str, style: str) -> None:
    first = _asked(_Words(), task, style)
    assert first == _asked(_Words(), task, style)
    assert len({question.prompt for question in first}) == len(first)


def test_answers_of_text_questions_follow_from_their_prompts() -> None:
    for question in _asked(_Words(), "ar", "text"):
        said = dict(re.findall(r"^(\w+): (\d)$", question.prompt, re.M))
        names = re.search(r"values of (.*) is$", question.prompt)
        assert names and len(names[1].split(", ")) == 3
        assert int(question.answer) == sum(int(said[name]) for name in names[1].split(", "))
    for question in _asked(_Words(), "ar_mh", "text"):
        said = dict(re.findall(r"^(\w+): (?:same as )?(\w+)$", question.prompt, re.M))
        key = question.prompt.split()[-2]
        assert not said[key].isdigit()  # at least one hop
        hops = 0
        while not key.isdigit():
            key, hops = said[key], hops + 1
        assert question.answer == f" {key}" and hops <= recall_probes.HOPS + 1
    for question in _asked(_Words(), "vt", "text"):
        names = question.answer.strip().split(", ")
        value = re.search(r"hold (\d+)", question.prompt)
        assert value and f"VAR {names[0]} = {value[1]}" in question.prompt
        for before, after in itertools.pairwise(names):
            assert f"VAR {after} = VAR {before}" in question.prompt
    for question in _asked(_Words(), "cwe", "text"):
        words = question.prompt.split("\n")[0].removeprefix("Words: ").rstrip(".").split(", ")
        twice = [word for word in dict.fromkeys(words) if words.count(word) == 2]
        assert question.answer.strip().split(", ") == twice and len(twice) == 10


def test_answers_of_nano_hops_follow_from_their_prompts() -> None:
    hops = []
    for question in _asked(_Words(), "ar_mh", "nano", 60):
        said = dict(re.findall(r" (\w+) (\w+);", question.prompt))
        key, way = question.prompt.split()[-1], []
        while key in said:
            key = said[key]
            way.append(key)
        assert question.answer == "".join(f" {word}" for word in way)
        hops.append(len(way))
    assert set(hops) == {2, 3}  # one or two aliases, then the value


@pytest.mark.parametrize("task", ["ar", "ar_mh", "vt", "cwe"])
def test_batches_mark_the_answers(nano_tokenizer: Any, task: str) -> None:
    asked = _asked(nano_tokenizer, task, "auto", 10)
    found = recall_probes.batches(nano_tokenizer, asked, 4, 128)
    assert [len(tokens) for tokens, _ in found] == [4, 4, 2]
    texts = [
        nano_tokenizer.decode(row[mark])
        for tokens, answers in found
        for row, mark in zip(tokens, answers.asked, strict=True)
    ]
    assert texts == [question.answer for question in asked]
    with pytest.raises(SelectionError, match="the base takes 32; lower"):
        recall_probes.batches(nano_tokenizer, asked, 4, 32)


def test_recall_needs_a_tokenizer_with_enough_words(nano_tokenizer: Any) -> None:
    with pytest.raises(SelectionError, match="needs the base's tokenizer"):
        _asked(None, "ar", "text")
    with pytest.raises(SelectionError, match="90 keys asked, but the tokenizer has 75 words"):
        recall_probes.questions("ar", "text", _Words(), 1, pairs=90, tokens=96, seed=0)


def test_guessing_is_no_probe() -> None:
    asked = [Question("p", "a", 0.25)] * 64
    check_probe("vt", asked, 0.6)
    with pytest.raises(
        SelectionError, match=r"answers 0\.250 of 64 prompts, guessing gives 0\.250"
    ):
        check_probe("vt", asked, 0.25)


def test_a_probe_that_no_layer_matters_for_is_refused() -> None:
    check_drops("ar", 1.0, [0.0, 0.1, 0.0])
    with pytest.raises(
        SelectionError, match=r"ar: the intact base answers 1\.000 .*make the prompts"
    ):
        check_drops("ar", 1.0, [0.0, 0.0, 0.0])
