"""Retrieval: which of the wanted strings a response contains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rad.evaluation.scoring.ruler import string_match_all


def ruler_scores(references: Sequence[str], target: str, response: str) -> dict[str, float]:
    """`string_match` (share of references found) and `exact_match` (the whole answer)."""
    return {
        "string_match": string_match_all(references, response),
        "exact_match": float(response.strip() == target.strip()),
    }


def ruler_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results` of the retrieval tasks."""
    return ruler_scores(document["references"], document["target"], results[0])


def recall_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results` of recall tasks.

    `contains`: any reference occurs in the answer, ignoring case. `exact_match`: the answer's first
    line is a reference, but for case and a final dot; a number within another one does not count.
    """
    response = results[0].strip()
    line = response.splitlines()[0].strip().removesuffix(".").lower() if response else ""
    references = [str(reference).lower() for reference in document["references"]]
    return {
        "contains": float(any(reference in response.lower() for reference in references)),
        "exact_match": float(line in [reference.removesuffix(".") for reference in references]),
    }
