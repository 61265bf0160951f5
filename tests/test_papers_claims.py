"""The claims and their ledger, on results whose truth is known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reporting_fixture as fixture
from matplotlib.figure import Figure

from rad import cli
from rad.commands import papers
from rad.files import write_json, write_text
from rad.papers.claims import Claim, Claims, claims, comparisons
from rad.papers.data import parse, shipped
from rad.papers.evidence import Findings, gather
from rad.papers.figures import forest
from rad.papers.ledger import (
    INCONCLUSIVE,
    NOT_RUN,
    NOT_SUPPORTED,
    SUPPORTED,
    Entry,
    judge,
    ledger,
    where,
)
from rad.papers.tables import claims_table, ledger_json, write_claims
from rad.study import Study, load

CONFIG = Path(__file__).parents[1] / "config"
SHAPES = {"base": (8, 128), "medium": (10, 160), "large": (12, 192)}
DOCUMENTS = 60


def seeds_study(count: int = 5, **changes: Any) -> Study:
    """The five-seed study, with fewer seeds where wanted."""
    config = load([CONFIG / "nano.yaml", CONFIG / "seeds.yaml"]).model_dump(
        mode="json", exclude_none=True
    )
    for entry in config["grid"]:
        entry["seed"] = list(range(count))
    return Study.from_config({**config, **changes})


Skill = Callable[[str, int], float]  # run or model, seed -> share of right answers
KL = Callable[[str, int], float]


def write(study: Study, root: Path, skill: Skill, kl: KL = lambda name, seed: 0.5) -> Findings:
    """Results with known truth: documents have a difficulty that all models share."""
    difficulty = np.random.default_rng(1).random(DOCUMENTS)
    for identity, cell in study.run_table.items():
        folder = root / "runs" / identity
        write_json(folder / "spec.json", study.spec(identity))
        fixture._placement(cell).save(folder / "placement.json")
        final = kl(identity, cell.seed)
        points = [
            {"step": step, "tokens": 1000 * step, "held_out_kl": final + 2.0 * (5 - step) / 5}
            for step in range(6)
        ]
        write_text(folder / "curve.jsonl", "".join(json.dumps(each) + "\n" for each in points))
        write_json(folder / "training.json", {"tokens": 5000})
        _scores(folder, skill(identity, cell.seed), difficulty)
        kept = 64 if "discrete_small" in identity else 256
        heads = 16 if "f0.5" in identity else 3
        fixture._write_efficiency(study, folder, heads, kept, 800_000)
    for name in study.references:
        folder = root / "runs" / f"model-{name}"
        _scores(folder, skill(f"model-{name}", 0), difficulty)
        fixture._write_efficiency(study, folder, 16, 0, 100_000 * SHAPES[name][1])
    for name, (layers, width) in SHAPES.items():
        shape = {"layers": layers, "heads": 4, "kv_heads": 2, "head_dim": 32}
        write_json(root / "models" / name / "source.json", {**shape, "hidden_size": width})
    return gather(study, root)


def _scores(folder: Path, skill: float, difficulty: np.ndarray) -> None:
    lines, tasks = [], {}
    for task, family in (
        ("gsm_nano", "gsm"),
        ("crux_nano", "crux"),
        ("ruler_nano_single_64", "ruler"),
    ):
        tasks[task] = {"family": family, "metric": "exact_match", "task": task}
        for document in range(DOCUMENTS):
            record = {"task": task, "family": family, "doc_id": document, "metric": "exact_match"}
            lines.append(json.dumps({**record, "score": float(difficulty[document] < skill)}))
    write_text(folder / "samples.jsonl", "\n".join(lines) + "\n")
    write_json(folder / "evaluation.json", {"rad": {"tasks": tasks}})


def claim(name: str) -> Claim:
    return next(each for each in claims() if each.id == name)


def verdicts(findings: Findings) -> dict[str, Entry]:
    return {entry.claim.id: entry for entry in ledger(findings)}


def as_claimed(name: str, seed: int) -> float:
    """What the papers say, in numbers; seeds differ a little."""
    skill = 0.5
    if name.startswith("model-"):
        return 0.85
    if "-l0-" in name:
        skill = 0.2 if "discrete_small" in name else 0.45
    elif "-h3-" in name:
        skill = 0.88
    elif "mixers_only" in name:
        skill = 0.95
    elif "base-retrieval_aware" in name:
        skill = 0.7
    elif "base-rad" in name or "base-kl_guided" in name:
        skill = 0.7 + (0.1 if "-medium-" in name else 0.0) + (0.1 if "f0.5" in name else 0.0)
    elif "-large-" in name:
        skill = 0.6
    return skill + 0.01 * (seed - 2)


def faster(name: str, seed: int) -> float:
    if "-rad-f0.25" in name:
        return -1.0 + 0.02 * seed
    if "-l0-" in name:
        return 1.5 if "discrete_small" in name else 0.9
    return (0.5 if "-h3-" not in name else 0.4) + 0.01 * seed


def test_every_claim_holds_where_the_papers_are_right(tmp_path: Path) -> None:
    found = verdicts(write(seeds_study(), tmp_path, as_claimed, faster))
    tested = {name: entry.verdict for name, entry in found.items() if entry.verdict != NOT_RUN}
    absent = [name for name, entry in found.items() if entry.verdict == NOT_RUN]
    wrong = {name for name, verdict in tested.items() if verdict != SUPPORTED}
    # what no run can change, and what follows from the sizes of the made-up caches
    assert wrong <= {"retrieval_aware.memory_by_formula", "retrieval_aware.memory_measured"}
    assert len(tested) >= 16
    assert "halo.beats_kl_guided" in absent and "rad.self_distilled_general" in absent
    for name in absent:
        assert all(each.note for each in found[name].findings)


def test_every_claim_fails_where_all_models_are_the_other_way(tmp_path: Path) -> None:
    found = verdicts(
        write(
            seeds_study(6),
            tmp_path,
            lambda n, s: 1.0 - as_claimed(n, s),
            lambda n, s: -faster(n, s),
        )
    )
    for name in (
        "rad.self_distilled_maths",
        "rad.smaller_teacher_maths",
        "rad.converges_faster",
        "kl_guided.beats_even_spacing",
        "kl_guided.beats_smart",
        "retrieval_aware.heads_are_needed",
        "retrieval_aware.state_matters_without_heads",
        "retrieval_aware.state_matters_without_heads_kl",
    ):
        assert found[name].verdict == NOT_SUPPORTED, name


def test_noise_is_inconclusive(tmp_path: Path) -> None:
    def noisy(name: str, seed: int) -> float:
        """Better in one seed, worse in the next."""
        return 0.5 + (0.15 if "rad" in name else -0.15) * (-1) ** seed

    found = verdicts(write(seeds_study(), tmp_path, noisy))
    entry = found["rad.beats_even_spacing"]
    assert entry.verdict == INCONCLUSIVE
    effect = entry.findings[0].effect
    assert effect is not None and effect.low < 0 < effect.high
    assert (effect.seeds, effect.documents) == (5, DOCUMENTS)


def test_effects_are_the_differences_of_means(tmp_path: Path) -> None:
    findings = write(seeds_study(), tmp_path, as_claimed)
    entry = judge(claim("kl_guided.beats_even_spacing"), findings)
    assert [each.where for each in entry.findings] == [
        "kl_guided against uniform (25 % of heads, mamba2, aligned)",
        "kl_guided against uniform (50 % of heads, mamba2, aligned)",
    ]
    difficulty = np.random.default_rng(1).random(DOCUMENTS)

    def mean(name: str) -> float:
        return float(np.mean([(difficulty < as_claimed(name, s)).mean() for s in range(5)]))

    effect = entry.findings[0].effect
    assert effect is not None
    assert effect.value == pytest.approx(mean("base-kl_guided-f0.25") - mean("base-uniform-f0.25"))


def test_one_seed_is_said_and_documents_decide(tmp_path: Path) -> None:
    found = verdicts(write(seeds_study(1), tmp_path, as_claimed, faster))
    entry = found["rad.beats_even_spacing"]
    assert entry.findings[0].note == "one seed"
    assert entry.findings[0].effect is not None
    assert entry.findings[0].effect.basis == "documents, one seed"
    # without documents there is nothing to take an interval from
    assert found["rad.converges_faster"].verdict == INCONCLUSIVE
    assert found["retrieval_aware.state_matters_without_heads_kl"].verdict == INCONCLUSIVE


def test_the_same_students_are_an_exact_tie(tmp_path: Path) -> None:
    study = seeds_study()
    write(study, tmp_path, lambda name, seed: 0.6)
    for path in tmp_path.glob("runs/base-kl_guided-f0.25-*/placement.json"):
        other = str(path).replace("kl_guided", "uniform")
        content = json.loads(Path(other).read_text(encoding="utf-8"))
        write_json(path, {**content, "selector": "kl_guided"})
    entry = judge(claim("kl_guided.beats_even_spacing"), gather(study, tmp_path))
    same, apart = entry.findings
    assert same.verdict == NOT_SUPPORTED and "same students" in same.note
    assert same.effect is not None and same.effect.low == same.effect.high == 0
    # other students with the same answers: nothing is known
    assert apart.verdict == INCONCLUSIVE
    assert entry.verdict == NOT_SUPPORTED


def test_missing_results_are_named(tmp_path: Path) -> None:
    study = seeds_study()
    assert {
        entry.verdict for entry in ledger(gather(study, tmp_path)) if entry.claim.test.arms
    } == {NOT_RUN}
    write(study, tmp_path, as_claimed, faster)
    (tmp_path / "runs" / "base-rad-f0.25-mamba2-aligned-kl-self-s3" / "evaluation.json").unlink()
    found = verdicts(gather(study, tmp_path))
    assert found["rad.beats_even_spacing"].verdict == NOT_RUN
    assert found["rad.beats_even_spacing"].findings[0].note.endswith("self-s3 is not scored")
    # curves are there all the same
    assert found["rad.converges_faster"].verdict == SUPPORTED
    assert found["retrieval_aware.beats_random_heads"].findings[0].note == (
        "no run of the study is the second arm: random"
    )


def test_a_run_of_another_configuration_is_refused(tmp_path: Path) -> None:
    study = seeds_study()
    write(study, tmp_path, as_claimed)
    path = tmp_path / "runs" / "base-rad-f0.25-mamba2-aligned-kl-self-s0" / "spec.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**spec, "seed": 17})
    with pytest.raises(ValueError, match="made from another configuration"):
        gather(study, tmp_path)


def test_other_documents_are_refused(tmp_path: Path) -> None:
    study = seeds_study(1)
    write(study, tmp_path, as_claimed)
    path = tmp_path / "runs" / "model-large" / "samples.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    write_text(path, "\n".join(lines[1:]) + "\n")
    with pytest.raises(ValueError, match="documents of gsm_nano differ from those of base-"):
        gather(study, tmp_path)


def test_before_training_counts_as_infinitely_faster(tmp_path: Path) -> None:
    def at_once(name: str, seed: int) -> float:
        return -5.0 if "-rad-f0.25" in name else 0.5

    # the range of five seeds is no 95 % interval
    few = verdicts(write(seeds_study(5), tmp_path / "5", as_claimed, at_once))
    assert few["rad.converges_twice_as_fast"].verdict == INCONCLUSIVE
    found = verdicts(write(seeds_study(6), tmp_path / "6", as_claimed, at_once))
    entry = found["rad.converges_twice_as_fast"]
    assert entry.verdict == SUPPORTED
    assert entry.findings[0].effect is not None and math.isinf(entry.findings[0].effect.value)
    text = json.dumps(ledger_json(list(found.values()), "s"), allow_nan=False)
    assert '"effect": "inf"' in text


def test_teachers_are_ordered_by_size(tmp_path: Path) -> None:
    findings = write(seeds_study(), tmp_path, as_claimed)
    found = list(comparisons(findings, claim("rad.smaller_teacher_maths").test))
    assert [where(each) for each in found] == [
        "rad, medium teacher against uniform, large teacher (25 % of heads, mamba2, aligned)"
    ]


def test_holm_over_the_claims(tmp_path: Path) -> None:
    entries = ledger(write(seeds_study(), tmp_path, as_claimed, faster))
    tested = [entry for entry in entries if entry.p is not None]
    assert len(tested) >= 14
    for entry in tested:
        assert entry.p is not None and entry.p_adjusted is not None
        assert entry.p <= entry.p_adjusted <= 1.0
    smallest = min(tested, key=lambda entry: entry.p or 0.0)
    assert smallest.p_adjusted == pytest.approx(min(1.0, len(tested) * (smallest.p or 0.0)))


def test_shipped_claims_are_well_formed() -> None:
    found = claims()
    assert len(found) >= 20
    assert {each.paper for each in found} >= {"rad", "kl_guided", "retrieval_aware"}
    for each in found:
        assert each.published.text and each.says[0].isupper()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "- id: rad.self_distilled_code",
            "- id: rad.self_distilled_maths",
            "this id is there twice",
        ),
        ("rad.t2.base.gsm8k, ", "rad.t2.base.gsm, ", "no published number 'rad.t2.base.gsm'"),
        ("effect: difference", "effect: interaction", "interaction needs kept, kept_small"),
        ("families: [gsm, gsm8k]", "families: []", "families: go with kind score"),
        ("arms: [first, second], f", "arms: [first, third], f", "unknown arm 'third'"),
    ],
)
def test_faults_of_claims_name_the_key(old: str, new: str, message: str) -> None:
    text = shipped("claims.yaml")
    assert old in text
    with pytest.raises(ValueError, match=r"claims\.yaml: ") as error:
        parse(Claims, text.replace(old, new, 1), "claims.yaml")
    assert message in str(error.value)


def test_tables_and_figure(tmp_path: Path) -> None:
    entries = ledger(write(seeds_study(2), tmp_path, as_claimed, faster))
    table = claims_table(entries, "nano-seeds")
    assert set(table.records[0]) == set(table.fields)
    assert sum(len(panel.rows) for panel in table.panels) == len(table.records)
    write_claims(entries, "nano-seeds", tmp_path / "tables")
    text = (tmp_path / "tables" / "claims.md").read_text(encoding="utf-8")
    assert "| supported |" in text and "not run" in text and "| nan" not in text
    content = json.loads((tmp_path / "tables" / "claims.json").read_text(encoding="utf-8"))
    assert sum(content["verdicts"].values()) == len(claims())
    figure = forest(entries, "nano-seeds")
    assert isinstance(figure, Figure)
    labels = [tick.get_text() for axes in figure.axes for tick in axes.get_yticklabels()]
    drawn = [each for entry in entries for each in entry.findings if each.effect is not None]
    assert len(labels) == len(drawn)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [SUPPORTED, NOT_SUPPORTED, INCONCLUSIVE, "claimed: above", "published"]


def test_the_figure_of_a_study_without_results(tmp_path: Path) -> None:
    entries = ledger(gather(seeds_study(), tmp_path))
    assert len(forest(entries, "nano-seeds").axes) == 1  # the formula needs no run


def test_the_verb_writes_both_comparisons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.VERBS, "papers", papers.VERBS["papers"])
    study = seeds_study(2)
    write(study, tmp_path, as_claimed, faster)
    write_json(tmp_path / "study.json", study.model_dump(mode="json", exclude_none=True))
    files = ["--study", str(tmp_path / "study.json"), "--root", str(tmp_path)]
    for what in ("claims", "compare"):
        assert cli.main(["papers", what, *files]) == 0
    assert "supported       rad.self_distilled_maths" in capsys.readouterr().out
    for name in ("claims.csv", "claims.json", "paper_vs_measured.csv", "paper_vs_measured.md"):
        assert (tmp_path / "tables" / name).stat().st_size > 1000
    assert (tmp_path / "figures" / "claims.svg").is_file()
    assert cli.main(["papers", "claims"]) == 2
    assert "name the study by its YAML files, or by --study" in capsys.readouterr().err
