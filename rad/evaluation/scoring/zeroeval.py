"""ZeroEval's GSM8K and CRUX tasks: question texts, answer extraction and equality.

Two rule sets are kept apart. `original` is the fork jxiw/ZeroEval (8ee055c, November 2024) behind
the published numbers of RAD and MambaInLlama; `upstream` is WildEval/ZeroEval of April 2025. Only
rules and prompt texts are taken over (ZeroEval, Apache-2.0; CRUXEval, MIT). Where the original
evaluates an answer with a slash as Python, a plain fraction is computed here and nothing else is.

Cost is linear in the response, of which the first `TEXT_LIMIT` characters count: every pattern
below matches at its first possible start or has disjoint starts. Numbers are compared as text or
as IEEE doubles, and integers are never converted inside JSON, so that neither the interpreter's
limit on digits nor its recursion limit decides a score.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rad.evaluation.scoring.literals import DEPTH_LIMIT, literal_equal, parse_literal

# Characters of a response that are looked at. 4096 tokens, ZeroEval's limit, are about 16 000.
TEXT_LIMIT = 100_000
# Digits on either side of a fraction; longer ones are left as they are, like other arithmetic.
_FRACTION_DIGITS = 300

# --- prompts --------------------------------------------------------------------------------

# The spaces after "Question:", "Instruction" and "format." are part of the protocol.
_TEMPLATE = (
    "\n## Question: \n\n{question}\n\n\n## Instruction \n\n"
    "Please answer this question by first reasoning and then providing your answer.\n"
    "Present your reasoning and solution in the following json format. \n"
    'Please show your final answer in the `answer` field, e.g.,`"answer": "42"`.\n\n'
    '```json\n{\n    "reasoning": "___",\n    "answer": "___"\n}\n```\n'
)
# So is the space at the end.
_CRUX_INSTRUCTION = (
    "You are given a Python function and an assertion containing an input to the function. "
    "Complete the assertion with a literal (no unsimplified expressions, no function calls) "
    "containing the output when executing the provided code on the given input, even if the "
    "function is incorrect or incomplete. "
)


def question_gsm(row: Mapping[str, Any]) -> str:
    """The question of a GSM8K row, as it is."""
    return str(row["question"])


def question_crux(row: Mapping[str, Any]) -> str:
    """The question of a CRUXEval row (`code`, `input`): complete `assert f(input) == ??`."""
    text = (
        f"{_CRUX_INSTRUCTION}\n\n[PYTHON]\n{row['code']}\nassert f({row['input']}) == ??\n[/PYTHON]"
    )
    return text.strip()


def wrap(question: str) -> str:
    """The user turn: the question and the instruction to answer in JSON."""
    return _TEMPLATE.replace("{question}", question)


# --- rules ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    r"""What distinguishes the versions of ZeroEval.

    `escape_newlines`: a line break in an answer counts as the two characters `\n`.
    `empty_matches`: an empty answer equals the empty string.
    `boxed_window`: `\boxed` must stand in that many last characters (None: anywhere).
    """

    escape_newlines: bool
    empty_matches: bool
    boxed_window: int | None


RULES: dict[str, Rules] = {
    "original": Rules(escape_newlines=False, empty_matches=False, boxed_window=None),
    "upstream": Rules(escape_newlines=True, empty_matches=True, boxed_window=30),
}


def rules_named(name: str) -> Rules:
    """The rule set of that name; raises `ValueError` listing the names."""
    if name not in RULES:
        raise ValueError(f"ZeroEval rules {name!r}: expected one of {', '.join(RULES)}")
    return RULES[name]


# --- extraction -----------------------------------------------------------------------------

_BRACES = re.compile(r"[{}]")
_BRACKETS = re.compile(r"[{}\[\]]")
# A string that ends, or the rest of the text: matches at every quote, hence linear.
_JSON_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)
# Looked for in this order over the whole response. A value runs to the next quote, across lines;
# without quotes it runs to a comma or a space and may be empty.
_FIELDS = (
    re.compile(r'"answer"\s*:\s*"([^"]*)"'),
    re.compile(r'"answer"\s*:\s*([^,\s]*)'),
    re.compile(r"answer\s*:\s*([^,\s]*)"),
)
_BOXED = re.compile(r"\\boxed{(\w+)}")


class _Integer(str):
    """An integer of JSON as its digits; prints as they do, in lists too."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _integer(digits: str) -> _Integer:
    return _Integer("0" if digits == "-0" else digits)


def _depth(text: str) -> int:
    """The deepest nesting of brackets outside strings."""
    depth = deepest = 0
    for bracket in _BRACKETS.findall(_JSON_STRING.sub("", text)):
        depth += 1 if bracket in "{[" else -1
        deepest = max(deepest, depth)
    return deepest


def _first_object(text: str) -> Mapping[str, Any]:
    """The first `{...}` with balanced braces as JSON without line breaks, or {}.

    Braces in strings count, as in the original: an unbalanced one moves the end. Only this block is
    tried. Nesting beyond `DEPTH_LIMIT` is not JSON here.
    """
    depth = start = 0
    for brace in _BRACES.finditer(text):
        if brace.group() == "{":
            if depth == 0:
                start = brace.start()
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                block = text[start : brace.end()].replace("\n", "")
                if _depth(block) > DEPTH_LIMIT:
                    return {}
                try:
                    found = json.loads(block, parse_int=_integer)
                except json.JSONDecodeError:
                    return {}
                return found if isinstance(found, dict) else {}
    return {}


def extract_answer(response: str, rules: Rules, boxed: bool = False) -> str | None:
    r"""The answer of a response as text, or None.

    The field `answer` of the first JSON object, else the first text that looks like that field,
    else, with `boxed`, the word in `\boxed{...}` (the original asks for it only of models whose
    name contains "Llama-3.1"). Values other than text print as Python prints them.
    """
    text = response[:TEXT_LIMIT]
    found = _first_object(text)
    if "answer" in found:
        return str(found["answer"])
    for pattern in _FIELDS:
        field = pattern.search(text)
        if field:
            return field.group(1)
    if boxed and (rules.boxed_window is None or "boxed" in text[-rules.boxed_window :]):
        word = _BOXED.search(text)
        if word:
            return word.group(1)
    return None


# --- equality -------------------------------------------------------------------------------

_FIRST_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_INTEGER = rf"(?:0|[1-9][0-9]{{0,{_FRACTION_DIGITS}}})"
_REAL = rf"[0-9]{{0,{_FRACTION_DIGITS}}}\.[0-9]{{1,{_FRACTION_DIGITS}}}"
_OPERAND = rf"[-+]?(?:{_REAL}|{_INTEGER})"
_FRACTION = re.compile(rf"({_OPERAND})\s*/\s*({_OPERAND})")
# Also `.5`, `2.`, `1e3`, `3/4`, in running text.
_VALUE = re.compile(
    r"([-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"
    r"(?:\s*/\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+))?"
)


def same_text(answer: str, gold: str, rules: Rules) -> bool:
    """ZeroEval's equality of outputs: the same text without quotes around it."""
    answer = answer.strip("'\"")
    gold = gold.strip("'\"")
    if rules.escape_newlines:
        answer = answer.replace("\n", "\\n")
    return answer == gold and (rules.empty_matches or bool(gold))


def same_value(answer: str, gold: str) -> bool:
    """Whether an answer is an equal Python literal, or the very string that `gold` denotes."""
    value = parse_literal(gold)[1]
    return (isinstance(value, str) and answer == value) or literal_equal(answer, gold)


def _quotient(numerator: str, denominator: str) -> float | None:
    """The double nearest to a fraction of two numerals, or None where there is none."""
    try:
        if "." in numerator or "." in denominator:
            return float(numerator) / float(denominator)
        return int(numerator) / int(denominator)
    except (ZeroDivisionError, OverflowError):
        return None


def _sanitise(text: str) -> str:
    """Text without `$` and `,`; a plain fraction becomes a decimal number."""
    text = text.replace("$", "").strip().replace(",", "")
    fraction = _FRACTION.fullmatch(text)
    if fraction:
        value = _quotient(*fraction.groups())
        return text if value is None else str(value)
    return text


def first_number(text: str) -> float | None:
    """ZeroEval's value of an answer: its first number, which has no exponent."""
    found = _FIRST_NUMBER.search(_sanitise(text[:TEXT_LIMIT]))
    return float(found.group()) if found else None


def first_value(text: str) -> float | None:
    """The first number of a text with its exponent or denominator, if it has one."""
    found = _VALUE.search(text[:TEXT_LIMIT].replace("$", "").replace(",", ""))
    if not found:
        return None
    number, denominator = (float(part or 1) for part in found.groups())
    return number / denominator if denominator else None


def gold_number(target: str) -> float | None:
    """The number of a GSM8K answer: after `####` if that is there."""
    return first_number(target.rpartition("####")[2].replace("#", ""))


# --- scores ---------------------------------------------------------------------------------

Score = Callable[[str, str, Rules, bool], dict[str, float]]


def _gsm_scores(target: str, response: str, rules: Rules, boxed: bool) -> dict[str, float]:
    gold = gold_number(target)

    def matches(answer: str | None) -> bool:
        return answer is not None and gold is not None and first_number(answer) == gold

    answer = extract_answer(response, rules, boxed)
    exact = matches(answer)
    value = None if answer is None else first_value(answer)
    return {
        "exact_match": float(exact),
        "semantic_match": float(exact or (value is not None and value == gold)),
        "no_answer": float(answer is None),
        "upstream_match": float(matches(extract_answer(response, RULES["upstream"], boxed))),
    }


def _crux_scores(target: str, response: str, rules: Rules, boxed: bool) -> dict[str, float]:
    gold = target.strip()
    answer = extract_answer(response, rules, boxed)
    latest = RULES["upstream"]
    answer_now = extract_answer(response, latest, boxed)
    exact = answer is not None and same_text(answer, gold, rules)
    upstream = answer_now is not None and same_text(answer_now, gold, latest)
    semantic = exact or upstream or (answer is not None and same_value(answer, gold))
    return {
        "exact_match": float(exact),
        "semantic_match": float(semantic),
        "no_answer": float(answer is None),
        "upstream_match": float(upstream),
    }


def _mean(
    score: Score, document: Mapping[str, Any], responses: Sequence[str | Sequence[str]]
) -> dict[str, float]:
    """Scores of the one response, or the means over the samples in its place."""
    rules = rules_named(document.get("rules") or "original")
    boxed = bool(document.get("boxed"))
    samples = [responses[0]] if isinstance(responses[0], str) else list(responses[0])
    scores = [score(document["target"], sample, rules, boxed) for sample in samples]
    return {name: sum(item[name] for item in scores) / len(scores) for name in scores[0]}


def gsm_zeroeval_results(
    document: Mapping[str, Any], responses: Sequence[str | Sequence[str]]
) -> dict[str, float]:
    """Metrics of a GSM8K answer; `document` has `target` and, if wanted, `rules` and `boxed`.

    `exact_match`: the first number of the answer is that of the target. `semantic_match`: or it is
    with its exponent or denominator. `no_answer`: none was found. `upstream_match`: `exact_match`
    under the rules of that name. Source: ZeroEval's scoring of `gsm`.
    """
    return _mean(_gsm_scores, document, responses)


def crux_zeroeval_results(
    document: Mapping[str, Any], responses: Sequence[str | Sequence[str]]
) -> dict[str, float]:
    """Metrics of a predicted output; `document` has `target` and, if wanted, `rules` and `boxed`.

    `exact_match`: same text without quotes. `semantic_match`: or the same under the upstream rules,
    or the same value (`same_value`). `no_answer`: none was found. `upstream_match`: `exact_match`
    under the rules of that name. Source: ZeroEval's scoring of `crux`.
    """
    return _mean(_crux_scores, document, responses)
