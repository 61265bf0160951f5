"""The studies at paper scale: sources of every value, dry runs, budgets, what is held equal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rad.estimate.jobs import Hardware
from rad.estimate.study import Estimate
from rad.placement import Placement
from rad.preflight import HEAD_WISE
from rad.selection.base import SelectionContext
from rad.selection.preset import select as preset
from rad.selection.random import select as random
from rad.selection.uniform import select as uniform
from rad.settings import NEEDS, SELECTOR_SETTINGS
from rad.study import Run, Study, load

ROOT = Path(__file__).resolve().parent.parent
# study, then its overlays -> runs; written down so that a lost arm is noticed
COMBINATIONS = {
    "rad_llama3.2_3b": 49,
    "rad_llama3.2_3b first_day_rad": 7,
    "kl_guided_qwen2.5_3b": 90,
    "kl_guided_qwen2.5_3b first_day_kl_guided": 4,
    "kl_guided_qwen2.5_3b kl_guided_qwen2.5_1.5b": 37,
    "kl_guided_qwen2.5_3b kl_guided_qwen2.5_1.5b first_day_kl_guided": 4,
    "kl_guided_qwen2.5_3b kl_guided_qwen2.5_7b": 27,
    "kl_guided_qwen2.5_3b kl_guided_qwen2.5_7b first_day_kl_guided": 4,
    "kl_guided_qwen2.5_3b kl_guided_llama3.2_3b": 91,
    "kl_guided_qwen2.5_3b kl_guided_llama3.2_3b first_day_kl_guided": 4,
    "retrieval_aware_llama3.2_1b": 51,
    "retrieval_aware_llama3.2_1b first_day_retrieval_aware": 5,
    "retrieval_aware_llama3.2_1b retrieval_aware_qwen2.5_1.5b": 13,
    "retrieval_aware_llama3.2_1b retrieval_aware_qwen2.5_1.5b first_day_retrieval_aware": 5,
    "controlled_8b": 60,
    "controlled_8b first_day_controlled": 4,
}
FILES = sorted({name for names in COMBINATIONS for name in names.split()})
SHAPES = {  # layers, heads, kv heads, head dim
    "meta-llama/Llama-3.2-1B-Instruct": (16, 32, 8, 64),
    "meta-llama/Llama-3.2-3B-Instruct": (28, 24, 8, 128),
    "meta-llama/Llama-3.1-8B-Instruct": (32, 32, 8, 128),
    "Qwen/Qwen2.5-1.5B-Instruct": (28, 12, 2, 128),
    "Qwen/Qwen2.5-3B-Instruct": (36, 16, 2, 128),
    "Qwen/Qwen2.5-7B-Instruct": (28, 28, 4, 128),
}
MARKERS = ("paper", "code", "hub", "default")
TITLES = ("name", "title", "variant")  # keys that are no setting of anything
GPUS = 8  # of the node that the micro-batches are cut for


def _study(names: str) -> Study:
    return load([ROOT / "config" / f"{name}.yaml" for name in names.split()])


@pytest.fixture(scope="module")
def studies() -> dict[str, Study]:
    """All studies, with and without their overlays."""
    return {names: _study(names) for names in COMBINATIONS}


def _values(text: str) -> Iterator[tuple[int, str, str]]:
    """Number, content and comment of every line that gives a value."""
    for number, line in enumerate(text.split("\n"), 1):
        content, _, comment = line.partition(" #")
        content = content.strip()
        # a comment, or a key (perhaps with an anchor) whose values are on the lines below
        if not content or content.startswith("#") or re.fullmatch(r"[\w.]+:( &\w+)?", content):
            continue
        yield number, content, comment


@pytest.mark.parametrize("name", FILES)
def test_every_value_names_its_source(name: str) -> None:
    text = (ROOT / "config" / f"{name}.yaml").read_text(encoding="utf-8")
    head = text[: text.index("\nname:" if "\nname:" in text else "\nvariant:")]
    markers = [marker for marker in MARKERS if re.search(rf"^#.*\b{marker}\b", head, re.MULTILINE)]
    assert markers, "the head of the file says what the sources are called"
    found = list(_values(text))
    assert len(found) > 10
    for number, content, comment in found:
        key = content.removeprefix("- ").partition(":")[0]
        if key in TITLES and (number < 30 or content.startswith("- name:")):
            continue
        said = re.findall(rf"\b({'|'.join(markers)})\b", comment)
        assert said, f"{name}.yaml line {number}: {content} has no source"


def test_a_value_without_a_source_is_noticed() -> None:
    text = "a:\n  b: 1  # code: there\n  c: 2\n  - {d: 3}\n  e: &x\n# f: 4\n"
    bare = [content for _, content, comment in _values(text) if not comment]
    assert bare == ["c: 2", "- {d: 3}"]


@pytest.mark.parametrize("names", COMBINATIONS)
def test_number_of_runs(names: str, studies: dict[str, Study]) -> None:
    assert len(studies[names].run_table) == COMBINATIONS[names]


def test_results_of_no_two_studies_share_a_folder(studies: dict[str, Study]) -> None:
    folders = [study.folder for study in studies.values()]
    assert len(set(folders)) == len(folders)


# --- dry runs -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """Study -> rule -> jobs, planned without network, without data and without models."""
    folder = tmp_path_factory.mktemp("plans")
    arguments = [",".join(f"{name}.yaml" for name in names.split()) for names in COMBINATIONS]
    # these variables would rightly refuse studies whose data are not on this machine
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "dry_run_driver.py"), str(folder), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    parts = re.split(r"^=== (.*)$", output, flags=re.MULTILINE)[1:]
    tables = {}
    for argument, part in zip(parts[::2], parts[1::2], strict=True):
        tables[argument] = {
            rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", part, re.MULTILINE)
        }
    return {
        names: tables[argument] for names, argument in zip(COMBINATIONS, arguments, strict=True)
    }


def _wanted(study: Study) -> dict[str, int]:
    """Jobs that a study needs, counted from its runs."""
    runs = study.run_table.values()
    models = {*(run.base for run in runs), *study.references}
    models |= {run.teacher for run in runs if run.teacher != "self"}
    placements = {(run.base, run.selector, run.budget.slug) for run in runs}
    aligned = {(run.base, run.mixer) for run in runs if run.initialisation == "aligned"}
    for run in runs:
        settings = study.selector_settings[run.selector]
        if "aligned" in NEEDS[settings.method]:  # type: ignore[attr-defined]
            aligned.add((run.base, settings.mixer))  # type: ignore[attr-defined]
    # a teacher's outputs come from one job, or from a start, its parts and a merge
    stored = {run.teacher for run in runs} & set(study.teacher_outputs)
    parts = [study.teacher_outputs[name].parts for name in stored]
    return {
        "model": len(models),
        "corpus": 1,
        "tasks": 1,
        "select": len(placements),
        "align": len(aligned),
        "teacher_outputs": parts.count(1),
        "teacher_part": sum(count for count in parts if count > 1),
        "spec": len(runs),
        "distil": len(runs),
        "evaluate": len(runs) + len(study.references),
        "report": 1,
    }


@pytest.mark.parametrize("names", COMBINATIONS)
def test_dry_run_lists_every_job(
    names: str, studies: dict[str, Study], planned: dict[str, dict[str, int]]
) -> None:
    table = planned[names]
    found = {rule: table.get(rule, 0) for rule in _wanted(studies[names])}
    found["select"] = sum(n for rule, n in table.items() if rule.startswith("select_"))
    assert found == _wanted(studies[names])


# --- models ---------------------------------------------------------------------------------


@pytest.mark.parametrize("names", COMBINATIONS)
def test_models_are_pinned(names: str, studies: dict[str, Study]) -> None:
    for name, settings in studies[names].models.items():
        assert re.fullmatch(r"[0-9a-f]{40}", settings.revision or ""), name


@pytest.mark.parametrize("name", FILES)
def test_gated_models_and_licences_are_said(name: str) -> None:
    for line in (ROOT / "config" / f"{name}.yaml").read_text(encoding="utf-8").split("\n"):
        if re.search(r"source: (meta-llama|Qwen)/", line):
            assert ("not gated" in line) == ("Qwen/" in line), line
            assert "gated" in line, line


# --- budgets and published lists ------------------------------------------------------------


def _context(study: Study, run: Run) -> SelectionContext:
    """What a selector is told, from the shape alone."""
    layers, heads, kv_heads, head_dim = SHAPES[study.models[run.base].source]
    itemsize = {"float32": 4, "bfloat16": 2}[study.models[run.base].dtype]
    return SelectionContext(
        base=run.base,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        budget=run.budget,
        settings=study.selector_settings[run.selector],
        kv_head_bytes=2 * head_dim * itemsize,
    )


def _placement(study: Study, run: Run) -> Placement | None:
    """The placement of a selector that needs no model; None for the others."""
    context = _context(study, run)
    method = context.settings.method  # type: ignore[attr-defined]
    choose = {"preset": preset, "uniform": uniform, "random": random}.get(method)
    return None if choose is None else choose(context)


@pytest.mark.parametrize("names", COMBINATIONS)
def test_budgets_fit_the_bases(names: str, studies: dict[str, Study]) -> None:
    study = studies[names]
    for run in study.run_table.values():
        context = _context(study, run)
        method = context.settings.method  # type: ignore[attr-defined]
        assert method in SELECTOR_SETTINGS
        if _placement(study, run) is None and method not in HEAD_WISE:
            assert context.layer_count() >= 0


def _kept(study: Study, selector: str, budget: str, base: str = "base") -> list[int]:
    """Layers that the run with this selector and budget keeps whole."""
    run = next(
        run
        for run in study.run_table.values()
        if (run.selector, run.budget.slug, run.base) == (selector, budget, base)
    )
    found = _placement(study, run)
    assert found is not None
    return found.kept_layers()


def test_published_lists_are_those_of_the_sheets(studies: dict[str, Study]) -> None:
    rad = studies["rad_llama3.2_3b"]
    assert _kept(rad, "even", "l14") == list(range(1, 28, 2))
    three = studies["kl_guided_qwen2.5_3b"]
    assert _kept(three, "ga_s2", "l9") == sorted([20, 32, 33, 21, 22, 25, 17, 19, 5])
    assert _kept(three, "ga_s2_gla", "l5") == [20, 25, 31, 32, 33]
    assert _kept(three, "uniform", "l12") == list(range(0, 36, 3))
    assert _kept(three, "postnas", "l10") == [5, 16, 17, 19, 20, 21, 22, 25, 27, 32]
    assert len(set(_kept(three, "postnas", "l10")) & set(_kept(three, "ga_s2", "l10"))) == 8
    small = studies["kl_guided_qwen2.5_3b kl_guided_qwen2.5_1.5b"]
    assert _kept(small, "ga_s2", "l7") == [14, 19, 20, 23, 24, 26, 27]
    seven = studies["kl_guided_qwen2.5_3b kl_guided_qwen2.5_7b"]
    assert _kept(seven, "smart", "l9") == [2, 5, 8, 11, 14, 17, 20, 23, 27]
    llama = studies["kl_guided_qwen2.5_3b kl_guided_llama3.2_3b"]
    assert _kept(llama, "ga_s2", "l4") == [5, 8, 12, 14]
    assert _kept(llama, "uniform", "l14") == list(range(1, 28, 2))
    one = studies["retrieval_aware_llama3.2_1b"]
    assert _kept(one, "fixed_0", "l4") == [0, 5, 10, 15]
    assert _kept(one, "annealed_12", "l2") == [1, 13]


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        ("retrieval_aware_llama3.2_1b", {(9, 25), (4, 4), (10, 26), (0, 20), (8, 20)}),
        (
            "retrieval_aware_llama3.2_1b retrieval_aware_qwen2.5_1.5b",
            {(13, 4), (18, 0), (16, 3), (16, 6), (22, 7)},
        ),
    ],
)
def test_published_heads(
    names: str, pairs: set[tuple[int, int]], studies: dict[str, Study]
) -> None:
    study = studies[names]
    kept = {
        run.budget.heads: _placement(study, run)
        for run in study.run_table.values()
        if run.selector == "published" and run.budget.heads is not None
    }
    assert set(kept) == {0, 5, 10, 20, 30, 40}
    first = kept[5]
    assert first is not None and set(first.softmax) == pairs
    for count, placement in kept.items():
        assert placement is not None and len(placement.softmax) == count


def test_equal_cache_budget_is_that_of_eight_layers(studies: dict[str, Study]) -> None:
    study = studies["controlled_8b"]
    assert _kept(study, "uniform", "b65536") == _kept(study, "uniform", "l8")
    run = next(r for r in study.run_table.values() if r.selector == "uniform_heads")
    heads = _placement(study, run)
    assert heads is not None and heads.footprint is not None
    assert 60_000 < heads.footprint.kv_bytes_per_token <= 65_536
    assert len(heads.softmax) < 8 * 32  # a lone head's keys and values are its own


# --- recipes --------------------------------------------------------------------------------


def test_steps_of_kl_guided_are_the_published_ones(studies: dict[str, Study]) -> None:
    study = studies["kl_guided_qwen2.5_3b"]
    assert study.alignment is not None
    assert study.alignment.stage().steps(512) == 2034
    (stage,) = study.recipes["kl"].stages
    assert (stage.steps(4096), stage.learning_rate) == (4577, 7.0e-6)
    assert stage.batch_size * 4096 == 131_072


def test_tokens_of_retrieval_aware_are_the_published_ones(studies: dict[str, Study]) -> None:
    for names in ("", " retrieval_aware_qwen2.5_1.5b"):
        study = studies["retrieval_aware_llama3.2_1b" + names]
        for name, recipe in study.recipes.items():
            assert sum(stage.tokens for stage in recipe.stages) == 12_000_000_000, name
        align, logits = study.recipes["retrieval_aware"].stages
        assert (align.steps(2048), logits.steps(2048)) == (19_073, 26_702)
        assert {align.warmup_fraction, logits.warmup_fraction} == ({0.05} if names else {0.1})


@pytest.mark.parametrize("names", COMBINATIONS)
def test_micro_batches_feed_a_node(names: str, studies: dict[str, Study]) -> None:
    """Every process needs a row of every micro-batch, and as many as the others."""
    study = studies[names]
    for name in {run.recipe for run in study.run_table.values()}:
        for stage in study.recipes[name].stages:
            assert stage.batch_size // stage.accumulate % GPUS == 0, (name, stage.title)


@pytest.mark.parametrize("names", COMBINATIONS)
def test_stored_teachers_serve_whole_rows(names: str, studies: dict[str, Study]) -> None:
    study = studies[names]
    context = study.corpora[study.corpus].context
    for run in study.run_table.values():
        if run.teacher in study.teacher_outputs:
            for stage in study.recipes[run.recipe].stages:
                assert stage.context in (None, context), (run.id, stage.title)


@pytest.mark.parametrize("names", COMBINATIONS)
def test_every_task_fits_the_longest_prompt(names: str, studies: dict[str, Study]) -> None:
    """A hub id states no context before it is downloaded, so the study says the longest prompt."""
    evaluation = studies[names].evaluation
    assert evaluation.max_length is not None
    for name, task in evaluation.tasks.items():
        for length in getattr(task, "lengths", []):
            assert length <= evaluation.max_length, (name, length)


# --- what is held equal, what is there ------------------------------------------------------


def _cells(study: Study, **wanted: Any) -> list[Run]:
    return [
        run
        for run in study.run_table.values()
        if all(
            value in run.views if key == "views" else getattr(run, key) == value
            for key, value in wanted.items()
        )
    ]


def test_rad_has_the_fair_comparison(studies: dict[str, Study]) -> None:
    """RAD's and the even layers with the same start, recipe, teacher and seed, for each of them."""
    study = studies["rad_llama3.2_3b"]
    arms = {
        selector: {
            (run.initialisation, run.recipe, run.teacher, run.seed, run.mixer, run.budget.slug)
            for run in _cells(study, views="controlled", selector=selector)
        }
        for selector in ("rad", "even")
    }
    assert arms["rad"] == arms["even"]
    assert {(start, teacher) for start, _, teacher, *_ in arms["rad"]} == {
        (start, teacher) for start in ("zero", "qkvo") for teacher in ("llama8b", "llama70b")
    }
    first = studies["rad_llama3.2_3b first_day_rad"]
    for start in ("zero", "qkvo"):
        runs = _cells(first, views="controlled", initialisation=start)
        assert {run.selector for run in runs} == {"rad", "even"}
        assert len({(run.recipe, run.teacher, run.seed) for run in runs}) == 1


def test_rad_has_the_published_rows(studies: dict[str, Study]) -> None:
    study = studies["rad_llama3.2_3b"]
    own = _cells(study, views="faithful", selector="rad", recipe="rad_self", seed=0)
    assert {(run.mixer, run.budget.slug) for run in own} == {
        (mixer, "l20") for mixer in ("mamba2", "mamba", "longhorn")
    }
    assert {run.initialisation for run in own} == {"zero"}
    assert {stage.trainable for stage in study.recipes["rad_self"].stages} == {"mixers"}
    larger = _cells(study, views="faithful", selector="rad", recipe="rad_kd", seed=0)
    assert {(run.teacher, run.budget.slug) for run in larger} == {
        ("llama8b", "l14"),
        ("llama70b", "l14"),
    }
    baseline = _cells(study, views="faithful", recipe="mamba_in_llama", teacher="llama70b")
    assert {(run.selector, run.initialisation) for run in baseline} == {("even", "qkvo")}


def test_kl_guided_has_every_budget_and_baseline(studies: dict[str, Study]) -> None:
    baselines = {"ar", "ar_mh", "act_mse", "lm_ppl", "smart", "uniform", "vt", "cwe"}
    for overlay, budgets in (
        ("", {5, 9, 12, 18}),
        (" kl_guided_llama3.2_3b", {4, 7, 9, 14}),
        (" kl_guided_qwen2.5_1.5b", {7, 9}),
        (" kl_guided_qwen2.5_7b", {7, 9}),
    ):
        study = studies[f"kl_guided_qwen2.5_3b{overlay}"]
        for count in budgets:
            runs = [
                run
                for run in _cells(study, views="controlled", mixer="gdn", seed=0)
                if run.budget.layers == count
            ]
            assert baselines | {"ga_s2"} <= {run.selector for run in runs}, (overlay, count)


def test_retrieval_aware_has_every_state_size(studies: dict[str, Study]) -> None:
    study = studies["retrieval_aware_llama3.2_1b"]
    runs = _cells(study, views="faithful", selector="published", teacher="self")
    states = {
        study.mixers[run.mixer].state_size: run.initialisation  # type: ignore[union-attr]
        for run in runs
        if run.budget.heads == 20
    }
    assert states == {64: "random", 32: "random", 16: "random", 8: "random", 4: "random"}
    assert {run.budget.heads for run in runs if run.mixer == "state64"} == {0, 5, 10, 20, 30, 40}
    assert _cells(study, selector="every")[0].budget.heads == 16 * 32


def test_controlled_study_varies_placement_and_teacher_only(studies: dict[str, Study]) -> None:
    study = studies["controlled_8b"]
    runs = list(study.run_table.values())
    for key in ("base", "mixer", "initialisation", "recipe"):
        assert len({getattr(run, key) for run in runs}) == 1, key
    assert {run.teacher for run in runs} == {"self", "llama70b"}
    compared = {
        study.selector_settings[run.selector].method  # type: ignore[attr-defined]
        for run in _cells(study, views="controlled", teacher="self", seed=0)
        if run.budget.slug == "l8"
    }
    assert compared == set(SELECTOR_SETTINGS)
    assert "llama70b" in study.teacher_outputs


# --- what the studies need ------------------------------------------------------------------


@pytest.mark.parametrize("names", COMBINATIONS)
def test_the_stated_hardware_is_enough(names: str, studies: dict[str, Study]) -> None:
    """Eight H100 of 80 GB, as the heads of the files and docs/reproduce.md say."""
    estimate = Estimate(studies[names], Hardware.named("h100", GPUS, 0.4, None))
    assert [f"{job.stage} {job.name}: {job.remedy}" for job in estimate.refused] == []
