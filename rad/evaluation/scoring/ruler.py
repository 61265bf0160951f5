"""RULER: which wanted strings a response contains, and how long a context a model copes with.

Source: NVIDIA/RULER scripts/eval (string_match_all, string_match_part, postprocess_pred); scores
are fractions here, percentages there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f]")
# Llama-2-7B-chat at 4096 tokens, mean of the 13 tasks: what RULER calls coping with a length.
THRESHOLD = 0.856


def clean(response: str) -> str:
    """The response without surrounding space, every control character a line break."""
    return _CONTROL.sub("\n", response.strip()).strip()


def _found(references: Sequence[str], response: str) -> list[bool]:
    if not references:
        raise ValueError("a RULER document needs at least one reference")
    text = clean(response).lower()
    return [reference.lower() in text for reference in references]


def string_match_all(references: Sequence[str], response: str) -> float:
    """Share of the references that the response contains, ignoring case."""
    found = _found(references, response)
    return sum(found) / len(found)


def string_match_part(references: Sequence[str], response: str) -> float:
    """1 if the response contains any of the references, ignoring case; question answering."""
    return float(any(_found(references, response)))


def ruler_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results`: `string_match`, in the form that the document asks for."""
    score = string_match_part if document["match"] == "part" else string_match_all
    return {"string_match": score(document["references"], results[0])}


def _checked(scores: Mapping[int, float]) -> list[tuple[int, float]]:
    if any(not 0 <= score <= 1 for score in scores.values()):
        raise ValueError("effective length: scores are fractions between 0 and 1")
    return sorted(scores.items())


def effective_length(scores: Mapping[int, float], threshold: float = THRESHOLD) -> int | None:
    """The longest length whose score (mean over tasks, 0 to 1) exceeds the threshold, or None.

    As in RULER's table: a shorter length may fail, see `first_failure`. Raises `ValueError` on
    scores that are no fractions.
    """
    passed = [length for length, score in _checked(scores) if score > threshold]
    return max(passed, default=None)


def first_failure(scores: Mapping[int, float], threshold: float = THRESHOLD) -> int | None:
    """The shortest length whose score does not exceed the threshold, or None."""
    failed = [length for length, score in _checked(scores) if score <= threshold]
    return min(failed, default=None)
