"""Published numbers beside ours: which run a row stands for, what is measured, what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reporting_fixture as fixture

from rad.files import write_json, write_text
from rad.papers.compare import MEASURED, NOT_RUN, Comparison, Cost, compare, read_costs
from rad.papers.evidence import Findings, gather
from rad.papers.matching import base_of, rules
from rad.papers.published import numbers
from rad.papers.tables import compared_table
from rad.study import Study, load

CONFIG = Path(__file__).parents[1] / "config"
GSM, CRUX, MMLU = "gsm_zeroeval", "crux_zeroeval", "mmlu"
FAMILIES = {GSM: "gsm", CRUX: "crux", MMLU: "general"}


def rad_study() -> Study:
    """Llama-3.2-3B-Instruct: RAD with 20 of 28 layers, two seeds; even spacing with a teacher."""
    config = load([CONFIG / "nano.yaml"]).model_dump(mode="json", exclude_none=True)
    entry = {"recipe": "kl", "mixer": "mamba2", "initialisation": "qkvo"}
    return Study.from_config(
        {
            **config,
            "name": "paper",
            "models": {
                "base": {"source": "meta-llama/Llama-3.2-3B-Instruct"},
                "big": {"source": "somewhere/Llama-3.1-70B-Instruct"},
            },
            "alignment": None,
            "selectors": {"rad": {}, "even": {"method": "uniform"}},
            "grid": [
                {"view": "faithful", "selector": "rad", "budget": {"layers": 20}, "seed": [0, 1]}
                | entry,
                {"view": "faithful", "selector": "even", "budget": {"fraction": 0.5}}
                | entry
                | {"teacher": "big"},
            ],
            "references": ["base"],
            "evaluation": {"tasks": {name: {"kind": name} for name in FAMILIES}},
        }
    )


RUNS = [f"base-rad-l20-mamba2-qkvo-kl-self-s{seed}" for seed in (0, 1)]
EVEN = "base-even-f0.5-mamba2-qkvo-kl-big-s0"


def write_scores(folder: Path, right: dict[str, int], count: int = 200) -> None:
    lines, tasks = [], {}
    for task, correct in right.items():
        metric = "acc" if task == MMLU else "exact_match"
        tasks[task] = {"family": FAMILIES[task], "metric": metric, "task": task}
        for document in range(count):
            record = {"task": task, "family": FAMILIES[task], "doc_id": document, "metric": metric}
            lines.append(json.dumps({**record, "score": float(document < correct)}))
    write_text(folder / "samples.jsonl", "\n".join(lines) + "\n")
    write_json(folder / "evaluation.json", {"rad": {"tasks": tasks}})


def by_id(rows: list[Comparison]) -> dict[str, Comparison]:
    return {row.number.id: row for row in rows}


@pytest.fixture
def findings(tmp_path: Path) -> Findings:
    study = rad_study()
    for run, right in zip(RUNS, (130, 120), strict=True):
        write_json(tmp_path / "runs" / run / "spec.json", study.spec(run))
        write_scores(tmp_path / "runs" / run, {GSM: right, CRUX: 50, MMLU: 110})
    write_scores(tmp_path / "runs" / "model-base", {GSM: 112, CRUX: 52, MMLU: 120})
    return gather(study, tmp_path)


def test_measured_rows_have_our_value_and_interval(findings: Findings) -> None:
    rows = by_id(compare(findings))
    base = rows["rad.t2.base.gsm8k"]
    assert (base.status, base.run) == (MEASURED, "untouched base")
    assert base.ours is not None and base.ours.value == pytest.approx(56.0)
    assert base.ours.low < 56.25 < base.ours.high and base.inside
    student = rows["rad.t2.mamba2.gsm8k"]
    assert student.ours is not None and student.ours.value == pytest.approx(62.5)
    assert (student.ours.n, student.ours.seeds) == (200, 2)
    assert student.ours.seed_sd == pytest.approx(100 * np.std([0.65, 0.6], ddof=1))
    assert rows["rad.t1.mamba2.mmlu"].inside  # 55 beside 55.17
    assert rows["rad.t1.base.mmlu"].ours is not None


def test_rows_of_other_runs_are_not_run_and_say_why(findings: Findings) -> None:
    rows = by_id(compare(findings))
    assert rows["rad.t2.mamba.gsm8k"].status == NOT_RUN
    assert (
        "no run on Llama-3.2-3B-Instruct has this mixer Mamba" in rows["rad.t2.mamba.gsm8k"].reason
    )
    assert "budget 14/28 layers" in rows["rad.abstract.rad.gsm8k"].reason or (
        "teacher Llama-3.1-8B-Instruct" in rows["rad.abstract.rad.gsm8k"].reason
    )
    assert rows["rad.t1.base.winogrande"].reason == "no task of kind winogrande was scored"
    assert rows["rad.t1.base.truthfulqa"].reason.endswith("is not measured here")
    assert "no run has the base" in rows["mil.llama3_8b.mamba.16.gsm8k"].reason


def test_another_budget_or_state_is_another_model(tmp_path: Path) -> None:
    config = rad_study().model_dump(mode="json", exclude_none=True)
    for budget, fits in (({"layers": 20}, True), ({"layers": 21}, False), ({"heads": 480}, True)):
        grid = [{**config["grid"][0], "budget": budget}]
        rows = by_id(compare(gather(Study.from_config({**config, "grid": grid}), tmp_path)))
        assert bool(rows["rad.t2.mamba2.gsm8k"].run) == fits, budget


def test_a_run_to_come_has_its_cost(findings: Findings, tmp_path: Path) -> None:
    row = by_id(compare(findings))["rad.abstract.baseline.gsm8k"]
    assert row.reason == f"{EVEN} is not scored" and row.cost is None
    jobs = [
        {"stage": "selection", "name": EVEN, "gpu_hours": 99.0, "cost": 99.0},
        {"stage": "distil", "name": EVEN, "gpu_hours": 200.0, "cost": 500.0},
        {"stage": "evaluate", "name": EVEN, "gpu_hours": 3.5, "cost": 8.75},
        {"stage": "evaluate", "name": "model-base", "gpu_hours": 2.0, "cost": 5.0},
    ]
    write_json(tmp_path / "estimate.json", {"jobs": jobs})
    costs = read_costs(tmp_path / "estimate.json")
    row = by_id(compare(findings, costs))["rad.abstract.baseline.gsm8k"]
    assert row.cost is not None
    assert (row.cost.gpu_hours, row.cost.price) == (203.5, 508.75)
    # a task that the base was not scored on
    assert by_id(compare(findings, costs))["rad.t1.base.piqa"].cost == Cost(2.0, 5.0)
    table = compared_table(compare(findings, costs), "paper")
    texts = [[entry.text for entry in each] for panel in table.panels for each in panel.rows]
    assert any("204 GPU-h, 509 USD" in text for text in texts)
    assert set(table.records[0]) == set(table.fields)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "key 'jobs' is missing"),
        ({"jobs": [{"stage": "distil", "name": "x", "cost": 1}]}, "jobs.0: key 'gpu_hours'"),
        ({"jobs": [{"name": "x"}]}, "jobs.0: key 'stage'"),
    ],
)
def test_a_broken_estimate_names_the_key(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    write_json(tmp_path / "estimate.json", content)
    with pytest.raises(ValueError, match=r"estimate\.json") as error:
        read_costs(tmp_path / "estimate.json")
    assert message in str(error.value)


def test_only_numbers_of_the_methods_of_a_study(findings: Findings, tmp_path: Path) -> None:
    assert {row.number.method for row in compare(findings)} == {"rad"}
    nano = compare(gather(fixture.nano_study(), tmp_path / "nothing"))
    assert {row.number.id for row in nano} == {number.id for number in numbers()}
    # no base of the nano family was ever published on
    assert {row.status for row in nano} == {NOT_RUN}
    assert all(row.reason for row in nano)


def test_coverage_is_a_share_of_the_untouched_base(tmp_path: Path) -> None:
    config = rad_study().model_dump(mode="json", exclude_none=True)
    kinds = ("arc_challenge", "arc_easy", "piqa", "winogrande", "hellaswag", "openbookqa")
    study = Study.from_config(
        {
            **config,
            "models": {"base": {"source": "meta-llama/Llama-3.2-1B-Instruct"}},
            "mixers": {"state": {"type": "discrete_mamba2"}},
            "selectors": {"heads": {"method": "retrieval_aware"}},
            "grid": [
                {
                    **{"view": "faithful", "selector": "heads", "budget": {"heads": 10}},
                    **{"mixer": "state", "initialisation": "random", "recipe": "kl"},
                }
            ],
            "evaluation": {"tasks": {name: {"kind": name} for name in kinds}},
        }
    )
    (run,) = study.run_table
    for folder, right in ((run, 40), ("model-base", 50)):
        lines, tasks = [], {}
        for name in kinds:
            tasks[name] = {"family": "general", "metric": "acc", "task": name}
            for document in range(100):
                score = float(document < right)
                record = {"task": name, "family": "general", "doc_id": document, "score": score}
                metrics = {"acc": score, "acc_norm": score}
                lines.append(json.dumps({**record, "metric": "acc", "metrics": metrics}))
        write_text(tmp_path / "runs" / folder / "samples.jsonl", "\n".join(lines) + "\n")
        write_json(tmp_path / "runs" / folder / "evaluation.json", {"rad": {"tasks": tasks}})
    write_json(tmp_path / "runs" / run / "spec.json", study.spec(run))
    rows = by_id(compare(gather(study, tmp_path)))
    row = rows["ra.t1.llama.k10.cov_knowledge"]
    assert row.ours is not None and row.ours.value == pytest.approx(80.0)
    assert row.ours.low < 80.0 < row.ours.high
    # head dim 64 by default: the row with a state of 8 is another model
    assert rows["ra.t1.llama.k10.arc_easy"].status == MEASURED
    assert rows["ra.t2.retrieval_aware_k10_d8.128"].status == NOT_RUN


@pytest.mark.parametrize(
    ("config", "least"),
    [("rad_llama3.2_3b", 60), ("kl_guided_qwen2.5_3b", 15), ("retrieval_aware_llama3.2_1b", 300)],
)
def test_the_paper_studies_have_runs_for_the_published_rows(
    config: str, least: int, tmp_path: Path
) -> None:
    path = CONFIG / f"{config}.yaml"
    rows = compare(gather(load([path]), tmp_path))
    planned = {row.number.id for row in rows if row.run}
    assert len(planned) >= least
    if config == "rad_llama3.2_3b":
        assert {"rad.t2.mamba.gsm8k", "rad.t2.mamba2.crux", "rad.t2.longhorn.gsm8k"} <= planned
        assert {"rad.abstract.rad.gsm8k", "rad.abstract.baseline.gsm8k"} <= planned


def test_students_of_published_names_have_a_known_base() -> None:
    rule = rules().arms[0]
    shapes = rules().shapes
    for number in numbers():
        if number.model in rules().models:
            assert base_of(number, rule) in shapes
