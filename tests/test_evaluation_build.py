"""Building the documents: files, limits, splits, and one clear line for every bad input."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rad.evaluation import build, ruler_text, sources
from rad.evaluation.build import build_tasks, template
from rad.evaluation.documents.text import blocks
from rad.evaluation.kinds import KINDS
from rad.evaluation.scoring.contains import ruler_scores
from rad.evaluation.tokenizer import counter
from rad.settings import TASK_SETTINGS, EvaluationSettings
from rad.task_settings import suite_names

NANO = Path(__file__).parents[1] / "rad" / "assets" / "nano" / "base"


def settings(tasks: dict[str, Any], **options: Any) -> EvaluationSettings:
    values = {"max_length": 192, "probe_samples": 4, **options}
    return EvaluationSettings.model_validate({"tasks": tasks, **values})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def book(path: Path, sentences: int = 400) -> Path:
    """A text of made-up words that is long enough to hide needles in."""
    rng = random.Random(0)
    words = ["".join(rng.choice("abcdefghijklmnoprstuw") for _ in range(6)) for _ in range(600)]
    written = [
        " ".join(rng.choice(words) for _ in range(6)).capitalize() + "." for _ in range(sentences)
    ]
    paragraphs = [" ".join(written[i : i + 4]) for i in range(0, sentences, 4)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


def test_nano_tasks_are_expanded_and_described(tmp_path: Path) -> None:
    tasks = {
        "words": {"kind": "gsm_nano", "samples": 5},
        "code": {"kind": "crux_nano", "samples": 5, "max_new_tokens": 32},
        "find": {
            "kind": "ruler_nano",
            "samples": 3,
            "subtasks": ["single", "vt"],
            "lengths": [64, 96],
            "max_new_tokens": 16,
        },
    }
    first, again = tmp_path / "first", tmp_path / "again"
    build_tasks(settings(tasks), str(NANO), first)
    manifest = json.loads((first / "manifest.json").read_text())
    entries = {entry["name"]: entry for entry in manifest["tasks"]}
    assert list(entries) == [
        "words",
        "code",
        *(f"find_{subtask}_{length}" for subtask in ("single", "vt") for length in (64, 96)),
    ]
    assert entries["words"]["family"] == "gsm" and entries["code"]["metric"] == "literal_match"
    assert entries["find_vt_96"]["subtask"] == "vt" and entries["find_vt_96"]["length"] == 96
    for name, entry in entries.items():
        documents = lines(first / "data" / f"{name}.jsonl")
        assert len(documents) == entry["samples"]
        assert len({document["prompt"] for document in documents}) == len(documents)
    assert entries["find_vt_64"]["prompt_tokens"] <= 64

    build_tasks(settings(tasks), str(NANO), again)
    for path in sorted(first.glob("**/*.*")):
        assert path.read_bytes() == (again / path.relative_to(first)).read_bytes()


def test_probe_documents_are_not_test_documents(tmp_path: Path) -> None:
    tasks = {
        "code": {"kind": "crux_nano", "samples": 60},
        "find": {"kind": "ruler_nano", "samples": 10, "lengths": [64], "max_new_tokens": 16},
    }
    build_tasks(settings(tasks, probe_samples=12), str(NANO), tmp_path)
    scored = {row["prompt"] for path in tmp_path.glob("data/*") for row in lines(path)}
    probe = lines(tmp_path / "probe.jsonl")
    assert {row["task"] for row in probe} == {"code", "find"}
    assert len(probe) == 24 and all(row["end"] for row in probe)
    assert not scored & {row["prompt"] for row in probe}
    # any prefix covers the sub-tasks evenly
    kinds = [row["prompt"].split(":")[0] for row in probe if row["task"] == "find"][:4]
    assert sorted(kinds) == ["Count", "Look", "Look", "Trace"]


def test_task_files_are_lm_eval_tasks_and_name_no_folder(tmp_path: Path) -> None:
    task = {"kind": "gsm_nano", "samples": 2, "max_new_tokens": 40}
    build_tasks(settings({"words": task}), str(NANO), tmp_path)
    text = (tmp_path / "yaml" / "words.yaml").read_text()
    assert "task: words" in text and "test: data/words.jsonl" in text and "version: 1.0" in text
    assert "max_gen_toks: 40" in text and "!function" in text
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or str(tmp_path) not in path.read_text()


TEMPLATES = sorted(path.stem for path in (Path(build.__file__).parent / "tasks").glob("*.yaml"))


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_load_in_lm_eval(name: str) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    path = Path(build.__file__).parent / "tasks" / f"{name}.yaml"
    loaded = load_yaml(path, resolve_func=True)
    assert loaded["task"] == name
    assert loaded["metadata"] == template(name)["metadata"]
    if name in KINDS:
        metrics = {metric["metric"]: metric for metric in loaded["metric_list"]}
        assert set(KINDS[name].metrics) <= set(metrics)
        headline = metrics[KINDS[name].metrics[0]]
        assert headline["higher_is_better"] == KINDS[name].higher_is_better
        assert loaded.get("process_results", KINDS[name].score) == KINDS[name].score


def test_every_kind_can_be_configured_and_built() -> None:
    assert set(KINDS) == set(TASK_SETTINGS)


def test_building_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from rad.evaluation.build import build_tasks\n"
        "from rad.settings import EvaluationSettings as E\n"
        "s = E.model_validate({'tasks': {'w': {'kind': 'gsm_nano', 'samples': 2}}})\n"
        f"build_tasks(s, {str(NANO)!r}, Path({str(tmp_path)!r}))\n"
        "print([m for m in ('torch', 'transformers', 'lm_eval', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def fails(tasks: dict[str, Any], tmp_path: Path, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        build_tasks(settings(tasks, **options), str(NANO), tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists(), "nothing is written before every task is sound"
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["gsm8k", "crux", "ruler_text", "perplexity"])
def test_a_missing_file_is_named(kind: str, tmp_path: Path) -> None:
    task: dict[str, Any] = {"kind": kind, "files": ["gone.txt"]}
    if kind == "ruler_text":
        task["lengths"] = [64]
    message = fails({"mine": task}, tmp_path)
    assert "mine.files" in message and str(tmp_path / "gone.txt") in message
    nowhere = fails({"mine": {**task, "files": []}}, tmp_path, offline=True, data="nowhere")
    assert "tasks.mine" in nowhere and "files" in nowhere
    assert kind == "ruler_text" or "put nowhere/" in nowhere, "the standard place is named"


def test_missing_data_can_be_a_row(tmp_path: Path) -> None:
    tasks = {
        "words": {"kind": "gsm_nano", "samples": 2},
        "real": {"kind": "gsm_zeroeval", "missing": "row"},
    }
    manifest = build_tasks(settings(tasks, offline=True), str(NANO), tmp_path, tmp_path)
    ready, missing = manifest["tasks"]
    assert ready["status"] == "ready" and ready["prompts"] == 2
    assert missing["status"] == "missing" and "data/gsm8k/test.jsonl" in missing["reason"]
    assert missing["family"] == "gsm" and missing["metric"] == "exact_match"
    assert not (tmp_path / "data" / "real.jsonl").exists()


def test_a_suite_is_expanded_and_adjusted() -> None:
    tasks = {"crux_zeroeval": None, "gsm_zeroeval": {"samples": 7, "chat": False}}
    found = EvaluationSettings.model_validate({"suites": ["zeroeval"], "tasks": tasks})
    assert list(found.tasks) == ["gsm_zeroeval"]
    assert found.wanted("gsm_zeroeval") == 7
    assert EvaluationSettings.model_validate(found.model_dump(mode="json")) == found
    limited = EvaluationSettings.model_validate({"suites": ["zeroeval"], "samples": 3})
    assert limited.wanted("crux_zeroeval") == 3


@pytest.mark.parametrize(
    ("raw", "offered"),
    [
        ({"suites": ["zeroevl"]}, "zeroeval"),
        ({"tasks": {"a": {"kind": "rulr"}}}, "ruler"),
        ({"suites": ["gsm8k"], "tasks": {"gsm8k_cott": {"samples": 3}}}, "gsm8k_cot"),
        ({"suites": ["gsm8k"], "tasks": {"gsm8": None}}, "gsm8k"),
        ({}, "suites"),
    ],
)
def test_a_typo_is_offered_the_closest_name(raw: dict[str, Any], offered: str) -> None:
    with pytest.raises(ValueError, match=offered):
        EvaluationSettings.model_validate(raw)


def test_every_suite_names_known_kinds() -> None:
    for name in suite_names():
        EvaluationSettings.model_validate({"suites": [name]})


def test_a_prompt_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    tasks = {"words": {"kind": "gsm_nano", "samples": 5, "max_new_tokens": 64}}
    message = fails(tasks, tmp_path, max_length=80)
    assert "words" in message and "80" in message and "max_length" in message


def test_the_limit_defaults_to_the_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(NANO / "tokenizer.json", folder)
    (folder / "config.json").write_text('{"max_position_embeddings": 70}')
    chosen = settings({"w": {"kind": "gsm_nano", "samples": 5}}, max_length=None)
    with pytest.raises(ValueError, match="limit is 70"):
        build_tasks(chosen, str(folder), tmp_path / "out")


def test_bad_settings_are_named(tmp_path: Path) -> None:
    task: dict[str, Any] = {"kind": "ruler_nano", "lengths": [64], "subtasks": ["needle"]}
    assert "find.subtasks" in fails({"find": task}, tmp_path)
    assert "find.lengths" in fails({"find": {"kind": "ruler_nano"}}, tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"question": "1 + 1?"}\n')
    task = {"kind": "gsm8k", "files": ["bad.jsonl"]}
    message = fails({"g": task}, tmp_path)
    assert "line 1" in message and "'answer'" in message
    (tmp_path / "bad.jsonl").write_text("{\n")
    assert "not JSON" in fails({"g": task}, tmp_path)
    (tmp_path / "short.txt").write_text("Hardly any text.")
    task = {"kind": "ruler_text", "files": ["short.txt"], "lengths": [400]}
    assert "too little text" in fails({"r": task}, tmp_path)


def test_gsm8k_says_how_many_examples_fit(tmp_path: Path) -> None:
    rows = [
        {"question": f"Ann has {n} hats, gets {n}. How many?", "answer": f"{n}+{n}\n#### {2 * n}"}
        for n in range(1, 9)
    ]
    for name, part in (("test.jsonl", rows[:3]), ("train.jsonl", rows[3:])):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    task = {
        "kind": "gsm8k",
        "files": ["test.jsonl"],
        "shot_files": ["train.jsonl"],
        "shots": 3,
        "max_new_tokens": 16,
    }
    message = fails({"gsm8k": task}, tmp_path, max_length=110)
    assert "3 worked examples" in message and "would fit" in message and "110" in message
    assert "has 5" not in message and "5" in fails({"g": {**task, "shots": 9}}, tmp_path)

    build_tasks(settings({"gsm8k": task}, max_length=400), str(NANO), tmp_path / "o", tmp_path)
    first = lines(tmp_path / "o" / "data" / "gsm8k.jsonl")[0]
    assert first["prompt"].count("Question: ") == 4
    worked = rows[3]
    assert first["prompt"].startswith(f"Question: {worked['question']}\nAnswer: {worked['answer']}")
    assert first["prompt"].endswith(f"\n\nQuestion: {rows[0]['question']}\nAnswer:")
    probe = lines(tmp_path / "o" / "probe.jsonl")
    assert [row["target"] for row in probe] == [" 14", " 16"]
    assert probe[0]["prompt"] == f"Question: {rows[6]['question']}\nAnswer: 7+7\n####"


def test_crux_prompts(tmp_path: Path) -> None:
    source = "def f(x):\n    return x"
    rows = [{"code": source, "input": str(n), "output": str(n)} for n in range(6)]
    (tmp_path / "crux.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"kind": "crux", "files": ["crux.jsonl"], "samples": 4, "shots": 2}
    build_tasks(settings({"crux": task}), str(NANO), tmp_path / "out", tmp_path)
    first = lines(tmp_path / "out" / "data" / "crux.jsonl")[0]
    assert first["prompt"].startswith("def f(n):\n    return n\nassert f(17) == 17\n\n")
    assert first["prompt"].endswith("def f(x):\n    return x\nassert f(0) ==")
    assert first["target"] == " 0"
    probe = lines(tmp_path / "out" / "probe.jsonl")
    assert [row["target"] for row in probe] == [" 4", " 5"]


@pytest.mark.parametrize("subtask", ruler_text.SUBTASKS)
def test_retrieval_in_running_text(subtask: str, tmp_path: Path) -> None:
    count = counter(str(NANO))
    hay = ruler_text.Haystack([book(tmp_path / "book.txt").read_text()])
    hay.check("r")
    options: dict[str, Any] = {"hay": hay, "seed": 3, "new_tokens": 32, "count": count}
    found = ruler_text.documents("r", subtask, 1000, 4, **options)
    assert found == ruler_text.documents("r", subtask, 1000, 6, **options)[:4]
    for document in found:
        assert 0.8 * 1000 < count(document["prompt"]) + 32 <= 1000
        assert ruler_scores(document["references"], "", document["target"])["string_match"] == 1
        for reference in document["references"]:
            assert reference in document["prompt"]
        assert document["prompt"] == document["prompt"].rstrip()
    if subtask == "cwe":
        words = [word for word in found[0]["prompt"].split() if word in found[0]["references"]]
        assert len(words) >= 4 * len(found[0]["references"])
    with pytest.raises(sources.TaskError, match="does not fit"):
        ruler_text.documents("r", subtask, 120, 1, **options)


def test_running_text_is_cut_into_blocks_that_fit(tmp_path: Path) -> None:
    count = counter(str(NANO))
    path = book(tmp_path / "book.txt", 80)
    text = path.read_text()
    cut = blocks([text], 100, count)
    assert max(map(count, cut)) <= 100
    assert " ".join(cut).split() == text.split()
    task = {"kind": "perplexity", "files": ["book.txt"], "samples": 7, "lengths": [64]}
    build_tasks(settings({"text": task}), str(NANO), tmp_path / "out", tmp_path)
    documents = lines(tmp_path / "out" / "data" / "text.jsonl")
    assert len(documents) == 7
    for document in documents:
        assert document["tokens"] == count(document["text"]) - 1 <= 63
        assert document["words"] == len(document["text"].split())
    assert (tmp_path / "out" / "probe.jsonl").read_text() == ""


def test_tokens_are_counted_as_the_model_sees_them() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(NANO))
    count = counter(str(NANO))
    for text in ("", "Ann has 12 hats.\n", "assert f([1, 2]) == ", "\u00e9t\u00e9"):
        assert count(text) == len(tokenizer.encode(text))
    assert tokenizer.encode("a")[0] == tokenizer.bos_token_id
