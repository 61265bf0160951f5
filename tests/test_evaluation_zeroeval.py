"""ZeroEval's tasks: published scores, prompts, extraction, equality, and hostile answers."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rad.evaluation.scoring import zeroeval
from rad.evaluation.scoring.zeroeval import RULES, extract_answer, first_number, first_value

SHARED = Path(os.environ.get("RAD_SHARED", Path(__file__).parents[2] / "shared")) / "data"
needs_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"no benchmark files at {SHARED} (set RAD_SHARED)"
)

SCORERS = {"gsm": zeroeval.gsm_zeroeval_results, "crux": zeroeval.crux_zeroeval_results}
LLAMA, QWEN, MAMBA = "Meta-Llama-3.1-8B-Instruct", "Qwen2-7B-Instruct", "Mamba2InLlama_0_50_v2"
# Published are exact_match and no_answer; the others are the shifts that the rules make, measured
# once by an independent implementation: (task, model, upstream_match, semantic_match) in percent.
SHIFTS = [
    ("crux", LLAMA, 39.88, 41.38),
    ("crux", QWEN, 37.88, 40.50),
    ("crux", MAMBA, 25.62, 26.50),
    ("gsm", LLAMA, 84.00, 84.00),
    ("gsm", QWEN, 80.06, 80.06),
    ("gsm", MAMBA, 69.98, 69.98),
]


def rows(name: str) -> list[dict[str, Any]]:
    text = (SHARED / name).read_text("utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def published(task: str, model: str) -> dict[str, Any]:
    """The published line of a model; one name has a space in front."""
    lines = json.loads((SHARED / "zeroeval" / f"published_{task}.summary.json").read_text("utf-8"))
    [line] = [line for line in lines if line["Model"].strip() == model]
    return dict(line)


def percent(share: float) -> str:
    return f"{100 * share:.2f}"


def crux(target: str, response: str, **options: Any) -> dict[str, float]:
    return zeroeval.crux_zeroeval_results({"target": target, **options}, [response])


def gsm(target: str, response: str, **options: Any) -> dict[str, float]:
    return zeroeval.gsm_zeroeval_results({"target": target, **options}, [response])


# --- published scores -----------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(("task", "model", "upstream", "semantic"), SHIFTS)
def test_published_scores_come_out(task: str, model: str, upstream: float, semantic: float) -> None:
    found = rows(f"zeroeval/{task}__{model}.jsonl")
    # the original takes \boxed{...} of models with this name
    options = {"boxed": "Llama-3.1" in model}
    scores = [SCORERS[task]({"target": r["answer"], **options}, [r["output"]]) for r in found]
    means = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    line = published(task, model)
    assert len(scores) == line["Total"]
    assert percent(means["exact_match"]) == line["Acc"]
    assert percent(means["no_answer"]) == line["No answer"]
    assert percent(means["upstream_match"]) == f"{upstream:.2f}"
    assert percent(means["semantic_match"]) == f"{semantic:.2f}"
    newer = [
        SCORERS[task]({"target": r["answer"], "rules": "upstream"}, [r["output"]]) for r in found
    ]
    assert [s["exact_match"] for s in newer] == [s["upstream_match"] for s in scores]


@needs_data
@pytest.mark.parametrize("task", ["gsm", "crux"])
def test_published_scores_come_out_through_lm_eval(task: str) -> None:
    """Real prompts, the shipped task file, and a model that repeats published outputs."""
    from datasets import Dataset
    from lm_eval import evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    if task == "gsm":
        prompts = [zeroeval.question_gsm(row) for row in rows("gsm8k/test.jsonl")]
    else:
        prompts = [zeroeval.question_crux(row) for row in rows("cruxeval/cruxeval.jsonl")]
    prompts = [zeroeval.wrap(prompt) for prompt in prompts]
    assert len(set(prompts)) == len(prompts)

    class Replay(LM):  # type: ignore[misc]
        """Answers every prompt with a stored output."""

        def __init__(self, answers: dict[str, str]) -> None:
            super().__init__()
            self.answers = answers

        def generate_until(self, requests: list[Instance]) -> list[str]:
            assert all(r.args[1]["max_gen_toks"] == 1024 for r in requests)
            return [self.answers[request.args[0]] for request in requests]

        def loglikelihood(self, requests: list[Instance]) -> Any:
            raise AssertionError("a generation task")

        def loglikelihood_rolling(self, requests: list[Instance]) -> Any:
            raise AssertionError("a generation task")

    name = f"{task}_zeroeval"
    template = resources.files("rad.evaluation").joinpath("tasks", f"{name}.yaml")
    for model in (LLAMA, QWEN, MAMBA):
        found = rows(f"zeroeval/{task}__{model}.jsonl")
        documents = [
            {"prompt": prompt, "target": row["answer"]}
            for prompt, row in zip(prompts, found, strict=True)
        ]
        with resources.as_file(template) as path:
            content: dict[str, Any] = load_yaml(path, resolve_func=True)
        del content["dataset_path"]
        data = {"test": Dataset.from_list(documents)}
        content |= {"dataset_kwargs": {}, "custom_dataset": lambda data=data, **unused: data}
        outputs = [row["output"] for row in found]
        results = evaluate(
            lm=Replay(dict(zip(prompts, outputs, strict=True))),
            task_dict=TaskManager(include_defaults=False).load([content]),
            bootstrap_iters=2,
        )["results"][name]
        line = published(task, model)
        assert percent(results["exact_match,none"]) == line["Acc"]
        assert percent(results["no_answer,none"]) == line["No answer"]
        assert results["semantic_match,none"] >= results["upstream_match,none"]
        assert results["upstream_match,none"] >= results["exact_match,none"]


@needs_data
def test_gold_answers_in_the_asked_for_form_score_one() -> None:
    unreachable = 0
    for row in rows("cruxeval/cruxeval.jsonl"):
        response = json.dumps({"reasoning": "so", "answer": row["output"]}, indent=4)
        scores = crux(row["output"], f"Sure.\n```json\n{response}\n```")
        # the original rules never accept an empty string, not even the right one
        empty = row["output"] == "''"
        unreachable += empty
        assert scores == {
            "exact_match": 1.0 - empty,
            "semantic_match": 1.0,
            "no_answer": 0.0,
            "upstream_match": 1.0,
        }, row["id"]
    assert unreachable == 17
    for row in rows("gsm8k/test.jsonl"):
        number = row["answer"].rpartition("#### ")[2]
        response = json.dumps({"reasoning": row["answer"], "answer": number})
        for target in (row["answer"], f"# {number}", number):
            assert gsm(target, response) == {
                "exact_match": 1.0,
                "semantic_match": 1.0,
                "no_answer": 0.0,
                "upstream_match": 1.0,
            }


@pytest.mark.parametrize("response", ["", " \n", "I do not know.", "{}", '{"reasoning": "x"}'])
@pytest.mark.parametrize("rules", list(RULES))
def test_no_answer_is_wrong(response: str, rules: str) -> None:
    wrong = {"exact_match": 0.0, "semantic_match": 0.0, "no_answer": 1.0, "upstream_match": 0.0}
    assert crux("''", response, rules=rules) == wrong
    assert gsm("# 0", response, rules=rules) == wrong


# --- prompts --------------------------------------------------------------------------------


def test_prompts_are_those_of_the_protocol() -> None:
    row = {"code": "def f(a):\n    return a", "input": "'x'", "question": "1 + 1 = ? "}
    assert zeroeval.question_gsm(row) == "1 + 1 = ? "
    assert zeroeval.question_crux(row) == (
        "You are given a Python function and an assertion containing an input to the function. "
        "Complete the assertion with a literal (no unsimplified expressions, no function calls) "
        "containing the output when executing the provided code on the given input, even if the "
        "function is incorrect or incomplete. \n"
        "\n[PYTHON]\ndef f(a):\n    return a\nassert f('x') == ??\n[/PYTHON]"
    )
    # {question} once and verbatim, braces included
    assert zeroeval.wrap("{question} {x}").split("\n") == [
        "",
        "## Question: ",
        "",
        "{question} {x}",
        "",
        "",
        "## Instruction ",
        "",
        "Please answer this question by first reasoning and then providing your answer.",
        "Present your reasoning and solution in the following json format. ",
        'Please show your final answer in the `answer` field, e.g.,`"answer": "42"`.',
        "",
        "```json",
        "{",
        '    "reasoning": "___",',
        '    "answer": "___"',
        "}",
        "```",
        "",
    ]


# --- extraction -----------------------------------------------------------------------------

DEEP = "[" * 200 + "]" * 200


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ('{"answer": "a b"}', "a b"),
        ('x } {"reasoning": "r", "answer": "1"} {"answer": "2"}', "1"),  # the first block counts
        ('{"reasoning": "r"} {"answer": "2"}', "2"),  # ... else the first such field
        ('{"answer": "1", "answer": "2"}', "2"),  # as JSON has it
        ('{"answer":\n"a\nb"}', "ab"),  # line breaks go before parsing
        ('{"answer": "a\\nb"}', "a\nb"),
        ('{"answer": [1, "x", null, true, 0.50]}', "[1, 'x', None, True, 0.5]"),
        ('{"answer": {"a": [1]}}', "{'a': [1]}"),
        ('{"answer": null}', "None"),
        ('{"answer": false}', "False"),
        ('{"answer": -0}', "0"),
        ('{"answer": -12}', "-12"),
        ('{"answer": NaN}', "nan"),
        ('{"answer": -Infinity}', "-inf"),
        ('{"answer": 1e999999}', "inf"),
        ('{"answer": ' + "7" * 50_000 + "}", "7" * 50_000),  # no limit on digits
        ('{"answer": [' + "7" * 5000 + "]}", "[" + "7" * 5000 + "]"),
        ('{"answer": ""}', ""),
        ('{"answer": "a{"}', "a{"),  # a brace in a string: the block never closes
        ('{"answer": "a}b"}', "a}b"),  # ... or closes early
        ("{\"answer\": 'x, y'}", "'x"),  # no JSON: up to the comma
        ('{"answer": [1, 2] oops}', "[1"),
        ('{"answer": "it is "quoted""}', "it is "),
        ("{answer: 42}", "42}"),
        ("The answer : 42, I think", "42"),
        ('"answer":', ""),
        ('{"answer": "cut off by the lim', '"cut'),
        ('{"answer": "tab\there"}', "tab\there"),  # a raw control character is not JSON
        (f'{{"answer": {DEEP}}}', f"{DEEP}}}"),  # too deep to be JSON
        ('{"reasoning": "' + "[" * 500 + '", "answer": "1"}', "1"),  # deep only in a string
        ("answer = 42", None),
        ("{" * 300 + "}" * 300, None),
        ("\\boxed{7}", None),
        ("x" * zeroeval.TEXT_LIMIT + '{"answer": "late"}', None),
    ],
)
def test_extraction(response: str, answer: str | None) -> None:
    assert extract_answer(response, RULES["original"]) == answer
    assert extract_answer(response, RULES["upstream"]) == answer


def test_boxed_answers_are_an_option() -> None:
    early = "So \\boxed{36} it is. " + "Thank you for this question. " * 3
    assert extract_answer(early, RULES["original"], boxed=True) == "36"
    assert extract_answer(early, RULES["upstream"], boxed=True) is None
    assert extract_answer("So $\\boxed{36}$", RULES["upstream"], boxed=True) == "36"
    assert extract_answer("\\boxed{3 6}", RULES["original"], boxed=True) is None
    assert extract_answer('\\boxed{1} {"answer": "2"}', RULES["original"], boxed=True) == "2"
    assert gsm("# 36", early)["no_answer"] == 1
    assert gsm("# 36", early, boxed=True)["exact_match"] == 1


def test_unknown_rules_are_named() -> None:
    with pytest.raises(ValueError, match=r"rules 'newest': expected one of original, upstream"):
        crux("1", "", rules="newest")


# --- equality -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "answer", "exact", "upstream", "semantic"),
    [
        ("'abc'", "abc", 1, 1, 1),  # quotes do not count
        ("'abc'", '"abc"', 1, 1, 1),
        ("abc", "'abc'", 1, 1, 1),
        ("[1, 2]", "[1, 2]", 1, 1, 1),
        ("[1, 2]", "[1,2]", 0, 0, 1),  # spaces do
        ("[1, 2]", [1, 2], 1, 1, 1),  # a JSON list prints as Python's
        ("['a']", ["a"], 1, 1, 1),
        ("(1, 2)", [1, 2], 0, 0, 0),
        ("{'a': 1}", '{"a": 1}', 0, 0, 1),
        ("{1: 2, 3: 4}", "{3: 4, 1: 2}", 0, 0, 1),
        ("True", True, 1, 1, 1),
        ("True", "true", 0, 0, 0),
        ("None", None, 1, 1, 1),
        ("1", 1, 1, 1, 1),
        ("1", 1.0, 0, 0, 1),
        ("1", "True", 0, 0, 1),  # as `==` has it
        ("'a\\nb'", "a\nb", 0, 1, 1),  # a real line break
        ("'a\\tb'", "a\tb", 0, 0, 1),  # the string that the literal denotes
        ("'a\\\\b'", "a\\b", 0, 0, 1),
        ("'a\\nb'", "'a\\nb'", 1, 1, 1),
        ("''", "", 0, 1, 1),  # an empty answer is never right in the original
        ("''", "''", 0, 1, 1),
        ("''", "x", 0, 0, 0),
        ("'x'", "", 0, 0, 0),
        ("'CW'", " CW", 0, 0, 0),
        ("5", "__import__('os').abort() or 5", 0, 0, 0),
        ("5", "2 + 3", 0, 0, 0),
        ("25", "5**2", 0, 0, 0),
    ],
)
def test_equality_of_outputs(
    target: str, answer: Any, exact: int, upstream: int, semantic: int
) -> None:
    response = json.dumps({"answer": answer})
    expected = {"exact_match": exact, "upstream_match": upstream, "semantic_match": semantic}
    assert crux(target, response) == {**expected, "no_answer": 0}
    newer = crux(target, response, rules="upstream")
    assert newer == {**expected, "exact_match": upstream, "no_answer": 0}


@pytest.mark.parametrize(
    ("answer", "number", "value"),
    [
        ("18", 18, 18),
        ("$1,234.50 dollars", 1234.5, 1234.5),
        ("x = -3 or 4", -3, -3),
        ("3/4", 0.75, 0.75),
        (" 10 / 4 ", 2.5, 2.5),
        ("-1.5/.5", -3, -3),
        ("1/0", 1, None),
        ("1/2 cup", 1, 0.5),  # not a plain fraction: the original fails to evaluate it
        ("010/2", 10, 5),  # nor is that Python
        ("6/3/2", 6, 2),
        ("9**9**9/1", 9, 9),  # never evaluated
        ("1e3", 1, 1000),  # the original knows no exponents
        (".5", 5, 0.5),
        ("1/100000", 1, 0.00001),  # 1e-05 as text
        ("\u0661\u0668", 18, None),  # digits of other scripts count in the original
        ("1e999999", 1, float("inf")),
        ("9" * 5000, float("inf"), float("inf")),
        ("9" * 5000 + "/3", float("inf"), float("inf")),
        ("nan", None, None),
        ("Infinity", None, None),
        ("", None, None),
        ("--", None, None),
    ],
)
def test_numbers(answer: str, number: float | None, value: float | None) -> None:
    assert first_number(answer) == number
    assert first_value(answer) == value


def test_numbers_are_compared_as_numbers() -> None:
    def score(answer: Any, target: str = "# 1,000") -> tuple[float, float, float]:
        scores = gsm(target, json.dumps({"answer": answer}))
        return scores["exact_match"], scores["semantic_match"], scores["no_answer"]

    assert score("$1,000.00 per year") == (1, 1, 0)
    assert score(1000) == score(1000.0) == score([1000, 2]) == (1, 1, 0)
    assert score("1e3") == (0, 1, 0)
    assert score("1 000") == (0, 0, 0)
    assert score("none") == score("") == (0, 0, 0)  # an answer without a number
    assert score("1000", target="# none") == (0, 0, 0)  # no gold, nothing is right
    assert score("inf") == score("9" * 400) == (0, 0, 0)


def test_several_samples_are_averaged() -> None:
    right, wrong = '{"answer": "1"}', "no idea"
    scores = zeroeval.gsm_zeroeval_results({"target": "# 1"}, [[right, wrong, wrong, right]])
    assert scores == {
        "exact_match": 0.5,
        "semantic_match": 0.5,
        "no_answer": 0.5,
        "upstream_match": 0.5,
    }


# --- hostile answers ------------------------------------------------------------------------

PIECES = [
    '{"answer": ',
    "{",
    "}",
    "[",
    "]",
    '"',
    "\\",
    "\n",
    "answer",
    ":",
    ",",
    " ",
    "1",
    "/",
    "-",
]
PIECES += ["'", "\\boxed{", "e9", ".", "\ud800", "\u0663", "\x00", "reasoning", "True", "$"]


@given(
    st.lists(st.sampled_from(PIECES) | st.text(max_size=3), max_size=40).map("".join),
    st.sampled_from(["''", "[1, 'a']", "1", "# 1", "{'a': {1}}"]),
    st.sampled_from(list(RULES)),
    st.booleans(),
)
def test_any_text_gets_a_score(text: str, target: str, rules: str, boxed: bool) -> None:
    for scorer in SCORERS.values():
        document = {"target": target, "rules": rules, "boxed": boxed}
        scores = scorer(document, [text])
        assert set(scores.values()) <= {0.0, 1.0}
        assert scores["exact_match"] <= scores["semantic_match"] <= 1 - scores["no_answer"]
        assert scorer(document, [text]) == scores


HOSTILE = r"""
import json, sys
from rad.evaluation.scoring import zeroeval

MB = 1_000_000
texts = [
    "{" * MB, "}" * MB, "{}" * MB, '{"a":' * MB, "[" * MB, '"' * MB, "\\" * MB, '"\\' * MB,
    "\n" * MB, " " * MB, "\u2003" * MB, "answer" * MB, '"answer"' * MB, '"answer" :' * MB,
    '"answer": "' * MB, '"answer"' + " " * MB, ("answer" + " " * 500) * 2000, "\\boxed{" * MB,
    "\\boxed{" + "a" * MB, "{" + '\\"' * 40_000 + "}", "{" + "\\" * 90_000 + "}", "-" * MB,
    '{"a":' * 15_000 + "1" + "}" * 15_000, "{" + ",".join(f'"{i}": 1' for i in range(9000)) + "}",
]
bodies = [
    "[" * 40_000 + "]" * 40_000, "9" * 90_000, "9" * 90_000 + ".5", "0." + "9" * 90_000,
    "1e" + "9" * 90_000, "NaN", "-Infinity", "[" * 99 + "9" * 90_000 + "]" * 99,
]
inner = [
    "9" * 45_000 + "/" + "9" * 45_000, "1/" * 45_000, "1." * 45_000, "1" + " " * 90_000 + "x",
    "-" * 18_000 + "1", "~" * 18_000 + "1", "not " * 4_000 + "1", "1+" * 9_000 + "1",
    "1 if 1 else " * 1_500 + "1", "lambda:" * 2_500 + "1", "a." * 9_000 + "a", "a[0]" * 4_500,
    "f" + "()" * 9_000, "1<" * 9_000 + "1", "2**" * 6_000 + "2", "9**9**9**9", "f'{" * 6_000,
    "'a' " * 4_500, "0x" + "f" * 19_000, "7" * 19_000, "(" * 99 + ")" * 99, "{1:" * 90 + "1",
    "__import__('os').fork()", "[0]*9**9", "'a'*9**9", "\\ud800", "\\u0000", "1_" * 9_000 + "1",
    "await " * 3_000 + "1", "a or " * 3_800 + "a", "*" * 19_000 + "1", "." * 19_000, "e" * 90_000,
    "\\n" * 45_000, "while 1: pass", "open('hostile', 'w')",
]
texts += ['{"answer": ' + body + "}" for body in bodies]
texts += ['{"answer": "' + text + '"}' for text in inner]
marks = []
for text in texts:
    for rules in zeroeval.RULES:
        document = {"target": "'x'", "rules": rules, "boxed": True}
        marks.append(list(zeroeval.crux_zeroeval_results(document, [text]).values()))
        document["target"] = "# 18"
        marks.append(list(zeroeval.gsm_zeroeval_results(document, [text]).values()))
json.dump(marks, sys.stdout)
"""


def test_hostile_answers_take_bounded_time_and_memory(tmp_path: Path) -> None:
    """None right, none an error, and the same marks whatever the limits of the interpreter."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))

    marks = []
    for digits, depth in (("0", 1000), ("640", 400)):
        done = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.setrecursionlimit({depth})\n{HOSTILE}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONINTMAXSTRDIGITS": digits, "PYTHONWARNINGS": "error"},
            capture_output=True,
            text=True,
            timeout=120,
            preexec_fn=limit,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        marks.append(json.loads(done.stdout))
    assert marks[0] == marks[1]
    assert not list(tmp_path.iterdir())
    assert {mark for scores in marks[0] for mark in scores[:2]} == {0.0}
    assert {scores[2] for scores in marks[0]} == {0.0, 1.0}
