"""What the report says of selection: its cost, its worth, where selectors agree, byte budgets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from reporting_fixture import nano_study, write_results

from rad.placement import Placement, Scores
from rad.reporting import outputs, selection_figures
from rad.reporting.collect import Results, collect
from rad.reporting.describe import budget_text
from rad.reporting.plan import cost_groups, model_based, shared_budgets
from rad.reporting.scores import families, mean_score
from rad.reporting.selection_tables import rank_correlation
from rad.reporting.style import marks, styled
from rad.reporting.tables import all_tables
from rad.settings import SELECTOR_SETTINGS
from rad.study import Study

SELECTORS = ["uniform", "rad", "kl_guided", "retrieval_aware"]


def study_of(*budgets: dict[str, Any], **changes: Any) -> Study:
    """The four selectors at `budgets`, two teachers, two small tasks."""
    tasks = {
        "gsm_nano": {"kind": "gsm_nano", "samples": 30},
        "ruler_nano": {"kind": "ruler_nano", "samples": 10, "lengths": [64]},
    }
    entry = {"view": "controlled", "budget": list(budgets), "recipe": "kl", "selector": SELECTORS}
    entry["teacher"] = ["self", "large"]
    settings = {
        "grid": [entry],
        "evaluation": {"tasks": tasks, "efficiency": {"contexts": [64, 256]}},
        "references": ["base"],
    }
    return nano_study(**{**settings, **changes})


BYTES = ({"layers": 2}, {"kv_bytes_per_token": 1024}, {"kv_bytes_per_token": 1025})


@pytest.fixture(scope="module")
def study() -> Study:
    return study_of(*BYTES)


@pytest.fixture(scope="module")
def tree(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("selection") / "nano"
    write_results(study, root)
    return root


@pytest.fixture(scope="module")
def results(study: Study, tree: Path) -> Results:
    return collect(study, tree)


# --- when there is something to show --------------------------------------------------------


def test_two_selectors_must_run_a_model(study: Study) -> None:
    assert model_based(study) == set(study.selectors) - {"uniform"}
    names = ("selection_cost.csv", "agreement.csv", "selection_cost.svg", "agreement.svg")
    files = {Path(name).name for kind in outputs(study).values() for name in kind}
    assert files.issuperset(names)
    # retrieval-aware against two kinds of uniform: nothing that costs is compared
    settings = {**study.selectors, "every_third": {"method": "uniform", "offset": 1}}
    entry: dict[str, Any] = {"view": "controlled", "budget": {"layers": 2}, "recipe": "kl"}
    entry["selector"] = ["uniform", "every_third", "retrieval_aware"]
    alone = study_of(grid=[entry], selectors=settings)
    files = {Path(name).name for kind in outputs(alone).values() for name in kind}
    assert files.isdisjoint(names)


def test_a_method_of_the_users_own_counts_as_running_a_model() -> None:
    config = study_of({"layers": 2}).model_dump(mode="json", exclude_none=True)
    config["selectors"]["mine"] = {"method": "mine"}
    config["grid"][0]["selector"] = ["uniform", "rad", "mine"]
    study = Study.from_config(config, ["mine"])
    assert model_based(study) >= {"rad", "mine"}
    assert [group.selectors for group in cost_groups(study)] == [["uniform", "rad", "mine"]]


def test_groups_are_self_distilled_and_split_by_all_but_the_budget() -> None:
    grid = [
        {"view": "controlled", "selector": SELECTORS, "recipe": "kl", "teacher": ["large", "self"]}
        | {"budget": [{"layers": 2}, {"layers": 4}], "mixer": "mamba2"},
        {"view": "controlled", "selector": SELECTORS, "recipe": "kl", "teacher": "large"}
        | {"budget": {"layers": 2}, "mixer": "sliding_window"},
    ]
    groups = cost_groups(study_of(grid=grid))
    assert [group.suffix for group in groups] == ["-mamba2", "-sliding_window"]
    assert [group.teacher for group in groups] == ["self", "large"]
    assert [group.budgets for group in groups] == [["l2", "l4"], ["l2"]]
    assert {cell.teacher for cell in groups[0].cells} == {"self"}


# --- cost -----------------------------------------------------------------------------------


def test_quality_stands_beside_cost(results: Results) -> None:
    records = all_tables(results)["selection_cost"].records
    assert len(records) == len(SELECTORS) * len(BYTES)
    assert {record["teacher"] for record in records} == {"self"}
    by_selector = {record["selector"]: record for record in records if record["budget"] == "l2"}
    assert by_selector["uniform"]["flops"] == 0
    # 2 per weight and token, 6 for those trained on
    assert by_selector["kl_guided"]["flops"] == 790_000 * (2 * 160_000 + 6 * 320_000)
    for record in records:
        assert record["low"] <= record["value"] <= record["high"]
        run = f"base-{record['selector']}-{record['budget']}-mamba2-qkvo-kl-self-s0"
        assert record["held_out_kl"] == results.runs[run].curve[-1].held_out_kl


def test_the_mean_score_is_the_mean_of_families(results: Results) -> None:
    group = [next(iter(results.runs.values()))]
    means = [
        np.mean([np.mean(list(group[0].scores[task.name].values())) for task in family.tasks])
        for family in families(results)
    ]
    assert len({len(family.tasks) for family in families(results)}) > 1
    value = mean_score(results, group)
    assert value is not None
    assert value.value == pytest.approx(np.mean(means))


def drawn(figure: Figure) -> list[tuple[str, list[str]]]:
    """Label and tick labels of the x axis of each panel."""
    figure.draw_without_rendering()
    return [
        (axes.get_xlabel(), [tick.get_text() for tick in axes.get_xticklabels()])
        for axes in figure.axes
    ]


def test_free_selectors_stand_left_of_the_break(results: Results) -> None:
    group = cost_groups(results.study)[0]
    with styled():
        figure = selection_figures.selection_cost(results, group)
        panels = drawn(figure)
    assert [label for label, _ in panels] == ["FLOPs of the selection"] * 2 + [
        "time of the selection (s)"
    ] * 2
    assert [ticks[0] for _, ticks in panels] == ["0", "0", "< 0.1", "< 0.1"]
    for axes in figure.axes:
        box = axes.get_window_extent()
        dots = [line for line in axes.lines if line.get_marker() not in ("_", "None")]
        assert len(dots) == len(SELECTORS) * len(BYTES)
        for line in dots:
            ((x, y),) = line.get_transform().transform(line.get_xydata())
            assert box.x0 <= x <= box.x1
            assert box.y0 <= y <= box.y1
    free = [line for line in figure.axes[0].lines if line.get_marker() == "s"]
    assert [float(line.get_xdata()[0]) for line in free] == [0.0] * len(BYTES)


def test_placements_of_the_first_version_still_read(
    study: Study, tree: Path, tmp_path: Path
) -> None:
    write_results(study, tmp_path)
    for path in (tmp_path / "runs").glob("*/placement.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        del content["footprint"], content["cost"]["flops"]
        content["cost"].pop("trained_tokens")
        path.write_text(json.dumps(content), encoding="utf-8")
    old = collect(study, tmp_path)
    tables = all_tables(old)
    for record in tables["selection"].records:
        assert record["kv_bytes_per_token"] is None
        # what ran no model did nothing; of the others nobody counted
        assert record["flops"] == (0 if record["selector"] == "uniform" else None)
        assert record["trained_tokens"] == (0 if record["selector"] == "uniform" else None)
    with styled():
        panels = drawn(selection_figures.selection_cost(old, cost_groups(study)[0]))
    assert {label for label, _ in panels} == {"time of the selection (s)"}


# --- agreement ------------------------------------------------------------------------------


def test_overlap_of_kept_heads(results: Results, study: Study) -> None:
    records = {
        (record["first"], record["second"]): record
        for record in all_tables(results)["agreement"].records
        if record["budget"] == "l2"
    }
    assert len(records) == 6
    # layers 1, 5 against 0, 7, and 3, 4 against single heads of which three lie in them
    assert records["uniform", "rad"]["jaccard"] == 0
    run = "base-{}-l2-mamba2-qkvo-kl-self-s0"
    heads = [
        set(results.runs[run.format(name)].placement.softmax)  # type: ignore[union-attr]
        for name in ("kl_guided", "retrieval_aware")
    ]
    record = records["kl_guided", "retrieval_aware"]
    assert (record["shared"], record["union"]) == (len(heads[0] & heads[1]), 16 - record["shared"])
    assert record["jaccard"] == pytest.approx(record["shared"] / record["union"])
    assert 0 < record["shared"] < 8
    # one scores layers, the other heads
    assert record["spearman"] is None
    assert set(shared_budgets(study)) == {("base", "l2"), ("base", "b1024"), ("base", "b1025")}
    with styled():
        figure = selection_figures.agreement(results)
    assert len(figure.axes) == 3


def scored(values: list[Any], kind: Any = "layer", higher: bool = True) -> Placement:
    placement = Placement.from_layers(
        [0], layers=4, heads=2, kv_heads=1, schema=1, base="base", selector="x"
    )
    placement.scores = Scores(kind=kind, name="s", values=values, higher_is_kept=higher)
    return placement


def test_rank_correlation_knows_direction_and_kind() -> None:
    rising = scored([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(rising, scored([1.0, 10.0, 11.0, 90.0])) == pytest.approx(1)
    assert rank_correlation(rising, scored([1.0, 10.0, 11.0, 90.0], higher=False)) == (
        pytest.approx(-1)
    )
    heads = scored([[0.0, 1.0], [5.0, 0.0], [6.0, 6.0], [0.0, 9.0]], kind="head")
    assert rank_correlation(rising, heads) is None
    assert rank_correlation(heads, scored([[1.0, 0.0]] * 3 + [[2.0, 0.0]], kind="head")) == (
        pytest.approx(0.7745966)
    )
    assert rank_correlation(rising, scored([2.0] * 4)) is None
    assert rank_correlation(rising, scored([1.0, 2.0, float("inf"), 4.0])) is None
    assert rank_correlation(rising, scored([1.0, 2.0, 3.0])) is None


# --- budgets in bytes -----------------------------------------------------------------------


def test_budgets_in_bytes_have_titles_of_their_own(results: Results, study: Study) -> None:
    assert budget_text("b1024") == "≤ 1,024 B KV/token"
    tables = all_tables(results)
    kept = ["kept: 2 layers", "kept: ≤ 1,024 B KV/token", "kept: ≤ 1,025 B KV/token"]
    for name in ("controlled", "tasks", "teachers"):
        assert [panel.title.split(" · ")[1] for panel in tables[name].panels] == kept
    assert {row[1].text for row in tables["heldout"].panels[0].rows} == {
        title.removeprefix("kept: ") for title in kept
    }
    figures = outputs(study)["figures"]
    assert [name for name in figures if "scores-" in name and name.endswith("svg")] == [
        f"figures/scores-{slug}.svg" for slug in ("l2", "b1024", "b1025")
    ]


def test_equal_bytes_are_different_numbers_of_heads(results: Results) -> None:
    records = all_tables(results)["controlled"].records
    cost = {
        (record["selector"], record["budget"]): (record["heads"], record["kv_bytes_per_token"])
        for record in records
    }
    # two whole layers share their keys and values, four single heads do not
    assert cost["uniform", "b1024"] == (8, 1024)
    assert cost["retrieval_aware", "b1024"] == (4, 1024)
    assert cost["retrieval_aware", "l2"] == (8, 2048)
    panel = all_tables(results)["controlled"].panels[1]
    assert [entry.text for entry in panel.rows[-1][:3]] == [
        "retrieval_aware",
        "12.5 % (4/32)",
        "1 KiB",
    ]


# --- many selectors -------------------------------------------------------------------------


def test_every_selector_looks_different_and_the_legend_fits(tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {name: {"method": name} for name in SELECTOR_SETTINGS}
    chosen = nano_study().selectors
    del settings["preset"]  # its lists are for other bases
    settings["kl_guided"] = dict(chosen["kl_guided"])
    settings["flash_morph"]["tokens"] = 1000
    entry = {"view": "controlled", "selector": list(settings), "recipe": "kl"}
    study = study_of(selectors=settings, grid=[{**entry, "budget": {"layers": 2}}])
    looks = marks(study).values()
    assert len({(mark.color, mark.marker) for mark in looks}) == len(settings) == 15
    write_results(study, tmp_path)
    with styled():
        figure = selection_figures.selection_cost(collect(study, tmp_path), cost_groups(study)[0])
        figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().x1 <= figure.bbox.x1
