"""RULER files and concrete tasks: made once, whole or made again, and the official scores."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruler_fixture import (
    GPT2,
    SHARED,
    book,
    hotpotqa,
    needs_shared,
    small_builder,
    small_count,
    small_tokenizer,
    squad,
)

from rad.commands.ruler import VERBS
from rad.evaluation.data import MissingData
from rad.evaluation.request import Request
from rad.evaluation.ruler import plan, tasks
from rad.evaluation.ruler.build import build
from rad.evaluation.ruler.generate import Builder
from rad.evaluation.ruler.haystack import TextFiles
from rad.evaluation.ruler.store import Store
from rad.evaluation.scoring import ruler as scoring
from rad.evaluation.tokenizer import counter, tokenizer_digest
from rad.task_settings import RulerSettings, TaskTable


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer().save_model(str(folder))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder with a book and the stand-in, and neither SQuAD nor HotpotQA."""
    for name in ("text/gutenberg", "ruler/xquad", "squad", "hotpotqa"):
        (tmp_path / "data" / name).mkdir(parents=True)
    book(tmp_path / "data/text/gutenberg/book.txt")
    squad(tmp_path / "data/ruler/xquad/xquad.en.json")
    return tmp_path / "data"


def request(data: Path, probes: int = 0, tokenizer: str = "unused", **values: Any) -> Request:
    values = {"kind": "ruler", "samples": 2, "lengths": [1024], **values}
    return Request(
        task="find",
        settings=RulerSettings.model_validate(values),
        root=data.parent,
        data=Path("data"),
        count=small_count,
        limit=4096,
        trained=4096,
        samples=None,
        probes=probes,
        tokenizer=tokenizer,
    )


# --- files ----------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_nothing_is_made_twice_and_other_files_stay(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", small_builder(tmp_path), "a tokenizer")
    assert store.ensure("niah_single_2", 1024, 3, 7).made
    assert store.ensure("vt", 2048, 3, 7).made
    before = contents(store.folder)
    stamps = {path: path.stat().st_mtime_ns for path in store.folder.rglob("*.*")}
    again = store.ensure("niah_single_2", 1024, 3, 7)
    assert not again.made and len(again.documents) == 3
    assert {path: path.stat().st_mtime_ns for path in store.folder.rglob("*.*")} == stamps

    # another length, another task: no other byte changes
    assert store.ensure("niah_single_2", 2048, 3, 7).made
    assert store.ensure("cwe", 1024, 3, 7).made
    after = contents(store.folder)
    assert {name: after[name] for name in before} == before and len(after) == 8

    # more samples: the same ones first
    more = store.ensure("niah_single_2", 1024, 5, 7)
    assert more.made and more.documents[:3] == again.documents
    assert (
        store.path("niah_single_2", 1024)
        .read_bytes()
        .startswith(before["niah_single_2/1024.jsonl"])
    )


def test_what_the_sidecar_says(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", small_builder(tmp_path), "a tokenizer")
    documents, facts, _ = store.ensure("niah_single_2", 1024, 3, 7)
    shares = [document["tokens"] / (1024 - 128) for document in documents]
    assert facts["fill"]["min"] == round(min(shares), 4) >= 0.9
    assert facts["tokenizer_sha256"] == "a tokenizer"
    assert [item["file"] for item in facts["haystack"]] == ["book.txt"]
    assert facts["words"]["wonderwords"] and facts["official"] is True
    text = store.path("niah_single_2", 1024).with_suffix(".json").read_text()
    assert str(tmp_path) not in text, "no machine path"
    assert "haystack" not in store.ensure("vt", 1024, 3, 7).facts
    assert store.ensure("qa_xquad", 1024, 3, 7).facts["stand_in"].endswith("for qa_1")


@pytest.mark.parametrize("damage", ["torn", "edited", "no file", "no sidecar", "torn sidecar"])
def test_a_damaged_file_is_made_again(damage: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "out", small_builder(tmp_path), "a tokenizer")
    store.ensure("fwe", 1024, 3, 7)
    whole = contents(store.folder)
    path = store.path("fwe", 1024)
    if damage == "torn":
        path.write_bytes(path.read_bytes()[:-40])
    elif damage == "edited":
        path.write_bytes(path.read_bytes().replace(b"coded", b"bread"))
    elif damage == "no file":
        path.unlink()
    elif damage == "no sidecar":
        path.with_suffix(".json").unlink()
    else:
        path.with_suffix(".json").write_text('{"fingerprint": ')
    assert store.facts("fwe", 1024, 3, 7) is None
    assert store.ensure("fwe", 1024, 3, 7).made
    assert contents(store.folder) == whole


def test_other_inputs_make_other_files(tmp_path: Path) -> None:
    builder = small_builder(tmp_path)
    store = Store(tmp_path / "out", builder, "a tokenizer")
    store.ensure("niah_single_2", 1024, 3, 7)
    book(tmp_path / "book.txt", sentences=1300)
    texts = TextFiles("mine", [str(tmp_path / "book.txt")], Path())
    fresh = Builder("mine", small_count, texts)
    for other in (
        Store(store.folder, builder, "another tokenizer"),
        Store(store.folder, fresh, "a tokenizer"),
        Store(
            store.folder,
            Builder("mine", small_count, builder.texts, wrap=lambda text, end: f"[{text}]{end}"),
            "a tokenizer",
        ),
    ):
        assert other.facts("niah_single_2", 1024, 3, 7) is None
    assert store.facts("niah_single_2", 1024, 3, 8) is None
    assert store.facts("niah_single_2", 1024, 3, 7) is not None


# --- the verb -------------------------------------------------------------------------------


def rad_ruler(*words: object) -> None:
    function, arguments = VERBS["ruler"]
    parser = argparse.ArgumentParser()
    for flag, options in arguments:
        parser.add_argument(flag, **options)
    function(parser.parse_args([str(word) for word in words]))


def test_the_verb_makes_and_keeps(
    data: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ("--tokenizer", tokenizer, "--data", data, "--output", tmp_path / "out")
    rad_ruler(*shared, "--length", 1024, 2048, "--samples", 2)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 12 * 2 + 1 and all("made" in line for line in said[:-1])
    assert "qa_xquad 1024" in said[-3] and "hotpot_dev_distractor_v1.json" in said[-1]
    before = contents(tmp_path / "out")
    rad_ruler(*shared, "--length", 1024, 2048, "--samples", 2)
    assert all("kept" in line for line in capsys.readouterr().out.splitlines()[:-1])
    assert contents(tmp_path / "out") == before
    model = tmp_path / "source.json"
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tokenizer, checkpoint)
    (checkpoint / "config.json").write_text("{}")
    model.write_text(json.dumps({"source": str(checkpoint), "revision": None}))
    rad_ruler("--model", model, *shared[2:], "--task", "vt", "--length", 1024, "--samples", 2)
    assert capsys.readouterr().out.startswith("vt 1024: 2 documents, filled 9")
    with pytest.raises(ValueError, match=r"hotpotqa/hotpot_dev_distractor_v1\.json"):
        rad_ruler(*shared, "--task", "qa_2")
    with pytest.raises(ValueError, match="did you mean"):
        rad_ruler(*shared, "--task", "niah_singel_1")
    with pytest.raises(ValueError, match="--tokenizer"):
        rad_ruler(*shared[2:], "--task", "vt")


def test_the_verb_imports_no_torch(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    code = (
        "import sys, argparse; from pathlib import Path\n"
        "from rad.commands.ruler import ruler\n"
        f"ruler(argparse.Namespace(tokenizer={str(tokenizer)!r}, model=None, task=['vt'],"
        f"length=[1024], samples=1, seed=1, data=Path({str(data)!r}), haystack=[], questions=[],"
        f"chat=False, chat_template=None, name='x', output=Path({str(tmp_path / 'o')!r})))\n"
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_tokenizers_are_told_apart(tokenizer: Path, tmp_path: Path) -> None:
    assert counter(str(tokenizer))("The grass is green.") + 1 == small_count("The grass is green.")
    before = tokenizer_digest(str(tokenizer))
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((tokenizer / name).read_bytes())
    assert tokenizer_digest(str(tmp_path)) == before
    lines = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join(lines[:-1]))
    assert tokenizer_digest(str(tmp_path)) != before
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    count = counter(str(tmp_path))
    # tokenizer.json goes before the two files, and has a <s>
    assert count("The sky is blue.") == len(small_tokenizer().encode("The sky is blue.").ids)


@needs_shared
def test_gpt2_from_its_two_files() -> None:
    count = counter(str(GPT2))
    assert count("The grass is green.") == 5 and count("") == 0


# --- concrete tasks -------------------------------------------------------------------------


def test_concrete_tasks(data: Path, tokenizer: Path, tmp_path: Path) -> None:
    built = build(request(data, lengths=[1024, 2048]))
    names = [concrete.name for concrete in built]
    subtasks = [*list(tasks.TASKS)[:-2], "qa_xquad", "qa_2"]
    assert names == [f"find_{task}_{length}" for task in subtasks for length in (1024, 2048)]
    for concrete in built:
        assert concrete.subtask is not None
        assert concrete.settings.max_new_tokens == tasks.EVERY[concrete.subtask].new_tokens
        if concrete.subtask == "qa_2":
            assert not concrete.documents
            assert "data/hotpotqa/hotpot_dev_distractor_v1.json" in str(concrete.missing)
        else:
            assert len(concrete.documents) == 2 and concrete.missing is None
            assert concrete.facts["fill"]["min"] >= 0.9
            assert ("stand_in" in concrete.facts) == (concrete.subtask == "qa_xquad")

    # the same documents from files, which are made when they are not there
    few = request(data, tokenizer=str(tokenizer), subtasks=["vt", "niah_multikey_1"])
    for _ in range(2):
        prepared = build(dataclasses.replace(few, ruler=tmp_path / "out"))
        assert [each.documents for each in prepared] == [each.documents for each in build(few)]
    assert (tmp_path / "out" / "find" / "vt" / "1024.jsonl").is_file()


def test_question_files_decide_the_task(data: Path) -> None:
    only = {"subtasks": ["qa_1", "qa_2"]}
    assert [each.subtask for each in build(request(data, **only))] == ["qa_xquad", "qa_2"]
    with pytest.raises(MissingData, match=r"evaluation\.tasks\.find: no data for qa_2"):
        build(request(data, **only, missing="error"))
    with pytest.raises(ValueError, match=r"find\.questions: cannot read .*gone\.json"):
        build(request(data, **only, questions=["gone.json"]))
    named = [str(squad(data / "a.json")), str(hotpotqa(data / "b.json"))]
    built = build(request(data, **only, questions=named))
    assert [each.subtask for each in built] == ["qa_1", "qa_2"]
    assert all(each.documents and "stand_in" not in each.facts for each in built)
    squad(data / "squad" / "dev-v2.0.json")
    hotpotqa(data / "hotpotqa" / "hotpot_dev_distractor_v1.json")
    built = build(request(data, **only))
    assert [each.subtask for each in built] == ["qa_1", "qa_2"]
    assert all(each.missing is None for each in built)


def test_without_books_essay_tasks_are_missing(data: Path) -> None:
    (data / "text/gutenberg/book.txt").unlink()
    built = build(request(data, subtasks=["niah_single_1", "niah_single_2"]))
    assert built[0].missing is None
    assert "data/text/gutenberg" in str(built[1].missing)
    file = book(data / "other.txt")
    built = build(request(data, subtasks=["niah_single_2"], files=[str(file)]))
    assert built[0].missing is None and len(built[0].documents) == 2


def test_probe_documents_are_others(data: Path) -> None:
    built = build(request(data, probes=13, samples=20, subtasks=["vt", "qa_1", "niah_multivalue"]))
    probe = built[0].probe
    assert len(probe) == 13 and not any(each.probe for each in built[1:])
    scored = {document["prompt"] for each in built for document in each.documents}
    assert not scored & {document["prompt"] for document in probe}
    questions = {document["question"] for document in built[1].documents}
    others = [document["question"] for document in probe if "question" in document]
    assert others and not questions & set(others)


def test_wrong_settings_are_one_line(data: Path) -> None:
    for values, text in (
        ({"subtasks": ["niah_single"]}, "did you mean niah_single_"),
        ({"lengths": []}, "at least one length"),
        ({"lengths": [128]}, "least length that fits"),
    ):
        with pytest.raises(ValueError) as caught:
            build(request(data, **values))
        assert "\n" not in str(caught.value) and text in str(caught.value)


def test_the_plan_names_what_is_made(
    data: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table = TaskTable.model_validate(
        {
            "data": "data",
            "tasks": {
                "find": {"kind": "ruler", "lengths": [1024], "samples": 2, "seed": 3},
                "words": {"kind": "gsm_nano"},
            },
        }
    )
    assert plan.ruler_tasks(table) == ["find"]
    planned = plan.planned(table, "find")
    assert planned == [(task, 1024) for task in [*list(tasks.TASKS)[:-2], "qa_xquad"]]
    assert plan.input_files(table, "find", "niah_single_3") == ["data/text/gutenberg/book.txt"]
    assert plan.input_files(table, "find", "qa_xquad") == ["data/ruler/xquad/xquad.en.json"]
    assert plan.input_files(table, "find", "cwe") == []
    words = plan.options(table, "find")
    for task, length in planned:
        asked = ("--task", task, "--length", length, "--tokenizer", tokenizer)
        rad_ruler(*asked, *words, "--output", "out/find")
        made = json.loads(Path("out", "find", task, f"{length}.json").read_text())
        assert (made["samples"], made["seed"]) == (2, 3)
    # what the task builder then reads
    wanted = request(data, tokenizer=str(tokenizer), seed=3, subtasks=["qa_1"])
    before = contents(Path("out"))
    build(dataclasses.replace(wanted, ruler=Path("out")))
    assert contents(Path("out")) == before


# --- scores ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("references", "response", "share", "any_of"),
    [
        (["France", "in France", "the country of France"], "France", 1 / 3, 1.0),
        (["France"], " it is FRANCE.", 1.0, 1.0),
        (["123", "456"], "456 then 124", 0.5, 1.0),
        (["123", "456"], "", 0.0, 0.0),
        (["a b"], "a\tb", 0.0, 0.0),  # a control character becomes a line break, not a space
        (["a\nb"], "x a\x0bb", 1.0, 1.0),
        (["1234567"], "12345678", 1.0, 1.0),  # substrings count, as in the official score
        (["café"], "CAFÉ", 1.0, 1.0),
        (["x"], "\x00\x1f \n", 0.0, 0.0),
    ],
)
def test_scores_are_the_official_ones(
    references: list[str], response: str, share: float, any_of: float
) -> None:
    assert scoring.string_match_all(references, response) == pytest.approx(share)
    assert scoring.string_match_part(references, response) == any_of
    for match, score in (("all", share), ("part", any_of)):
        document = {"references": references, "match": match}
        assert scoring.ruler_results(document, [response])["string_match"] == pytest.approx(score)


def test_a_document_without_references_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one reference"):
        scoring.string_match_all([], "anything")


def test_effective_length() -> None:
    scores = {4096: 0.95, 8192: 0.90, 16384: 0.70}
    assert scoring.effective_length(scores) == 8192 and scoring.first_failure(scores) == 16384
    dip = {8192: 0.80, 4096: 0.95, 16384: 0.90}
    assert scoring.effective_length(dip) == 16384 and scoring.first_failure(dip) == 8192
    assert scoring.effective_length({4096: 0.856}) is None, "the threshold must be exceeded"
    assert scoring.first_failure({4096: 0.8561}) is None
    assert scoring.effective_length({}) is None and scoring.first_failure({}) is None
    assert scoring.effective_length({512: 0.5}, threshold=0.4) == 512
    with pytest.raises(ValueError, match="between 0 and 1"):
        scoring.effective_length({4096: 95.0})


def test_the_template_loads_in_lm_eval() -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    from rad.evaluation import ruler

    path = Path(ruler.__file__).parents[1] / "tasks" / "ruler.yaml"
    loaded = load_yaml(path, resolve_func=True)
    assert loaded["process_results"] is scoring.ruler_results
    assert [metric["metric"] for metric in loaded["metric_list"]] == ["string_match"]
    assert loaded["generation_kwargs"]["until"] == [] and loaded["metadata"]["version"] == 1.0


@needs_shared
def test_the_shared_data_folder_is_laid_out_as_expected() -> None:
    shared = Request(
        **{**vars(request(SHARED / "data")), "root": SHARED, "limit": 1024},
    )
    built = {each.subtask: each for each in build(shared)}
    assert len(built) == 13 and built["qa_xquad"].documents and built["qa_2"].missing
