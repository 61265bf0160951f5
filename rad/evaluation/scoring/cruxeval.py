"""CRUXEval's output and input prediction: answer extraction, pass@k, safe scoring.

Extraction, skipping and the estimator are the official ones (facebookresearch/cruxeval 190faf1,
MIT). The official check executes `assert {output} == {answer}`; here no predicted text is executed.
A predicted output is compared as a literal, a predicted call goes to `worker.py`, which calls the
benchmark's function on literal-like arguments. What the official check would also count right, and
this one does not: outputs that are expressions, arguments with comprehensions, f-strings, star
arguments, modules or other functions than the worker's, and further statements after the answer.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from rad.evaluation.scoring.literals import first_line, parse_literal
from rad.evaluation.scoring.worker import TEXT_LIMIT, shared_worker

STOP = "[/ANSWER]"
START = "[ANSWER]"
# k of the pass@k that are reported, where there are as many answers.
PASS_AT = (1, 5)

Document = Mapping[str, Any]
# A mark per answer as the official check gives them; None is an answer it skips.
Mark = bool | None


# --- extraction -----------------------------------------------------------------------------


def _answer(document: Document, response: str) -> str:
    """The response up to its stop; of a chain of thought what follows the first `[ANSWER]`.

    A document without the key `cot` may be either.
    """
    text = response.split(STOP)[0]
    if document.get("cot") is not False and START in text:
        text = text.split(START)[1]
    return text.strip()


def predicted_output(document: Document, response: str) -> str:
    """The official post-processing of output prediction: what follows the first `==`."""
    text = _answer(document, response)
    if "==" in text:
        text = text.split("==")[1]
    return text.strip()


def predicted_input(document: Document, response: str) -> str:
    """The official post-processing of input prediction: a call of f, without what follows `==`."""
    text = _answer(document, response)
    if "==" in text:
        text = text.split("==")[0].strip()
    if "assert f" in text:
        text = "f" + text.split("assert f")[1].strip()
    return text.strip()


def _bare(document: Document, response: str) -> str:
    """The answer without code fences, backticks and `assert`: how a lenient reader starts."""
    lines = _answer(document, response).splitlines()
    text = "\n".join(line for line in lines if not line.strip().startswith("```"))
    return text.strip().strip("`").strip().removeprefix("assert ").strip()


def _readings(*texts: str) -> list[str]:
    """Each text and its first line, without repetition."""
    every = [reading for text in texts for reading in (text, first_line(text))]
    return [reading for reading in dict.fromkeys(every) if reading]


def lenient_outputs(document: Document, response: str) -> list[str]:
    """What may be meant as the output, the official reading first."""
    text = _bare(document, response)
    text = text.removeprefix(f"f({document['input']})").strip().removeprefix("==").strip()
    return _readings(predicted_output(document, response), text)


def lenient_inputs(document: Document, response: str) -> list[str]:
    """What may be meant as the call, the official reading first."""
    text = _bare(document, response)
    text = text.removesuffix(document["output"]).strip().removesuffix("==").strip()
    calls = _readings(predicted_input(document, response), text)
    return [call if call.startswith("f(") else f"f({call})" for call in calls]


# --- single answers -------------------------------------------------------------------------


def output_value(text: str) -> tuple[bool, Any]:
    """(whether `text` is a literal, its value) where `assert gold == {text}` would have it.

    There a comma ends the comparison: `1, 2` stands for 1, and 2 is the assertion's message.
    """
    valid, value = parse_literal(text)
    if not valid or not isinstance(value, tuple):
        return valid, value
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in model text
            found = ast.parse(f"assert 0 == {text.strip()}").body[0]
    except SyntaxError:
        return False, None
    assert isinstance(found, ast.Assert) and isinstance(found.test, ast.Compare)
    return True, ast.literal_eval(found.test.comparators[0])


def _same(value: Any, gold: Any) -> bool:
    try:
        return bool(gold == value)
    except RecursionError:
        return False


def output_mark(document: Document, answer: str) -> Mark:
    """Whether an extracted output is right; None if it repeats the call, which is skipped."""
    if f"f({document['input']})" in answer:
        return None
    valid, value = output_value(answer)
    return valid and _same(value, parse_literal(document["output"])[1])


# Several answers at a low temperature repeat a lot.
@lru_cache(maxsize=16_384)
def _outcome(code: str, call: str, gold: str) -> str:
    return shared_worker().judge(code, call, gold)


def _judged(document: Document, call: str) -> str:
    if len(call) > TEXT_LIMIT:  # and not into the cache
        return "refused"
    return _outcome(document["code"], call, document["output"])


def input_mark(document: Document, answer: str) -> Mark:
    """Whether an extracted call gives the output; None if it calls no f, which is skipped.

    Raises `WorkerError` if no worker process can be started.
    """
    if "f(" not in answer:
        return None
    return _judged(document, answer) == "equal"


def _output_meant(document: Document, response: str) -> bool:
    """Whether some lenient reading is the output; quotes may be missing around a text."""
    gold = parse_literal(document["output"])[1]
    for reading in lenient_outputs(document, response):
        valid, value = parse_literal(reading)
        if valid and _same(value, gold):
            return True
        if isinstance(gold, str) and reading.strip("'\"") == gold.strip("'\"") != "":
            return True
    return False


def _input_meant(document: Document, response: str) -> bool:
    readings = lenient_inputs(document, response)
    return any(_judged(document, reading) == "equal" for reading in readings)


def _no_output(document: Document, answer: str) -> bool:
    return f"f({document['input']})" in answer or not output_value(answer)[0]


def _no_input(document: Document, answer: str) -> bool:
    return "f(" not in answer or _judged(document, answer) == "refused"


# --- documents ------------------------------------------------------------------------------


def pass_at_k(answers: int, right: int, k: int) -> float:
    """Unbiased estimate that one of `k` answers is right: 1 - C(n-c, k) / C(n, k).

    1 if fewer than `k` are wrong, as officially also where skipped answers leave less than `k`.
    Source: Chen et al. 2021, section 2.1.
    """
    if answers - right < k:
        return 1.0
    return 1.0 - math.comb(answers - right, k) / math.comb(answers, k)


def official_scores(marks: Sequence[Mark]) -> list[bool]:
    """The marks that count: skipped ones shorten the list, unless no answer is right."""
    counted = [mark for mark in marks if mark is not None]
    return counted if any(counted) else [False] * len(marks)


def _results(
    document: Document,
    responses: Sequence[str | Sequence[str]],
    extract: Callable[[Document, str], str],
    mark: Callable[[Document, str], Mark],
    meant: Callable[[Document, str], bool],
    unanswered: Callable[[Document, str], bool],
) -> dict[str, float]:
    first = responses[0]
    generations = [first] if isinstance(first, str) else list(first)
    if not generations:
        raise ValueError(f"document {document.get('id', '')}: no responses to score")
    answers = [extract(document, generation) for generation in generations]
    marks = [mark(document, answer) for answer in answers]
    scores = official_scores(marks)
    count, right = len(generations), sum(scores)
    results = {
        f"pass@{k}": pass_at_k(len(scores), right, k) for k in PASS_AT if k == 1 or k <= count
    }
    pairs = list(zip(marks, generations, strict=True))
    results["exact_match"] = results["pass@1"]
    results["semantic_match"] = sum(hit is True or meant(document, g) for hit, g in pairs) / count
    results["no_answer"] = sum(unanswered(document, answer) for answer in answers) / count
    return results


def cruxeval_output_results(
    document: Document, responses: Sequence[str | Sequence[str]]
) -> dict[str, float]:
    """lm-eval `process_results` of output prediction; `responses[0]` is one text or n of them.

    `pass@1`, `pass@5` from five answers on, `exact_match` (pass@1 under the name it has elsewhere),
    `semantic_match` (share right when read leniently: fences, missing quotes or brackets) and
    `no_answer` (share without a literal). The document has `input`, `output` and perhaps `cot`.
    """
    return _results(document, responses, predicted_output, output_mark, _output_meant, _no_output)


def cruxeval_input_results(
    document: Document, responses: Sequence[str | Sequence[str]]
) -> dict[str, float]:
    """lm-eval `process_results` of input prediction; `responses[0]` is one text or n of them.

    As of outputs; lenient is a call without `f(...)` around its arguments, `no_answer` the share
    without a call of f on literal-like arguments. The document has `code`, `output`, perhaps `cot`.
    """
    return _results(document, responses, predicted_input, input_mark, _input_meant, _no_input)
