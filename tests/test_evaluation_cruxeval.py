"""CRUXEval: official results reproduced, gold answers, and answers meant to do harm."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from cpu_time import cpu_seconds

from rad.evaluation.documents.cruxeval import Mode, build, documents, prompt
from rad.evaluation.request import Request
from rad.evaluation.scoring import cruxeval
from rad.evaluation.scoring.cruxeval import (
    cruxeval_input_results,
    cruxeval_output_results,
    official_scores,
    pass_at_k,
)
from rad.evaluation.scoring.worker import FunctionWorker
from rad.task_settings import CruxevalSettings

SHARED = Path(os.environ.get("RAD_SHARED", Path(__file__).parents[2] / "shared")) / "data"
needs_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"no benchmark files at {SHARED} (set RAD_SHARED)"
)
RESULTS = {"output": cruxeval_output_results, "input": cruxeval_input_results}

ROW = {
    "id": "sample_0",
    "code": "def f(text, times=1):\n    return text * times",
    "input": "'ab', 2",
    "output": "'abab'",
}
PAIR = {"code": "def f(x):\n    return x, 2", "input": "1", "output": "(1, 2)"}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[FunctionWorker]:
    """A worker with less CPU time per call than the default: endless loops are waited for."""
    worker = FunctionWorker(cpu_seconds=0.3)
    monkeypatch.setattr(cruxeval, "shared_worker", lambda: worker)
    cruxeval._outcome.cache_clear()
    yield worker
    worker.close()
    cruxeval._outcome.cache_clear()


def rows() -> list[dict[str, Any]]:
    path = SHARED / "cruxeval" / "cruxeval.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def published(mode: str) -> dict[str, Any]:
    path = SHARED / "cruxeval" / "codellama7b_samples" / f"scored_temp0.2_{mode}.json"
    content: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return content


# --- agreement with the official results ----------------------------------------------------


@needs_data
@pytest.mark.parametrize("mode", ["output", "input"])
def test_the_official_results_of_8000_generations(mode: Mode, quick: FunctionWorker) -> None:
    """Every single mark, pass@1 and pass@5; official: 34.2125, 40.2867 and 35.95, 44.9911."""
    official = published(mode)
    extract = cruxeval.predicted_output if mode == "output" else cruxeval.predicted_input
    mark = cruxeval.output_mark if mode == "output" else cruxeval.input_mark
    total = 0
    scores = []
    for document in documents(rows(), mode, cot=False):
        texts = official["raw_generations"][document["id"]]
        marks = []
        for text in texts:
            assert extract(document, text) == text  # they are stored as extracted
            marks.append(mark(document, text))
        wanted = official["raw_scored_generations"][document["id"]]
        assert official_scores(marks) == wanted, document["id"]
        scores.append(RESULTS[mode](document, [texts]))
        total += len(texts)
    assert total == 8000 and len(scores) == 800
    for k in (1, 5):
        mean = 100 * sum(score[f"pass@{k}"] for score in scores) / len(scores)
        assert mean == pytest.approx(official[f"pass_at_{k}"], abs=1e-9)


@needs_data
@pytest.mark.parametrize(("mode", "cot"), list(itertools.product(RESULTS, [False, True])))
def test_gold_answers_score_one(mode: Mode, cot: bool) -> None:
    """All 800, also the 12 whose inputs are no literals."""
    for document in documents(rows(), mode, cot):
        response = document["target"]
        if cot:
            response = f"Let us see: f is called.\n[/THOUGHT]\n[ANSWER]\n{response}\n[/ANSWER]\n\n"
        assert RESULTS[mode](document, [response]) == {
            "pass@1": 1.0,
            "exact_match": 1.0,
            "semantic_match": 1.0,
            "no_answer": 0.0,
        }, document["id"]


# --- prompts --------------------------------------------------------------------------------


# sha256 of the 800 prompts that `prompts.py` of facebookresearch/cruxeval at 190faf1 makes
OFFICIAL_PROMPTS = {
    ("output", False): "25ee07c0a11b0c0afb53abf0715ee557b3a279c174603a7d7d0dcc599407908e",
    ("output", True): "00f1189887a0dec8f901a27bd1738c060e8fe3a0f68b697a109a2eabf84e96aa",
    ("input", False): "53c8482816922b783242158fd3ca65ec2ae7db4bb5ffa5cd4216dc839c3012f0",
    ("input", True): "d5b6b968bd0a37efb778cf385eef351835c2029268cd54e1c26880fb59db032d",
}


@needs_data
@pytest.mark.parametrize(("mode", "cot"), list(OFFICIAL_PROMPTS))
def test_prompts_are_the_official_ones(mode: Mode, cot: bool) -> None:
    text = "".join(document["prompt"] for document in documents(rows(), mode, cot))
    assert hashlib.sha256(text.encode("utf-8")).hexdigest() == OFFICIAL_PROMPTS[mode, cot]


def test_a_prompt_shows_what_is_given_and_not_the_answer() -> None:
    direct, reasoned = prompt(ROW, "output", False), prompt(ROW, "output", True)
    assert direct.endswith(
        f"[PYTHON]\n{ROW['code']}\nassert f('ab', 2) == ??\n[/PYTHON]\n[ANSWER]\n"
    )
    assert reasoned.endswith("assert f('ab', 2) == ??\n[/PYTHON]\n[THOUGHT]\n")
    assert "'abab'" not in direct + reasoned
    assert direct.count("[PYTHON]") == 3 and reasoned.count("[PYTHON]") == 2
    given = prompt(ROW, "input", False)
    assert given.endswith("assert f(??) == 'abab'\n[/PYTHON]\n[ANSWER]\n")
    assert "'ab', 2" not in given


# --- extraction -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cot", "response", "score"),
    [
        (False, "assert f('ab', 2) == 'abab'\n[/ANSWER]", 1),
        (False, "'abab'", 1),
        (False, "assert f('ab', 2) == 'abab'\n[/ANSWER]\n[ANSWER]\nassert f() == 1", 1),
        (False, "assert f('ab', 2) == 'ab'\n[/ANSWER]\n[ANSWER]\nassert f() == 'abab'", 0),
        (True, "so == 'x'\n[/THOUGHT]\n[ANSWER]\nassert f('ab', 2) == 'abab'", 1),
        (True, "[ANSWER]\nf == 'abab'\n[ANSWER]\nf == 'ab'", 1),  # the first block counts
        (True, "[ANSWER]\nf == 'ab'\n[ANSWER]\nf == 'abab'", 0),
        (True, "it is == 'abab'", 1),  # as officially: without tags the whole text
        (False, "assert f('ab', 2) == abab", 0),
        (False, "assert f('ab', 2) == 'abab' == 'abab'", 1),
        (False, "assert f('ab', 2) == 'ab' * 2", 0),  # an expression; officially executed
        (False, "assert f('ab', 2) == 'ab\nab'", 0),  # a raw newline
        (False, "assert f('ab', 2) == '''abab'''", 1),
        (False, "assert f('ab', 2) == 'abab', 'message'", 1),
        (False, "assert f('ab', 2) == 'abab' # sure", 1),
        (False, "'abab' == f('ab', 2)", None),  # repeats the call
        (False, "", 0),
    ],
)
def test_outputs_are_read_as_officially(cot: bool, response: str, score: int | None) -> None:
    document = {**ROW, "cot": cot}
    answer = cruxeval.predicted_output(document, response)
    mark = cruxeval.output_mark(document, answer)
    assert mark is (None if score is None else bool(score))
    assert cruxeval_output_results(document, [response])["exact_match"] == float(score or 0)


@pytest.mark.parametrize(
    ("cot", "response", "score"),
    [
        (False, "assert f('ab', 2) == 'abab'\n[/ANSWER]", 1),
        (False, "f(times=2, text='ab')", 1),
        (False, "assert f('abab') == 'abab'", 1),  # any input will do
        (False, "assert f(text='aba') == 'abab'", 0),
        (False, "assert f('ab', 2)", 1),
        (True, "f(3) == 3, so\n[ANSWER]\nassert f('ab', 2) == 'abab'", 1),
        (True, "[ANSWER]\nassert f('a', 2) == 1\n[ANSWER]\nassert f('ab', 2) == 1", 0),
        (False, "'ab', 2", None),
        (False, "assert g('ab', 2) == 'abab'", None),
        (False, "assert f('ab', 2\n", 0),
        (False, "", None),
    ],
)
def test_inputs_are_read_as_officially(cot: bool, response: str, score: int | None) -> None:
    document = {**ROW, "cot": cot}
    mark = cruxeval.input_mark(document, cruxeval.predicted_input(document, response))
    assert mark is (None if score is None else bool(score))
    assert cruxeval_input_results(document, [response])["exact_match"] == float(score or 0)


def test_a_comma_ends_the_official_assertion() -> None:
    def score(text: str) -> float:
        return cruxeval_output_results(PAIR, [text])["exact_match"]

    assert score("(1, 2)") == 1
    assert score("1, 2") == 0  # assert (1, 2) == 1, 2
    assert score("(1, 2), 3") == 1  # the message is 3
    assert score("1, 2, 3") == 0
    assert cruxeval_output_results(PAIR, ["1, 2"])["semantic_match"] == 1


def test_equality_is_that_of_python() -> None:
    document = {"input": "0", "output": "1"}
    for text, score in (("True", 1), ("1.0", 1), ("1+0j", 1), ("'1'", 0), ("[1]", 0)):
        assert cruxeval_output_results(document, [text])["exact_match"] == score, text


def test_lenient_reading_and_missing_answers() -> None:
    fenced = "```python\nassert f('ab', 2) == 'abab'\n```"
    for response, exact, semantic, none in (
        (fenced, 0, 1, 1),
        ("assert f('ab', 2) == abab", 0, 1, 1),
        ("'abab'\nbecause of the loop", 0, 1, 1),
        ("'aba'", 0, 0, 0),
        ("I do not know", 0, 0, 1),
        ("f('ab', 2) is 'abab'", 0, 0, 1),
    ):
        scores = cruxeval_output_results(ROW, [response])
        got = scores["exact_match"], scores["semantic_match"], scores["no_answer"]
        assert got == (exact, semantic, none), response
    for response, exact, semantic, none in (
        ("'ab', 2", 0, 1, 1),
        ("```\nf('ab', 2)\n```", 0, 1, 1),
        ("'ab', 3", 0, 0, 1),
        ("f('ab', 3)", 0, 0, 0),
        ("f(", 0, 0, 1),
    ):
        scores = cruxeval_input_results(ROW, [response])
        got = scores["exact_match"], scores["semantic_match"], scores["no_answer"]
        assert got == (exact, semantic, none), response


# --- pass@k ---------------------------------------------------------------------------------


def test_pass_at_k_counts_the_subsets() -> None:
    for n, c in ((1, 0), (1, 1), (5, 2), (7, 3), (7, 7)):
        right = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            share = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(share)


def test_skipped_answers_shorten_the_list_unless_none_is_right() -> None:
    assert official_scores([True, None, False]) == [True, False]
    assert official_scores([None, False, None]) == [False, False, False]
    assert official_scores([None]) == [False]
    right, skipped, wrong = "f('ab', 2)", "'ab', 2", "f(1)"
    results = cruxeval_input_results(ROW, [[right, skipped, skipped, wrong]])
    assert results["pass@1"] == results["exact_match"] == 1 / 2
    assert results["semantic_match"] == 3 / 4
    assert results["no_answer"] == 2 / 4
    assert "pass@5" not in results
    five = cruxeval_output_results(ROW, [["'abab'"] + ["'x'"] * 4])
    assert five["pass@1"] == pytest.approx(1 / 5) and five["pass@5"] == 1
    with pytest.raises(ValueError, match="no responses"):
        cruxeval_output_results(ROW, [[]])


def test_repeated_answers_are_run_once(quick: FunctionWorker) -> None:
    document = {**ROW, "code": "def f():\n    while True: pass"}
    started = cpu_seconds()
    assert cruxeval_input_results(document, [["f()"] * 100])["pass@1"] == 0
    assert quick.starts <= 2
    assert cpu_seconds() - started < 15


# --- harm -----------------------------------------------------------------------------------


HARM = [
    "9" * 19_000,
    "9" * 1_000_000,
    "10 ** 10 ** 10",
    "'a' * 10 ** 10",
    "[0] * 10 ** 10",
    "0x" + "f" * 19_000,
    "[" * 9_000 + "]" * 9_000,
    "[" * 10_000,
    "{1: " * 4_000,
    "-" * 19_000 + "1",
    "not " * 4_000 + "1",
    "1 + " * 4_000 + "1",
    "1 if 0 else " * 1_500 + "2",
    "x" + ".real" * 3_000,
    "lambda: " * 2_000 + "1",
    "(lambda f: f(f))(lambda f: f(f))",
    "'unclosed",
    '"""',
    "'a\nb'",
    "'\\",
    "\0",
    "\ud800",
    "\ufeff",
    "__import__('os').system('touch harmed')",
    "open('harmed', 'w')",
    "exec('import os; os.fork()')",
    "().__class__.__base__.__subclasses__()",
    "f.__globals__['__builtins__']['open']('harmed', 'w')",
    "[f := open, f('harmed', 'w')][1]",
    "'{0.__class__.__mro__}'.format(1)",
    "type('E', (), {'__eq__': lambda a, b: True})()",
    "__builtins__",
    "globals().update(f=lambda: 'abab')",
]


@pytest.mark.parametrize("text", HARM, ids=range(len(HARM)))
def test_harmful_answers_are_wrong_in_bounded_time(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = cpu_seconds()
    for response in (text, f"assert f({text}) == {text}"):
        assert cruxeval_output_results(ROW, [response])["semantic_match"] == 0
        assert cruxeval_output_results(ROW, [response])["pass@1"] == 0
        assert cruxeval_input_results(ROW, [response])["semantic_match"] == 0
        assert cruxeval_input_results(ROW, [response])["pass@1"] == 0
    assert cpu_seconds() - started < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KiB
    assert not list(tmp_path.iterdir())


def test_arguments_that_make_the_function_run_away(quick: FunctionWorker) -> None:
    document = {
        "code": "def f(x):\n    while x > 0:\n        x = x + 1\n    return 10 ** -x",
        "input": "0",
        "output": "1",
    }
    for text, score in (("f(0)", 1), ("f(1)", 0), ("f(-10 ** 9)", 0), ("f(-1)", 0)):
        assert cruxeval_input_results(document, [text])["pass@1"] == score, text
    endless = {**document, "code": "def f(x):\n    return f(x + 1)"}
    assert cruxeval_input_results(endless, ["f(0)"])["pass@1"] == 0
    large = {**document, "code": "def f(x):\n    return 'a' * x"}
    assert cruxeval_input_results(large, ["f(10 ** 11)"])["pass@1"] == 0
    assert cruxeval_input_results(document, ["f(0)"])["pass@1"] == 1


# --- what a study builds --------------------------------------------------------------------


def request(tmp_path: Path, **settings: Any) -> Request:
    lines = [json.dumps({**ROW, "id": f"sample_{number}"}) for number in range(6)]
    (tmp_path / "cruxeval.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return Request(
        task="crux_o",
        settings=CruxevalSettings.model_validate({"files": ["cruxeval.jsonl"], **settings}),
        root=tmp_path,
        data=Path("data"),
        count=len,
        limit=4096,
        trained=None,
        samples=4,
        probes=3,
        tokenizer="",
        offline=True,
    )


def test_one_greedy_answer_by_default(tmp_path: Path) -> None:
    (built,) = build(request(tmp_path, kind="cruxeval_output"))
    assert built.repeats == 1 and built.generation == {}
    assert [each["id"] for each in built.documents] == [f"sample_{n}" for n in range(4)]
    assert [each["id"] for each in built.probe] == ["sample_4", "sample_5"]  # none that is scored
    assert built.documents[0]["prompt"] == prompt(ROW, "output", False)
    assert built.documents[0]["target"] == "assert f('ab', 2) == 'abab'"
    assert built.facts["files"] == ["cruxeval.jsonl"]


def test_several_answers_are_sampled(tmp_path: Path) -> None:
    options = {"cot": True, "generations": 10, "temperature": 0.8}
    (built,) = build(request(tmp_path, kind="cruxeval_input", **options))
    assert built.repeats == 10
    assert built.generation == {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
    assert built.probe == []
    assert built.documents[0]["prompt"] == prompt(ROW, "input", True)
    assert built.documents[0]["cot"] is True


def test_an_output_that_is_no_literal_is_an_error(tmp_path: Path) -> None:
    wanted = request(tmp_path, kind="cruxeval_input")
    (tmp_path / "cruxeval.jsonl").write_text(json.dumps({**ROW, "output": "list(x)"}))
    with pytest.raises(ValueError, match="crux_o: the output of sample_0 is not a literal"):
        build(wanted)


# --- the task files -------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    pass


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


@pytest.mark.parametrize("mode", ["output", "input"])
def test_task_files_stop_where_the_official_runs_do(mode: Mode) -> None:
    folder = Path(cruxeval.__file__).parents[1] / "tasks"
    task = yaml.load((folder / f"cruxeval_{mode}.yaml").read_text("utf-8"), Loader=_Loader)
    assert task["generation_kwargs"]["until"] == [cruxeval.STOP]
    module, _, function = task["process_results"].rpartition(".")
    assert module == cruxeval.__name__ and getattr(cruxeval, function) is RESULTS[mode]
    named = {each["metric"] for each in task["metric_list"]}
    assert named == set(RESULTS[mode](ROW, [["f('ab', 2)"] * 5]))
