"""Scorers: golden values of published outputs, and text that must not hurt them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from rad.evaluation import scorers

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
            assert scorers.literal_equal(text, gold[name]) == mark, (name, text)
            passed += mark
            total += 1
    assert total == 8000
    assert 100 * passed / total == pytest.approx(published["pass_at_1"])


@needs_data
def test_gold_answers_of_the_benchmarks_score_one() -> None:
    for row in rows("cruxeval/cruxeval.jsonl"):
        scores = scorers.crux_scores(row["output"], f" {row['output']}")
        assert scores["literal_match"] == 1, row["id"]
    for row in rows("gsm8k/test.jsonl"):
        assert scorers.gsm_scores(row["answer"], row["answer"]) == {
            "exact_match": 1.0,
            "flexible_match": 1.0,
        }


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
    scores = scorers.gsm_scores("9 + 9 = 18.\n#### 18", response)
    assert scores == {"exact_match": strict, "flexible_match": flexible}


def test_gsm_ignores_thousands_separators() -> None:
    assert scorers.gsm_scores("#### 1,250", "#### 1250")["exact_match"] == 1


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
    assert scorers.crux_scores(gold, response)["literal_match"] == float(equal)


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
    assert scorers.parse_literal(text) == (False, None)
    assert not scorers.literal_equal(text, "1")


def test_ruler_counts_the_share_of_references() -> None:
    found = scorers.ruler_scores(["ABCDE", "FGHIJ"], " ABCDE FGHIJ", " abcde and more")
    assert found == {"string_match": 0.5, "exact_match": 0.0}
    assert scorers.ruler_scores(["red"], " red", "red\n") == {"string_match": 1, "exact_match": 1}


def test_corpus_perplexity_weighs_by_tokens() -> None:
    assert scorers.corpus_perplexity([(-2.0, 1), (-4.0, 3)]) == pytest.approx(2.718281828**1.5)
    assert scorers.corpus_perplexity([(-2000.0, 1)]) == float("inf")
