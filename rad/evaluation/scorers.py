"""Pure scorers of single responses; the task YAMLs name the `*_results` functions.

No model text is ever executed: code answers are compared with `ast.literal_eval`. Nothing here
imports torch or lm-eval.
"""

from __future__ import annotations

import ast
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# lm-eval gsm8k version 3: the two filters and what exact_match ignores.
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = tuple(re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"))
INVALID = "[invalid]"

# Answers are shorter than this; longer text is wrong without being parsed.
LITERAL_LIMIT = 20_000
# Deeper nesting than any answer has, and far from the parser's own limit.
DEPTH_LIMIT = 100


# --- word problems --------------------------------------------------------------------------


def extract_strict(text: str) -> str:
    """The number after the first `#### `, or `INVALID`."""
    found = _STRICT.search(text)
    return found.group(1) if found else INVALID


def extract_flexible(text: str) -> str:
    """The last thing in `text` that looks like a number, or `INVALID`."""
    found = _FLEXIBLE.findall(text)
    if not found:
        return INVALID
    return str(next(group for group in found[-1] if group)).strip()


def normalise_number(text: str) -> str:
    """What lm-eval's `exact_match` of gsm8k compares: no `,`, `$`, worked steps or final dot."""
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def gsm_scores(target: str, response: str) -> dict[str, float]:
    """`exact_match` (strict) and `flexible_match` of a response to a worked answer."""
    gold = normalise_number(target)
    return {
        "exact_match": float(normalise_number(extract_strict(response)) == gold),
        "flexible_match": float(normalise_number(extract_flexible(response)) == gold),
    }


# --- predicted outputs ----------------------------------------------------------------------


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


# --- retrieval ------------------------------------------------------------------------------


def string_match(references: Sequence[str], response: str) -> float:
    """Share of the references contained in the response, ignoring case.

    Source: RULER `string_match_all`, with its clean-up of control characters.
    """
    text = re.sub(r"[\x00-\x1f]", "\n", response).strip().lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def ruler_scores(references: Sequence[str], target: str, response: str) -> dict[str, float]:
    """`string_match` (share of references found) and `exact_match` (the whole answer)."""
    return {
        "string_match": string_match(references, response),
        "exact_match": float(response.strip() == target.strip()),
    }


# --- perplexity -----------------------------------------------------------------------------

Weighted = tuple[float, int]


def perplexity_scores(document: Mapping[str, Any], loglikelihood: float) -> dict[str, Any]:
    """`token_nll` in nats per token, and (log-likelihood, count) pairs for `corpus_perplexity`."""
    return {
        "token_nll": -loglikelihood / document["tokens"],
        "perplexity": (loglikelihood, document["tokens"]),
        "word_perplexity": (loglikelihood, document["words"]),
        "byte_perplexity": (loglikelihood, document["bytes"]),
    }


def corpus_perplexity(items: Iterable[Weighted]) -> float:
    """exp of the mean negative log-likelihood per unit over all documents."""
    pairs = list(items)
    mean = -sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs)
    return math.exp(mean) if mean < 700 else math.inf


# --- what the task YAMLs call: (document, responses) -> metrics ------------------------------


def gsm_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results` of the word problems."""
    return gsm_scores(document["target"], results[0])


def crux_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results` of output prediction."""
    return crux_scores(document["target"], results[0])


def ruler_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results` of the retrieval tasks."""
    return ruler_scores(document["references"], document["target"], results[0])


def perplexity_results(document: Mapping[str, Any], results: Sequence[float]) -> dict[str, Any]:
    """lm-eval `process_results` of running text."""
    return perplexity_scores(document, results[0])
