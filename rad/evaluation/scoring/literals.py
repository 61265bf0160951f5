"""Predicted outputs of code: compared as Python literals, never executed."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

# Answers are shorter than this; longer text is wrong without being parsed.
LITERAL_LIMIT = 20_000
# Deeper nesting than any answer has, and far from the parser's own limit.
DEPTH_LIMIT = 100


def _depth(text: str) -> int:
    """Deepest bracket nesting, and the longest run of prefix operators."""
    depth = deepest = 0
    for character in text:
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth -= 1
    runs = re.findall(r"(?:[-+~]\s*)+", text)
    return max(deepest, max((len("".join(run.split())) for run in runs), default=0))


def parse_literal(text: str) -> tuple[bool, Any]:
    """(whether `text` is a Python literal, its value); never runs anything, never raises."""
    text = text.strip()
    if len(text) > LITERAL_LIMIT or _depth(text) > DEPTH_LIMIT:
        return False, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in model text
            return True, ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False, None


def literal_equal(prediction: str, gold: str) -> bool:
    """Whether both are literals that compare equal, as `assert gold == prediction` would find.

    Source: the official CRUXEval output check, which executes that assertion.
    """
    valid, value = parse_literal(prediction)
    known, wanted = parse_literal(gold)
    if not (valid and known):
        return False
    try:
        return bool(value == wanted)
    except RecursionError:
        return False


def first_line(text: str) -> str:
    """The first line with content, without surrounding space."""
    stripped = text.strip()
    return stripped.splitlines()[0].strip() if stripped else ""


def crux_scores(target: str, response: str) -> dict[str, float]:
    """`literal_match` (equal values) and `exact_match` (equal text) of the first line."""
    line = first_line(response)
    return {
        "literal_match": float(literal_equal(line, target)),
        "exact_match": float(line == target.strip()),
    }


def crux_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results` of output prediction."""
    return crux_scores(document["target"], results[0])
