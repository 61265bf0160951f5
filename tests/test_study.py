"""Studies: the grid, the identity of runs, and one clear line for every kind of bad input."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rad.preflight import check
from rad.schema import json_schema, key_table
from rad.study import Study, StudyError, load, merge

ROOT = Path(__file__).resolve().parent.parent
NANO = yaml.safe_load((ROOT / "config" / "nano.yaml").read_text(encoding="utf-8"))


def _changed(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(NANO)
    *parents, last = path.split(".")
    place: Any = config
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    place[last] = value
    return config


def test_the_default_study_has_all_methods_and_teachers() -> None:
    runs = Study.from_config(NANO).run_table.values()
    controlled = {(run.selector, run.teacher) for run in runs if "controlled" in run.views}
    selectors = {"uniform", "rad", "kl_guided", "retrieval_aware"}
    assert controlled == {(s, t) for s in selectors for t in ("self", "medium", "large")}
    assert (
        len(
            {
                (run.mixer, run.initialisation, run.recipe, run.budget.slug)
                for run in runs
                if "controlled" in run.views
            }
        )
        == 1
    )


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("grid.0.selector", ["uniforn"], "unknown selector 'uniforn'; known: uniform, rad"),
        ("grid.0.mixer", "mamba9", "unknown mixer 'mamba9'"),
        ("grid.0.recipe", "klx", "unknown recipe 'klx'"),
        ("grid.0.base", "tiny", "unknown model 'tiny'"),
        ("grid.0.teacher", ["huge"], "unknown model 'huge'"),
        ("references", ["huge"], "references: unknown model 'huge'"),
        ("selectors.rad.method", "bayes", "unknown method 'bayes'.*rule file"),
        ("selectors.kl_guided.mixer", "none", "unknown mixer 'none'"),
        ("evaluation.tasks.gsm_nano.kind", "gsm9", "evaluation.tasks.gsm_nano.kind"),
        (
            "recipes.kl.stages",
            [{"tokens": 1, "learning_rte": 1}],
            "learning_rte: unknown key; did you mean 'learning_rate'",
        ),
        ("corpora.distil.tokns", 5, "tokns: unknown key; did you mean 'tokens'"),
        ("grid.0.budget", {"layers": 1, "heads": 3}, "exactly one of layers, heads, fraction"),
        ("models.bad-name", {"source": "nano:base"}, "names use a-z"),
        ("grid.0.initialisation", "copy", "initialisation"),
    ],
)
def test_bad_input_is_one_line_that_names_the_key(path: str, value: Any, message: str) -> None:
    with pytest.raises(StudyError, match=message) as caught:
        Study.from_config(_changed(path, value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("models.base.source", "./nowhere", "models.base: .*no such folder"),
        ("models.base.source", "nano:huge", "nano has base, medium, large"),
        ("grid.0.budget", {"fraction": 0.3}, "not a whole number"),
        ("grid.0.budget", {"heads": 6}, "layer-wise selector needs a multiple of"),
        ("grid.0.budget", {"layers": 99}, "asks for"),
        (
            "corpora.distil",
            {"source": "text", "tokens": 10, "context": 64},
            "corpora.distil.files: source `text` needs",
        ),
        (
            "corpora.distil",
            {"source": "text", "tokens": 10, "context": 64, "files": ["no.txt"]},
            "corpora.distil.files: no such file: no.txt",
        ),
        (
            "evaluation.tasks.gsm_nano",
            {"kind": "gsm8k", "files": ["no.jsonl"]},
            "evaluation.tasks.gsm_nano.files: no such file: no.jsonl",
        ),
    ],
)
def test_faults_of_models_budgets_and_files_come_before_any_work(
    path: str, value: Any, message: str
) -> None:
    with pytest.raises(StudyError, match=message) as caught:
        check(Study.from_config(_changed(path, value)))
    assert "\n" not in str(caught.value)


def test_a_teacher_with_another_vocabulary_is_refused(tmp_path: Path) -> None:
    from rad.models.sources import resolve

    source = Path(str(resolve("nano:base")))
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for file in source.iterdir():
        (foreign / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((foreign / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(StudyError, match="'medium' has another vocabulary than base 'base'"):
        check(Study.from_config(_changed("models.medium.source", str(foreign))))


def test_a_rule_file_makes_a_method_known() -> None:
    config = _changed("selectors.mine", {"settings": {"k": 3}})
    with pytest.raises(StudyError, match="unknown method 'mine'"):
        Study.from_config(config)
    study = Study.from_config(config, external_selectors=["mine"])
    assert study.selector_settings["mine"].model_dump()["settings"] == {"k": 3}


def test_changing_one_run_changes_one_digest() -> None:
    before = Study.from_config(NANO)
    after = Study.from_config(_changed("recipes.mixers_only.log_points", 3))
    changed = [run for run in before.run_table if before.spec_digest(run) != after.spec_digest(run)]
    assert changed == [run for run in before.run_table if "-mixers_only-" in run]


def test_titles_do_not_change_what_is_trained() -> None:
    before = Study.from_config(NANO)
    after = Study.from_config(_changed("grid.1.label", "another title"))
    assert all(before.spec_digest(run) == after.spec_digest(run) for run in before.run_table)


def test_text_numbers_from_the_command_line_are_accepted() -> None:
    study = Study.from_config(_changed("evaluation.batch_size", "8"))
    assert study.evaluation.batch_size == 8


def test_overlays_merge_keys_and_replace_lists() -> None:
    merged = merge({"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"c": [3]}, "d": 2})
    assert merged == {"a": {"b": 1, "c": [3]}, "d": 2}


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"none\.yaml: cannot read"):
        load([tmp_path / "none.yaml"])
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(StudyError, match=r"bad\.yaml: not YAML"):
        load([tmp_path / "bad.yaml"])


def test_the_committed_schema_and_key_table_are_current() -> None:
    hint = "run: rad schema --schema workflow/schemas/study.schema.json --table docs/config.md"
    committed = json.loads((ROOT / "workflow" / "schemas" / "study.schema.json").read_text())
    assert committed == json.loads(json.dumps(json_schema())), hint
    assert (ROOT / "docs" / "config.md").read_text(encoding="utf-8") == key_table(), hint
