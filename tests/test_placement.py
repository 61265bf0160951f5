"""Placements and budgets: what is accepted, what is refused, and how faults read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from rad.placement import Budget, BudgetError, Placement


def _placement(softmax: list[tuple[int, int]], **changes: object) -> Placement:
    fields = {"base": "b", "layers": 4, "heads": 4, "kv_heads": 2, "selector": "test"}
    return Placement(softmax=softmax, **{**fields, **changes})  # type: ignore[arg-type]


@given(st.integers(1, 40), st.integers(1, 16), st.data())
def test_layer_budgets_count_heads(layers: int, heads: int, data: st.DataObject) -> None:
    kept = data.draw(st.integers(0, layers))
    for budget in (Budget(layers=kept), Budget(heads=kept * heads), Budget(fraction=kept / layers)):
        assert budget.layer_count(layers, heads) == kept
        assert budget.head_count(layers, heads) == kept * heads
        assert Budget.parse(budget.slug).slug == budget.slug


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (Budget(layers=9), "asks for 36 heads"),
        (Budget(heads=33), "asks for 33 heads"),
        (Budget(fraction=0.3), "not a whole number; the nearest that is: 0.3125"),
    ],
)
def test_budgets_that_cannot_be_met_say_why(budget: Budget, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        budget.head_count(8, 4)


def test_a_head_budget_that_is_no_whole_layer_is_refused_by_layer_wise_selectors() -> None:
    with pytest.raises(BudgetError, match="multiple of 4"):
        Budget(heads=6).layer_count(8, 4)


@pytest.mark.parametrize("fields", [{}, {"layers": 1, "heads": 2}, {"layers": -1}, {"fraction": 2}])
def test_malformed_budgets_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Budget(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("slug", ["", "x3", "l", "lx", "f2.0x"])
def test_malformed_slugs_are_refused(slug: str) -> None:
    with pytest.raises(BudgetError, match="expected layers:2"):
        Budget.parse(slug)


@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3))))
def test_kinds_and_counts_agree(pairs: set[tuple[int, int]]) -> None:
    placement = _placement(list(pairs))
    assert placement.fraction() == len(pairs) / 16
    for layer in range(4):
        kept = len(placement.kept_heads(layer))
        assert placement.kind(layer) == {0: "mixer", 4: "softmax"}.get(kept, "hybrid")
    whole = sum(placement.kind(layer) == "softmax" for layer in range(4))
    single = sum(
        len(placement.kept_heads(layer)) for layer in range(4) if placement.kind(layer) == "hybrid"
    )
    assert placement.cached_kv_heads() == 2 * whole + single


def test_files_round_trip_and_faults_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    placement = _placement([(2, 1), (0, 3)])
    placement.save(path)
    assert Placement.load(path) == placement
    assert json.loads(path.read_text())["schema"] == 1

    content = placement.to_dict() | {"softmax": [[2, 7]]}
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"placement\.json: .*layer 2 head 7.*heads 0-3"):
        Placement.load(path)
    path.write_text(json.dumps(content | {"softmax": [[2, 1], [2, 1]]}))
    with pytest.raises(ValueError, match="twice"):
        Placement.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"placement\.json: not JSON"):
        Placement.load(path)
    path.write_text(json.dumps(placement.to_dict() | {"sofmax": []}))
    with pytest.raises(ValueError, match="sofmax"):
        Placement.load(path)


def test_a_placement_must_meet_the_budget_of_its_run() -> None:
    with pytest.raises(BudgetError, match="keeps 2 heads, budget l1 asks for 4"):
        _placement([(0, 0), (0, 1)]).check_budget(Budget(layers=1))


def test_tied_at_the_cut_go_to_the_earlier_one_and_are_recorded() -> None:
    from rad.selection.base import SelectionContext
    from rad.settings import UniformSettings

    context = SelectionContext(
        base="b", layers=4, heads=2, kv_heads=1, budget=Budget(layers=2), settings=UniformSettings()
    )
    kept = context.best_layers([0.5, 1.0, 0.5, 0.5])
    assert kept == [1, 0]
    assert context.layer_placement(kept).provenance["tied_at_the_cut"] == [0, 2, 3]
    clear = context.best_layers([3.0, 2.0, 1.0, 0.0])
    assert "tied_at_the_cut" not in context.layer_placement(clear).provenance
    context.budget = Budget(heads=1)
    heads = context.best_heads([[0, 0], [1, 1], [0, 0], [0, 0]])
    assert heads == [(1, 0)]
    assert context.placement(heads).provenance["tied_at_the_cut"] == [(1, 0), (1, 1)]
