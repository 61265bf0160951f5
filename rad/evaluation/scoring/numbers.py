"""Word problems: the final number of a worked answer, by lm-eval's two filters."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

# lm-eval gsm8k version 3: the two filters and what exact_match ignores.
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
# gsm8k_cot version 3 (first match) and gsm8k_cot_llama version 4 (last match)
_COT = re.compile(r"The answer is (\-?[0-9\.\,]+).")
_LLAMA = re.compile(r"The final answer is ((-?[$0-9.,]{2,})|(-?[0-9]+))")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
INVALID = "[invalid]"
LONGEST_NUMBER = 100  # longer ones are compared as text


def extract_strict(text: str) -> str:
    """The number after the first `#### `, or `INVALID`."""
    found = _STRICT.search(text)
    return found.group(1) if found else INVALID


def extract_cot(text: str) -> str:
    """The number of the first `The answer is n.`, or `INVALID`."""
    found = _COT.search(text)
    return found.group(1) if found else INVALID


def extract_llama(text: str) -> str:
    """The number of the last `The final answer is n`, or `INVALID`."""
    found = _LLAMA.findall(text)
    return str(next(group for group in found[-1] if group)).strip() if found else INVALID


def extract_flexible(text: str) -> str:
    """The last thing in `text` that looks like a number, or `INVALID`."""
    found = _FLEXIBLE.findall(text)
    if not found:
        return INVALID
    return str(next(group for group in found[-1] if group)).strip()


def normalise_number(text: str) -> str:
    """What lm-eval's `exact_match` of gsm8k compares: no `,`, `$`, worked steps or final dot."""
    text = text.replace(",", "").replace("$", "").rpartition("#### ")[2]
    return text.removesuffix(".").lower()


def gsm_scores(
    target: str, response: str, extract: Callable[[str], str] = extract_strict
) -> dict[str, float]:
    """`exact_match` (strict) and `flexible_match` of a response to a worked answer.

    `semantic_match` compares the last number as a number; `no_answer`: neither filter finds one.
    """
    gold = normalise_number(target)
    strict, last = extract(response), extract_flexible(response)
    return {
        "exact_match": float(normalise_number(strict) == gold),
        "flexible_match": float(normalise_number(last) == gold),
        "semantic_match": float(same_number(normalise_number(last), gold)),
        "no_answer": float(strict == last == INVALID),
    }


def same_number(one: str, other: str) -> bool:
    """Whether both texts are the same finite number (`5.0` is `5`)."""
    if max(len(one), len(other)) > LONGEST_NUMBER:
        return one == other
    try:
        return bool(Decimal(one) == Decimal(other))
    except InvalidOperation:
        return False


def gsm_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results` of `gsm8k` and of the nano word problems."""
    return gsm_scores(document["target"], results[0])


def gsm_cot_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results` of `gsm8k_cot`."""
    return gsm_scores(document["target"], results[0], extract_cot)


def gsm_cot_llama_results(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results` of `gsm8k_cot_llama`."""
    return gsm_scores(document["target"], results[0], extract_llama)
