"""Scorers: golden values of published outputs, and text that must not hurt them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rad.evaluation.scoring import contains, literals, numbers, perplexity

SHARED = Path(os.environ.get("RAD_SHARED", Path(__file__).parents[2] / "shared")) / "data"
needs_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason=f"no benchmark files at {SHARED} (set RAD_SHARED)"
)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SHARED / name).read_text("utf-8").splitlines()]


@needs_data
def test_cruxeval_agrees_with_the_official_execution_of_8000_generations() -> None:
    gold = {row["id"]: row["output"] for row in rows("cruxeval/cruxeval.jsonl")}
    path = SHARED / "cruxeval" / "codellama7b_samples" / "scored_temp0.2_output.json"
    published = json.loads(path.read_text("utf-8"))
    passed = total = 0
    for name, texts in published["raw_generations"].items():
        marks = published["raw_scored_generations"][name]
        for text, mark in zip(texts, marks, strict=True):
            assert literals.literal_equal(text, gold[name]) == mark, (name, text)
            passed += mark
            total += 1
    assert total == 8000
    assert 100 * passed / total == pytest.approx(published["pass_at_1"])


@needs_data
def test_gold_answers_of_the_benchmarks_score_one() -> None:
    for row in rows("cruxeval/cruxeval.jsonl"):
        scores = literals.crux_scores(row["output"], f" {row['output']}")
        assert scores["literal_match"] == 1, row["id"]
    for row in rows("gsm8k/test.jsonl"):
        gold = {"exact_match": 1.0, "flexible_match": 1.0, "semantic_match": 1.0, "no_answer": 0.0}
        assert numbers.gsm_scores(row["answer"], row["answer"]) == gold


@pytest.mark.parametrize(
    ("response", "strict", "flexible"),
    [
        ("16 - 3 = 13.\n#### 18", 1, 1),
        ("#### 18.", 1, 1),
        ("#### $18", 0, 1),  # the strict pattern wants the number right after the marks
        ("The answer is 18", 0, 1),
        ("The answer is $18.", 0, 1),
        ("18 and then 19", 0, 0),
        ("#### 19", 0, 0),
        ("#### 17\n#### 18", 0, 1),
        ("", 0, 0),
    ],
)
def test_gsm(response: str, strict: int, flexible: int) -> None:
    scores = numbers.gsm_scores("9 + 9 = 18.\n#### 18", response)
    assert (scores["exact_match"], scores["flexible_match"]) == (strict, flexible)
    assert scores["no_answer"] == (response == "")


@pytest.mark.parametrize(
    ("extract", "response", "number"),
    [
        (numbers.extract_cot, "5 + 4 = 9. The answer is 9.", "9"),
        (numbers.extract_cot, "The answer is 7.\nThe answer is 9.", "7"),
        (numbers.extract_cot, "The final answer is 9", numbers.INVALID),
        (numbers.extract_llama, "The final answer is 7. The final answer is $1,250", "$1,250"),
        (numbers.extract_llama, "The final answer is -3 dollars", "-3"),
        (numbers.extract_llama, "The answer is 9.", numbers.INVALID),
    ],
)
def test_strict_filters_of_the_reasoning_forms(
    extract: Callable[[str], str], response: str, number: str
) -> None:
    assert extract(response) == number


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("5", "5.0", True),
        ("1e400", "1e400", True),
        ("9" * 5000, "9" * 5000, True),
        ("9" * 5000, "8", False),
        ("..", "5", False),
        ("-", "-", False),
    ],
)
def test_same_number_is_bounded(one: str, other: str, same: bool) -> None:
    assert numbers.same_number(one, other) == same


def test_gsm_ignores_thousands_separators() -> None:
    assert numbers.gsm_scores("#### 1,250", "#### 1250")["exact_match"] == 1


@pytest.mark.parametrize(
    ("response", "gold", "equal"),
    [
        ("[1, 2]", "[1,2]", True),
        (" 'a'  # because\nmore", '"a"', True),
        ("\n[1]\n", "[1]", True),
        ("True", "1", True),  # as the official assertion would find
        ("1.0", "1", True),
        ("a", "'a'", False),
        ("[1, 2", "[1, 2]", False),
        ("f(3)", "3", False),
        ("1 + 2", "3", False),
        ("__import__('os').system('true')", "0", False),
        ("", "''", False),
        ("'\\d'", "'\\\\d'", True),
    ],
)
def test_literals(response: str, gold: str, equal: bool) -> None:
    assert literals.crux_scores(gold, response)["literal_match"] == float(equal)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 500 + "]" * 500,
        "9" * 10_000,
        "-" * 5_000 + "1",
        "- " * 5_000 + "1",
        "{[]: 1}",
        "(1," * 500 + ")" * 500,
        "\x00",
        "'" + "a" * 30_000 + "'",
        "1e" + "9" * 400 + "j +",
    ],
)
def test_hostile_literals_are_just_wrong(text: str) -> None:
    assert literals.parse_literal(text) == (False, None)
    assert not literals.literal_equal(text, "1")


def test_ruler_counts_the_share_of_references() -> None:
    found = contains.ruler_scores(["ABCDE", "FGHIJ"], " ABCDE FGHIJ", " abcde and more")
    assert found == {"string_match": 0.5, "exact_match": 0.0}
    assert contains.ruler_scores(["red"], " red", "red\n") == {"string_match": 1, "exact_match": 1}


def test_corpus_perplexity_weighs_by_tokens() -> None:
    assert perplexity.corpus_perplexity([(-2.0, 1), (-4.0, 3)]) == pytest.approx(2.718281828**1.5)
    assert perplexity.corpus_perplexity([(-2000.0, 1)]) == float("inf")
