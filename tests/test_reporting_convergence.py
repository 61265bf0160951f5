"""The table of tokens to reach the baseline, and what curves of several versions hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reporting_fixture import nano_study, write_results

from rad.reporting import build_report, convergence_figures, outputs
from rad.reporting.collect import Results, collect
from rad.reporting.convergence_table import convergence
from rad.reporting.plan import blocks, races
from rad.reporting.style import styled
from rad.reporting.tables import all_tables
from rad.reporting.writers import markdown_text
from rad.study import Study


def study_of(**changes: Any) -> Study:
    entry = {"view": "controlled", "selector": ["uniform", "rad", "kl_guided"], "recipe": "kl"}
    entry |= {"budget": {"fraction": 0.25}, "teacher": ["self", "large"], **changes}
    tasks = {"gsm_nano": {"kind": "gsm_nano", "samples": 5}}
    return nano_study(
        grid=[entry],
        references=[],
        evaluation={"tasks": tasks, "probe_samples": 24, "efficiency": {"contexts": [64]}},
    )


def run_id(selector: str, teacher: str = "self", seed: int = 0) -> str:
    return f"base-{selector}-f0.25-mamba2-qkvo-kl-{teacher}-s{seed}"


def put_curve(root: Path, run: str, records: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps({"step": 0, "stage": 0, **record}) + "\n" for record in records)
    (root / "runs" / run / "curve.jsonl").write_text(text, encoding="utf-8")


def points(kls: list[float], scores: list[float], **more: Any) -> list[dict[str, Any]]:
    return [
        {"tokens": 1000 * index, "held_out_kl": kl, "probe": {"gsm_nano": score}, **more}
        for index, (kl, score) in enumerate(zip(kls, scores, strict=True))
    ]


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Uniform, one that is twice as fast, and one that starts better and never learns."""
    study = study_of()
    write_results(study, tmp_path)
    for teacher in ("self", "large"):
        put_curve(
            tmp_path,
            run_id("uniform", teacher),
            points([8, 4, 2, 1, 0.5], [0, 0.25, 0.5, 0.5, 0.75]),
        )
        put_curve(
            tmp_path, run_id("rad", teacher), points([8, 2, 0.5, 0.4, 0.3], [0, 0.5, 0.75, 1, 1])
        )
        put_curve(
            tmp_path, run_id("kl_guided", teacher), points([0.4, 0.4, 0.4, 0.4, 0.4], [0.1] * 5)
        )
    return collect(study, tmp_path)


def test_rows_say_when_and_how_much_sooner(results: Results) -> None:
    table = convergence(results)
    assert [panel.title.rsplit(" · ", 1)[1] for panel in table.panels] == [
        "teacher: self",
        "teacher: large",
    ]
    assert [(column.group, column.title) for column in table.panels[0].columns[1:]] == [
        ("held-out KL ≤ 0.500", "tokens"),
        ("held-out KL ≤ 0.500", "ratio"),
        ("gsm_nano ≥ 75.0 %", "tokens"),
        ("gsm_nano ≥ 75.0 %", "ratio"),
    ]
    rows = {row[0].text: row[1:] for row in table.panels[0].rows}
    assert [(entry.text, entry.interval) for entry in rows["uniform"]] == [
        ("4k", "[3k, 4k]"),
        ("1", ""),
        ("4k", "[3k, 4k]"),
        ("1", ""),
    ]
    assert [(entry.text, entry.interval) for entry in rows["rad"]] == [
        ("2k", "[1k, 2k]"),
        ("2.00×", "[1.50, 4.00]"),
    ] * 2
    assert [(entry.text, entry.interval) for entry in rows["kl_guided"]] == [
        ("before training", ""),
        ("–", ""),
        ("never", ""),
        ("–", ""),
    ]
    records = {
        (record["selector"], record["quantity"]): record
        for record in table.records
        if record["teacher"] == "self"
    }
    assert records["rad", "held-out KL"]["ratio"] == 2
    assert records["rad", "gsm_nano"]["target"] == 0.75
    lost = records["kl_guided", "gsm_nano"]
    assert (lost["reached"], lost["tokens"], lost["ratio"]) == ("never", None, None)
    assert lost["baseline_tokens"] == 4000
    assert "two logged points around the crossing" in table.caption
    assert "shares of 24 documents" in table.caption
    assert "2.00× [1.50, 4.00]" in markdown_text(table)


def test_kl_is_interpolated_in_its_logarithm_and_scores_are_not(results: Results) -> None:
    put_curve(results.root, run_id("rad"), points([8, 2, 0.25], [0.0, 0.25, 1.0]))
    tokens = {
        record["quantity"]: record["tokens"]
        for record in convergence(collect(results.study, results.root)).records
        if (record["selector"], record["teacher"]) == ("rad", "self")
    }
    # two of the three halvings from 2 to 0.25, and two thirds of the way to all right
    assert tokens == pytest.approx({"held-out KL": 1000 + 2000 / 3, "gsm_nano": 1000 + 2000 / 3})


def test_what_uniform_has_from_the_start_is_no_goal(results: Results) -> None:
    flat = points([8, 4, 2, 1, 0.5], [0.25, 0.5, 0.5, 0.5, 0.25])
    put_curve(results.root, run_id("uniform"), flat)
    table = convergence(collect(results.study, results.root))
    assert [len(panel.columns) for panel in table.panels] == [3, 5]
    records = {
        record["selector"]: record
        for record in table.records
        if (record["teacher"], record["quantity"]) == ("self", "gsm_nano")
    }
    assert records["uniform"]["reached"] == "before training"
    # rad gets there from below, but uniform took no tokens to compare with
    assert records["rad"]["tokens"] == 500
    assert records["rad"]["baseline_tokens"] is None
    assert records["rad"]["ratio"] is None
    put_curve(results.root, run_id("uniform"), points([0.5, 0.6], [0.25, 0.25]))
    table = convergence(collect(results.study, results.root))
    assert [panel.title.rsplit(" ", 1)[1] for panel in table.panels] == ["large"]


def test_a_first_point_that_is_not_the_start_is_named(results: Results) -> None:
    late = points([0.4, 0.4], [0.9, 0.9])
    put_curve(
        results.root, run_id("rad"), [{**point, "tokens": 500 + point["tokens"]} for point in late]
    )
    table = convergence(collect(results.study, results.root))
    row = next(row for row in table.panels[0].rows if row[0].text == "rad")
    assert {row[1].text, row[3].text} == {"before the first point"}


def test_seeds_and_documents_decide_the_interval(tmp_path: Path) -> None:
    study = study_of(teacher="self", seed=[0, 1])
    write_results(study, tmp_path)
    table = convergence(collect(study, tmp_path))
    assert {record["interval"] for record in table.records} == {"seeds"}
    assert {record["seeds"] for record in table.records} == {2}
    assert "range over seeds" in table.caption
    for run in study.run_table:
        path = tmp_path / "runs" / run / "curve.jsonl"
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for record in records:
            right = round(24 * record["probe"]["gsm_nano"])
            record["probe"]["gsm_nano"] = right / 24
            record["probe_documents"] = {"gsm_nano": "1" * right + "0" * (24 - right)}
        put_curve(tmp_path, run, records)
    table = convergence(collect(study, tmp_path))
    kinds = {record["quantity"]: record["interval"] for record in table.records}
    assert kinds == {"held-out KL": "seeds", "gsm_nano": "documents"}
    assert "Interval of gsm_nano: 95 % bootstrap" in table.caption
    assert "Interval of held-out KL: the range over seeds" in table.caption


@pytest.mark.parametrize("text", ["", "012", 5])
def test_damaged_answers_are_named(results: Results, text: Any) -> None:
    put_curve(results.root, run_id("rad"), points([1.0], [0.5], probe_documents={"gsm_nano": text}))
    with pytest.raises(ValueError, match=r"curve\.jsonl:1: probe_documents of gsm_nano is not"):
        collect(results.study, results.root)


# --- when there is something to compare -----------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 2),
        ({"budget": [{"fraction": 0.25}, {"layers": 4}]}, 4),
        ({"selector": ["rad", "kl_guided"]}, 0),
        ({"selector": "uniform"}, 0),
        ({"recipe": "none"}, 0),
        ({"view": "faithful"}, 0),
    ],
)
def test_a_race_needs_uniform_and_another_that_trains(
    changes: dict[str, Any], expected: int
) -> None:
    study = study_of(**changes)
    assert len(races(study)) == expected
    assert ("tables/convergence.csv" in outputs(study)["tables"]) == bool(expected)


# --- curves, old and new --------------------------------------------------------------------


def test_agreement_is_a_panel_where_it_was_logged(tmp_path: Path) -> None:
    study = study_of()
    write_results(study, tmp_path)
    found = collect(study, tmp_path)
    run = found.runs[run_id("rad")]
    assert all(point.agreement is not None for point in run.curve)
    with styled():
        figure = convergence_figures.convergence_kl(found, blocks(study)[0])
        figure.draw_without_rendering()
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert [label.split("\n")[0] for label in labels] == [
        *("held-out KL from the base", ""),
        *("same most likely token", ""),
    ]
    drawn = figure.axes[2].lines[1].get_ydata()
    assert list(drawn) == [100 * point.agreement for point in run.curve if point.agreement]
    # a selector each, and a guide at what uniform ends with
    assert [len(axes.lines) for axes in figure.axes] == [4, 4, 3, 3]
    ends = found.runs[run_id("uniform")].curve[-1].held_out_kl
    assert list(figure.axes[0].lines[-1].get_ydata()) == [ends, ends]


def test_curves_of_the_first_version_still_read(tmp_path: Path) -> None:
    study = study_of(teacher="self")
    write_results(study, tmp_path)
    added = ("losses", "layer_losses", "learning_rates", "held_out_agreement", "stage_name")
    for run in study.run_table:
        path = tmp_path / "runs" / run / "curve.jsonl"
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for record in records:
            for key in (*added, "model_flops_per_second"):
                del record[key]
        put_curve(tmp_path, run, records)
    found = collect(study, tmp_path)
    with styled():
        figure = convergence_figures.convergence_kl(found, blocks(study)[0])
    assert len(figure.axes) == 1
    build_report(study, tmp_path)
    assert (tmp_path / "tables" / "convergence.md").exists()


def test_speed_is_that_of_the_whole_run(tmp_path: Path) -> None:
    study = study_of(teacher="self", seed=[0, 1])
    write_results(study, tmp_path)
    for seed, (tokens, seconds) in enumerate(((1000, 1.0), (3000, 9.0))):
        path = tmp_path / "runs" / run_id("rad", seed=seed) / "training.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content |= {"tokens": tokens, "seconds": seconds, "tokens_per_second": 77.0}
        path.write_text(json.dumps(content), encoding="utf-8")
    found = collect(study, tmp_path)
    records = all_tables(found)["heldout"].records
    speeds = {record["selector"]: record["tokens_per_second"] for record in records}
    assert speeds["rad"] == pytest.approx(400)
    # the fixture's intervals differ: no point of the curve has the speed of the run
    path = tmp_path / "runs" / run_id("uniform") / "curve.jsonl"
    paces = [json.loads(line)["tokens_per_second"] for line in path.read_text().splitlines()]
    assert all(abs(pace / speeds["uniform"] - 1) > 0.1 for pace in paces)


def test_what_was_not_trained_has_no_speed(tmp_path: Path) -> None:
    study = study_of(teacher="self", recipe="none")
    write_results(study, tmp_path)
    records = all_tables(collect(study, tmp_path))["heldout"].records
    assert {record["tokens_per_second"] for record in records} == {None}
