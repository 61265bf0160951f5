"""Reading results, and the tables made of them, on a made-up results tree."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reporting_fixture import nano_study, write_results

from rad.reporting import outputs
from rad.reporting.collect import Results, collect
from rad.reporting.describe import kept_text
from rad.reporting.scores import families
from rad.reporting.tables import all_tables, write_tables
from rad.reporting.writers import Table, markdown_text
from rad.study import Study


def small_tasks(**tasks: dict[str, Any]) -> dict[str, Any]:
    """An evaluation of a few documents, so that a tree is written in no time."""
    default = {
        "gsm_nano": {"kind": "gsm_nano", "samples": 40},
        "ruler_nano": {"kind": "ruler_nano", "samples": 15, "lengths": [64, 96]},
    }
    return {"tasks": tasks or default, "efficiency": {"contexts": [64, 256]}}


@pytest.fixture(scope="module")
def study() -> Study:
    return nano_study(evaluation=small_tasks())


@pytest.fixture(scope="module")
def tree(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results") / "nano"
    write_results(study, root)
    return root


@pytest.fixture(scope="module")
def results(study: Study, tree: Path) -> Results:
    return collect(study, tree)


@pytest.fixture(scope="module")
def tables(results: Results) -> dict[str, Table]:
    return all_tables(results)


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


# --- reading --------------------------------------------------------------------------------


def test_everything_is_read(results: Results, study: Study) -> None:
    assert list(results.runs) == list(study.run_table)
    assert list(results.references) == ["base", "medium", "large"]
    assert [family.name for family in families(results)] == ["gsm", "ruler"]
    assert len(families(results)[1].tasks) == 8
    stages = {stage.stage: stage for stage in results.stages}
    assert stages["select"].jobs == 4
    assert stages["select"].seconds == pytest.approx(25 + 26 + 27 + 28)
    untrained = next(run for run in results.runs if "sliding_window" in run)
    assert len(results.runs[untrained].curve) == 1


@pytest.mark.parametrize(
    "name",
    [
        "spec.json",
        "placement.json",
        "curve.jsonl",
        "training.json",
        "evaluation.json",
        "samples.jsonl",
        "efficiency.json",
    ],
)
def test_a_missing_file_is_named(study: Study, tree: Path, tmp_path: Path, name: str) -> None:
    root = tmp_path / "nano"
    shutil.copytree(tree, root)
    folder = root / "runs" / next(iter(study.run_table))
    (folder / name).unlink()
    with pytest.raises(ValueError, match="no such file") as caught:
        collect(study, root)
    assert str(folder / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def damage_line(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], '{"task": ', *lines[2:]]), encoding="utf-8")


def drop_document(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[1:]), encoding="utf-8")


def repeat_document(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([lines[0], *lines]), encoding="utf-8")


def drop_score(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    record = json.loads(lines[0])
    del record["score"]
    path.write_text("\n".join([json.dumps(record), *lines[1:]]), encoding="utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_line, "samples.jsonl:2: not JSON"),
        (drop_document, "samples.jsonl: documents of gsm_nano differ from those of"),
        (repeat_document, "samples.jsonl:2: document 0 of gsm_nano appears twice"),
        (drop_score, "samples.jsonl:1: key 'score' is missing"),
    ],
)
def test_damaged_samples_are_named(
    study: Study, tree: Path, tmp_path: Path, damage: Any, message: str
) -> None:
    root = tmp_path / "nano"
    shutil.copytree(tree, root)
    damage(root / "runs" / list(study.run_table)[1] / "samples.jsonl")
    with pytest.raises(ValueError, match=message):
        collect(study, root)


def test_a_run_of_another_configuration_is_refused(study: Study, tree: Path) -> None:
    recipes = study.model_dump(mode="json", exclude_none=True)["recipes"]
    recipes["kl"]["stages"][0]["learning_rate"] = 0.5
    other = nano_study(evaluation=small_tasks(), recipes=recipes)
    with pytest.raises(ValueError, match=r"spec\.json: this run was made from another config"):
        collect(other, tree)


def test_placements_are_written_compactly(results: Results) -> None:
    kept = {
        (result.run.selector, result.run.budget.slug): kept_text(result.placement)
        for result in results.runs.values()
        if result.run is not None and result.placement is not None
    }
    assert kept["uniform", "l0"] == "none"
    assert kept["kl_guided", "f0.25"] == "L3-L4: all"
    assert kept["rad", "f0.75"] == "L0-L1: all; L4-L7: all"
    assert kept["retrieval_aware", "f0.25"].startswith("L2: 2; L3: 1")


# --- tables ---------------------------------------------------------------------------------


def test_controlled_values_are_means_of_documents(
    results: Results, tables: dict[str, Table]
) -> None:
    table = tables["controlled"]
    assert {record["view"] for record in table.records} == {"controlled"}
    assert len(table.records) == 4 * 3 * 2
    record = next(
        record
        for record in table.records
        if (record["selector"], record["teacher"], record["family"]) == ("rad", "large", "ruler")
    )
    run = "base-rad-f0.25-mamba2-aligned-kl-large-s0"
    other = run.replace("-rad-", "-uniform-")
    means = {
        name: np.mean(
            [
                np.mean(list(documents.values()))
                for task, documents in results.runs[name].scores.items()
                if task.startswith("ruler")
            ]
        )
        for name in (run, other)
    }
    assert record["value"] == pytest.approx(means[run])
    assert record["low"] < record["value"] < record["high"]
    assert record["difference"] == pytest.approx(means[run] - means[other])
    uniform = [record for record in table.records if record["selector"] == "uniform"]
    assert all(record["difference"] is None for record in uniform)


def test_the_best_of_each_column_is_bold(results: Results, tables: dict[str, Table]) -> None:
    table = tables["controlled"]
    panel = table.panels[0]
    assert [column.title for column in panel.columns[:3]] == [
        "selector",
        "softmax heads",
        "KV/token",
    ]
    for column in range(3, len(panel.columns)):
        entries = [row[column] for row in panel.rows]
        highest = max(float(entry.text) for entry in entries)
        assert [entry.best for entry in entries] == [
            float(entry.text) == highest for entry in entries
        ]


def test_views_are_not_mixed(results: Results, study: Study, tables: dict[str, Table]) -> None:
    views_of = {
        name: {record["view"] for record in tables[name].records}
        for name in ("controlled", "tasks", "teachers", "faithful")
    }
    assert views_of.pop("faithful") == {"faithful"}
    assert set(map(frozenset, views_of.values())) == {frozenset({"controlled"})}
    faithful = {entry.label for entry in study.grid if entry.view == "faithful"}
    assert faithful >= {"RAD self-distillation", "uniform + QKVO + large teacher"}
    for name, table in tables.items():
        for panel in table.panels:
            titles = {row[0].text for row in panel.rows}
            assert titles <= faithful or not titles & faithful, name


def test_teachers_compare_with_self(results: Results, tables: dict[str, Table]) -> None:
    records = tables["teachers"].records
    for record in records:
        assert (record["difference"] is None) == (record["teacher"] == "self")


def test_tidy_scores_follow_the_contract(results: Results, study: Study, tmp_path: Path) -> None:
    write_tables(results, tmp_path)
    rows = rows_of(tmp_path / "scores.csv")
    contract = """run view base selector budget mixer initialisation recipe teacher seed task
        family metric value low high n reference difference difference_low difference_high p
        missing"""
    assert list(rows[0]) == contract.split()
    assert len(rows) == (sum(len(run.views) for run in study.run_table.values()) + 3) * 9
    assert {row["view"] for row in rows} == {"controlled", "faithful", "reference"}
    with_difference = {row["selector"] for row in rows if row["difference"]}
    assert with_difference == {"rad", "kl_guided", "retrieval_aware"}
    families_rows = rows_of(tmp_path / "families.csv")
    assert {row["task"] for row in families_rows} == {"gsm_nano", "mean"}


def test_selection_table_is_golden(results: Results, tables: dict[str, Table]) -> None:
    text = markdown_text(tables["selection"])
    assert (
        "| base | kl\\_guided | 25 % of heads | L3-L4: all | 8 of 32 | 4 | 1 KiB | 480k | 320k "
        "| 1.77 T | 81.2 s | 470 |" in text
    )
    assert (
        "| base | uniform | 0 layers | none | 0 of 32 | 0 | 0 B | 0 | 0 | 0 | 0.0 s | 0 |" in text
    )


def test_written_files_are_those_announced(results: Results, study: Study, tmp_path: Path) -> None:
    write_tables(results, tmp_path / "tables")
    written = {f"tables/{path.name}" for path in (tmp_path / "tables").iterdir()}
    assert written == set(outputs(study)["tables"])


# --- other studies --------------------------------------------------------------------------


def tables_of(study: Study, root: Path) -> dict[str, Table]:
    write_results(study, root)
    return all_tables(collect(study, root))


def test_seeds_are_pooled(tmp_path: Path) -> None:
    grid = [
        {
            "view": "controlled",
            "selector": ["uniform", "rad"],
            "budget": {"fraction": 0.25},
            "recipe": "kl",
            "seed": [0, 1, 2],
        }
    ]
    study = nano_study(evaluation=small_tasks(), grid=grid, references=[])
    tables = tables_of(study, tmp_path)
    names = {"controlled", "tasks", "teachers", "selection", "heldout", "efficiency"}
    assert set(tables) == names | {"convergence", "controls", "ruler", "speed"}
    assert {record["seeds"] for record in tables["controlled"].records} == {3}
    assert "3 seeds: the interval covers documents and seeds" in tables["controlled"].caption
    assert all(record["n"] in (40, 120) for record in tables["controlled"].records)


def test_budgets_are_kept_apart(tmp_path: Path) -> None:
    grid = [
        {
            "view": "controlled",
            "selector": ["uniform", "rad"],
            "budget": [{"fraction": 0.25}, {"layers": 4}],
            "recipe": "kl",
        }
    ]
    study = nano_study(evaluation=small_tasks(), grid=grid, references=["base"])
    tables = tables_of(study, tmp_path)
    assert [panel.title.split(" · ")[1] for panel in tables["controlled"].panels] == [
        "kept: 25 % of heads",
        "kept: 4 layers",
    ]
    figures = outputs(study)["figures"]
    assert "figures/convergence_kl-f0.25.svg" in figures
    assert "figures/convergence_kl-l4.svg" in figures


def test_perplexity_is_the_exponential_and_lower_wins(tmp_path: Path) -> None:
    books = {"kind": "perplexity", "samples": 30}
    grid = [
        {
            "view": "controlled",
            "selector": ["uniform", "kl_guided"],
            "budget": {"layers": 2},
            "recipe": "kl",
        }
    ]
    study = nano_study(evaluation=small_tasks(books=books), grid=grid, references=[])
    tables = tables_of(study, tmp_path)
    results = collect(study, tmp_path)
    records = {record["selector"]: record for record in tables["controlled"].records}
    run = "base-kl_guided-l2-mamba2-qkvo-kl-self-s0"
    result = results.runs[run]
    tokens = list(result.weights["books"].values())
    mean = np.average(list(result.scores["books"].values()), weights=tokens)
    assert records["kl_guided"]["metric"] == "perplexity"
    assert records["kl_guided"]["value"] == pytest.approx(np.exp(mean))
    assert records["kl_guided"]["value"] < records["uniform"]["value"]
    assert (records["kl_guided"]["best"], records["uniform"]["best"]) == (1, 0)
    row = next(row for row in tables["controlled"].panels[0].rows if row[0].text == "kl_guided")
    assert row[3].verdict == "better"
    assert row[3].difference.startswith("\u2212")


def test_a_study_without_runs_or_controlled_view(tmp_path: Path) -> None:
    study = nano_study(evaluation=small_tasks(), grid=[], references=["base"])
    tables = tables_of(study, tmp_path)
    assert set(tables) == {"references", "controls", "ruler", "efficiency", "speed"}
    assert {Path(file).stem for file in outputs(study)["figures"]} == {"speed"}
