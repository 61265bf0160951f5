"""What reviewers ask of every number: n and interval, controls, missing data, lengths, seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reporting_fixture import as_first_version, nano_study, write_results

from rad.evaluation.scoring.ruler import effective_length
from rad.reporting import build_report
from rad.reporting.collect import Results, collect
from rad.reporting.figures import score_vs_kv, scores
from rad.reporting.plan import blocks, length_tasks, reference_selectors
from rad.reporting.ruler_figures import ruler
from rad.reporting.samples import Task
from rad.reporting.scores import Family, all_families
from rad.reporting.significance import holm
from rad.reporting.style import styled
from rad.reporting.tables import all_tables, write_tables
from rad.reporting.writers import NO_DATA, Table
from rad.study import Study

MISSING = {
    "swde": ("retrieval", "no file data/swde.jsonl"),
    "fda": ("retrieval", "no file data/fda.jsonl"),
    "ruler_qa": ("ruler", "no file data/squad.json"),
}


def study_of(seeds: int) -> Study:
    """Two selectors and teachers in every view, with a word problem and RULER at two lengths."""
    tasks = {
        "gsm_nano": {"kind": "gsm_nano", "samples": 30},
        "ruler_nano": {"kind": "ruler_nano", "samples": 10, "lengths": [64, 128]},
        "books": {"kind": "perplexity", "samples": 20},
    }
    shared = {"recipe": "kl", "seed": list(range(seeds))}
    budget = {"fraction": 0.25}
    return nano_study(
        grid=[
            {"view": "controlled", "selector": ["uniform", "rad", "kl_guided"], "budget": budget}
            | {"teacher": ["self", "large"], **shared},
            {"view": "reference", "selector": "uniform", "budget": {"layers": 0}, **shared}
            | {"label": "no attention kept"},
            {"view": "faithful", "selector": "rad", "budget": {"fraction": 0.5}, **shared}
            | {"label": "RAD"},
        ],
        evaluation={"tasks": tasks, "efficiency": {"contexts": [64]}, "probe_samples": 24},
        references=["base", "large"],
    )


@pytest.fixture(scope="module", params=[1, 3], ids=["one seed", "three seeds"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Results:
    root = tmp_path_factory.mktemp("reviewers") / "nano"
    study = study_of(request.param)
    write_results(study, root, MISSING)
    return collect(study, root)


@pytest.fixture(scope="module")
def tables(results: Results) -> dict[str, Table]:
    return all_tables(results)


def number_of_seeds(results: Results) -> int:
    return len({run.seed for run in results.study.run_table.values()})


# --- n and interval -------------------------------------------------------------------------


def test_every_record_with_a_value_has_n_and_interval(tables: dict[str, Table]) -> None:
    scored = [name for name, table in tables.items() if "value" in table.fields]
    assert set(scored) >= {"controlled", "tasks", "teachers", "faithful", "references", "controls"}
    for name in scored:
        for record in tables[name].records:
            assert set(record) <= set(tables[name].fields), name
            if record["value"] is None:
                assert (record["n"], record["low"], record["high"]) == (0, None, None), name
                assert record["missing"], name
            else:
                assert record["n"] > 0, name
                assert record["low"] <= record["value"] <= record["high"], name
                assert not record["missing"], name


def test_every_difference_has_interval_and_p_value(tables: dict[str, Table]) -> None:
    for name in ("controlled", "teachers", "controls"):
        gaps = [record for record in tables[name].records if record["difference"] is not None]
        assert gaps
        for record in gaps:
            assert record["difference_low"] <= record["difference"] <= record["difference_high"]
            assert 0 <= record["p"] <= record["p_adjusted"] <= 1
            assert record["test"]


def test_every_displayed_score_has_an_interval_below_a_heading_with_n(
    tables: dict[str, Table],
) -> None:
    seen = 0
    for name, table in tables.items():
        if "value" not in table.fields:
            continue
        for panel in table.panels:
            for index, column in enumerate(panel.columns):
                counted = column.detail.startswith("n =") or column.detail == "no data"
                for row in panel.rows:
                    entry = row[index]
                    if entry.interval and column.title != "effective length":
                        assert counted, (name, column.title)
                    if counted:
                        seen += 1
                        assert entry.interval or entry == NO_DATA, (name, column.title, entry)
    assert seen > 100


def test_figures_say_how_many_documents(results: Results) -> None:
    block = blocks(results.study)[0]
    with styled():
        drawn = [scores(results, block), score_vs_kv(results), ruler(results, block)]
        for figure in drawn:
            for axes in figure.axes:
                texts = [axes.get_title(loc) for loc in ("left", "right")] + [axes.get_xlabel()]
                assert any("n = " in text for text in texts)


def test_tidy_files_have_n_and_interval(results: Results, tmp_path: Path) -> None:
    write_tables(results, tmp_path)
    for name in ("scores", "families"):
        header, *lines = (tmp_path / f"{name}.csv").read_text(encoding="utf-8").splitlines()
        place = {key: header.split(",").index(key) for key in ("value", "low", "high", "n")}
        for line in lines:
            values = line.split(",")
            present = [bool(values[place[key]]) for key in ("value", "low", "high")]
            assert len(set(present)) == 1
            assert (values[place["n"]] != "0") == present[0]


# --- seeds ----------------------------------------------------------------------------------


def test_seeds_are_counted_and_their_spread_is_shown(
    results: Results, tables: dict[str, Table]
) -> None:
    seeds = number_of_seeds(results)
    for name in ("controlled", "tasks", "teachers", "faithful"):
        for record in tables[name].records:
            if record["value"] is not None:
                assert record["seeds"] == seeds
                assert (record["seed_sd"] is None) == (seeds == 1)
        shown = [
            entry.spread for panel in tables[name].panels for row in panel.rows for entry in row
        ]
        assert any("3 seeds" in text for text in shown) == (seeds == 3)
        note = "One seed: the interval covers documents only."
        assert (note in tables[name].caption) == (seeds == 1)
    # models as they are have no training seed, whatever the students have
    untouched = [record for record in tables["references"].records if record["model"] == "large"]
    assert {record["seeds"] for record in untouched if record["value"] is not None} == {1}


# --- many comparisons -----------------------------------------------------------------------


def test_p_values_are_adjusted_per_teacher_and_family(tables: dict[str, Table]) -> None:
    records = [
        record for record in tables["controlled"].records if record["difference"] is not None
    ]
    groups: dict[tuple[str, str], list[Any]] = {}
    for record in records:
        groups.setdefault((record["teacher"], record["family"]), []).append(record)
    assert len(groups) == 2 * 3
    for members in groups.values():
        assert len(members) == 2
        expected = holm([record["p"] for record in members])
        assert [record["p_adjusted"] for record in members] == pytest.approx(expected)
        assert {record["reference"] for record in members} == {"uniform"}


def test_colour_follows_the_adjusted_p_value(tables: dict[str, Table]) -> None:
    panel = tables["controlled"].panels[0]
    verdicts = {entry.verdict for row in panel.rows for entry in row if entry.difference}
    assert verdicts & {"better", "worse"}
    for row in panel.rows:
        for entry in row:
            if entry.verdict:
                assert entry.p < "p = 0.05"


def test_another_reference_can_be_named(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    assert reference_selectors(results.study) == ["uniform"]
    monkeypatch.setattr("rad.reporting.plan.reference_name", lambda study: "rad")
    records = all_tables(results)["controlled"].records
    assert {record["reference"] for record in records} == {"rad"}
    compared = {r["selector"] for r in records if r["difference"] is not None}
    assert compared == {"uniform", "kl_guided"}


# --- controls -------------------------------------------------------------------------------


def test_controls_have_lenient_scores_of_every_model(
    results: Results, tables: dict[str, Table]
) -> None:
    table = tables["controls"]
    assert [panel.title.split(" · ")[0] for panel in table.panels] == [
        "references",
        "controlled",
        "faithful",
    ]
    models = {(record["model"], record["about"]) for record in table.records}
    assert ("base", "base") in models
    assert {name for name, _ in models} >= {"no attention kept", "RAD", "uniform", "large"}
    metrics = {record["metric"] for record in table.records if record["family"] == "gsm"}
    assert metrics == {"exact_match", "semantic_match", "no_answer", "truncated", "new_tokens"}
    by_metric = {
        record["metric"]: record["value"]
        for record in table.records
        if (record["model"], record["family"]) == ("no attention kept", "gsm")
    }
    assert by_metric["semantic_match"] > by_metric["exact_match"]
    assert by_metric["truncated"] == by_metric["no_answer"] > 0
    titles = [column.title for column in table.panels[0].columns]
    assert {"no answer %", "cut off %", "tokens/answer", "semantic_match %"} <= set(titles)
    # the untouched base is what the others are held against
    gaps = {r["model"] for r in table.records if r["difference"] is not None}
    assert gaps == {"no attention kept", "RAD", "uniform", "rad", "kl_guided"}


def test_the_softmax_that_is_left_is_in_every_row(tables: dict[str, Table]) -> None:
    for name in ("controlled", "tasks", "teachers", "faithful", "references", "controls", "ruler"):
        table = tables[name]
        titles = [column.title for column in table.panels[0].columns]
        assert "softmax heads" in titles
        assert "KV/token" in titles
        for record in table.records:
            assert 0 <= record["softmax_fraction"] <= 1
            assert record["kv_bytes_per_token"] >= 0
    kept = {record["model"]: record for record in tables["references"].records}
    assert kept["no attention kept"]["softmax_fraction"] == 0
    assert (kept["base"]["heads"], kept["base"]["heads_total"]) == (32, 32)
    # nobody converted it: how many heads it has is not written anywhere
    assert (kept["large"]["heads_total"], kept["large"]["softmax_fraction"]) == (None, 1.0)


# --- missing data ---------------------------------------------------------------------------


def test_missing_data_has_a_column_and_a_reason(
    results: Results, tables: dict[str, Table], tmp_path: Path
) -> None:
    assert [family.name for family in all_families(results)] == [
        "gsm",
        "ruler",
        "retrieval",
        "perplexity",
    ]
    for name in ("controlled", "tasks", "teachers", "faithful", "references", "controls"):
        shown = [entry for panel in tables[name].panels for row in panel.rows for entry in row]
        assert NO_DATA in shown, name
        assert "swde, fda" in tables[name].caption or "swde (" in tables[name].caption
        assert "no file data/swde.jsonl" in tables[name].caption
    rows = [record for record in tables["tasks"].records if record["task"] == "fda"]
    assert rows
    assert {record["missing"] for record in rows} == {"no file data/fda.jsonl"}
    # the ruler family has other tasks: its mean is over those, and the heading says so
    headings = [column.detail for column in tables["references"].panels[0].columns]
    assert "n = 80, 1 of 9 tasks missing" in headings
    write_tables(results, tmp_path)
    assert "no file data/swde.jsonl" in (tmp_path / "scores.csv").read_text(encoding="utf-8")


def test_runs_without_the_same_missing_tasks_are_refused(tmp_path: Path) -> None:
    study = study_of(1)
    write_results(study, tmp_path, MISSING)
    path = tmp_path / "runs" / list(study.run_table)[1] / "evaluation.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["rad"]["missing"]["fda"]
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=r"evaluation\.json: task fda has no data in this run or"):
        collect(study, tmp_path)


def test_a_study_whose_data_are_all_missing_has_a_report(tmp_path: Path) -> None:
    study = study_of(1)
    names = ("gsm_nano", "ruler_nano", "books")
    write_results(study, tmp_path, {name: ("general", "no file") for name in names})
    for path in tmp_path.glob("runs/*/samples.jsonl"):
        path.write_text("", encoding="utf-8")
    build_report(study, tmp_path)
    assert "missing data" in (tmp_path / "report.html").read_text(encoding="utf-8")


# --- other versions and faults --------------------------------------------------------------


def test_results_of_the_first_version_still_read(tmp_path: Path) -> None:
    study = study_of(1)
    write_results(study, tmp_path)
    new = all_tables(collect(study, tmp_path))
    as_first_version(tmp_path)
    old = all_tables(collect(study, tmp_path))
    assert old["controlled"].records == new["controlled"].records
    assert {record["headline"] for record in old["controls"].records} == {1}
    assert "without other metrics" in old["controls"].caption
    assert "without other metrics" not in new["controls"].caption


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"metrics": ["exact_match"]}, "samples.jsonl:1: metrics is not an object"),
        ({"metrics": {"no_answer": "no"}}, "samples.jsonl:1: metrics: no_answer is 'no', expected"),
        ({"truncated": None}, "some documents of gsm_nano lack the key 'truncated'"),
    ],
)
def test_damaged_metrics_are_named(tmp_path: Path, damage: dict[str, Any], message: str) -> None:
    study = study_of(1)
    write_results(study, tmp_path)
    path = tmp_path / "runs" / next(iter(study.run_table)) / "samples.jsonl"
    first, *others = path.read_text(encoding="utf-8").splitlines()
    record = {**json.loads(first), **damage}
    path.write_text("\n".join([json.dumps(record), *others]), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        collect(study, tmp_path)


# --- RULER by length ------------------------------------------------------------------------


def test_ruler_is_averaged_per_length(results: Results, tables: dict[str, Table]) -> None:
    (task,) = length_tasks(results.study)
    assert task.lengths == (64, 128)
    records = [record for record in tables["ruler"].records if record["model"] == "base"]
    assert [record["length"] for record in records] == [64, 128]
    base = results.references["base"].scores
    for record in records:
        own = [base[name] for name in base if name.endswith(f"_{record['length']}")]
        assert record["subtasks"] == len(own) == 4
        assert record["n"] == 40
        expected = sum(sum(scores.values()) / len(scores) for scores in own) / 4
        assert record["value"] == pytest.approx(expected)
    values = {record["length"]: record["value"] for record in records}
    assert {record["effective_length"] for record in records} == {effective_length(values)}
    assert records[0]["effective_length"] == 128
    weakest = [r for r in tables["ruler"].records if r["model"] == "no attention kept"]
    assert {record["effective_length"] for record in weakest} == {None}
    panel = tables["ruler"].panels[0]
    shown = {row[0].text: row[-1] for row in panel.rows}
    assert shown["base"].text == "≥ 128"
    assert shown["no attention kept"].text == "< 64"
    assert all(entry.interval for entry in shown.values())


def test_one_length_has_no_table_of_lengths() -> None:
    tasks = {"ruler_nano": {"kind": "ruler_nano", "samples": 10, "lengths": [64]}}
    assert length_tasks(nano_study(evaluation={"tasks": tasks})) == []


@pytest.mark.parametrize(
    ("labels", "heading"),
    [
        (["", ""], "retrieval % ↑"),
        (["stand-in", "stand-in"], "retrieval (stand-in) % ↑"),
        (["", "synthetic"], "retrieval (partly synthetic) % ↑"),
    ],
)
def test_documents_that_stand_in_are_labelled(labels: list[str], heading: str) -> None:
    tasks = tuple(
        Task(f"t{n}", "retrieval", "contains", True, label=label) for n, label in enumerate(labels)
    )
    assert Family("retrieval", tasks).heading == heading
