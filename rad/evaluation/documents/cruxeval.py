"""CRUXEval with its official prompts: predict the output, or an input that gives it.

Instructions and worked examples are those of facebookresearch/cruxeval (`prompts.py` at 190faf1,
MIT, Copyright (c) Meta Platforms, Inc. and affiliates), letter by letter: scores depend on them.
Official runs sample 10 answers at temperatures 0.2 (for pass@1) and 0.8 (for pass@5), top_p 0.95,
up to 1024 tokens with the prompt, 2048 where the model reasons first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rad.evaluation.documents.crux import check_literals
from rad.evaluation.request import Concrete, Request
from rad.evaluation.sources import Document

Mode = Literal["output", "input"]

# --- official texts -------------------------------------------------------------------------

_OUTPUT = (
    "You are given a Python function and an assertion containing an input to the function. "
    "Complete the assertion with a literal (no unsimplified expressions, no function calls) "
    "containing the output when executing the provided code on the given input, even if the "
    "function is incorrect or incomplete. Do NOT output any extra information. "
)
_INPUT = (
    "You will be given a function f and an output in the form f(??) == output. {task} any input "
    "such that executing f on the input leads to the given output. There may be multiple answers, "
    "but {only} output one. "
)
_INSTRUCTIONS: dict[tuple[Mode, bool], str] = {
    ("output", False): _OUTPUT + "Provide the full assertion with the correct output in [ANSWER] "
    "and [/ANSWER] tags, following the examples.",
    ("output", True): _OUTPUT + "Execute the program step by step before arriving at an answer, "
    "and provide the full assertion with the correct output in [ANSWER] and [/ANSWER] tags, "
    "following the examples.",
    ("input", False): _INPUT.format(task="Find", only="you should only")
    + "In [ANSWER] and [/ANSWER] tags, complete the assertion with one such input that will "
    "produce the output when executing the function.",
    ("input", True): _INPUT.format(task="Your task is to find", only="only")
    + "First, think step by step. You MUST surround the answer with [ANSWER] and [/ANSWER] tags. "
    "Express your answer as a passing assertion containing the input and the given output.",
}
# (code, input, output, reasoning) of the worked examples; spaces at line ends are official.
_EXAMPLES: dict[tuple[Mode, bool], tuple[tuple[str, str, str, str], ...]] = {
    ("output", False): (
        ("def f(n):\n    return n", "17", "17", ""),
        ('def f(s):\n    return s + "a"', '"x9j"', '"x9ja"', ""),
    ),
    ("output", True): (
        (
            'def f(s):\n    s = s + s\n    return "b" + s + "a"',
            '"hi"',
            '"bhihia"',
            "Let's execute the code step by step:\n\n"
            "1. The function f is defined, which takes a single argument s.\n"
            '2. The function is called with the argument "hi", so within the function, s is '
            'initially "hi".\n'
            '3. Inside the function, s is concatenated with itself, so s becomes "hihi".\n'
            '4. The function then returns a new string that starts with "b", followed by the value '
            'of s (which is now "hihi"), and ends with "a".\n'
            '5. The return value of the function is therefore "bhihia".\n',
        ),
    ),
    ("input", False): (
        (
            "def f(my_list):\n    count = 0\n    for i in my_list:\n"
            "        if len(i) % 2 == 0:\n            count += 1\n    return count",
            '["mq", "px", "zy"]',
            "3",
            "",
        ),
        ("def f(s1, s2):\n    return s1 + s2", '"ba", "nana"', '"banana"', ""),
    ),
    ("input", True): (
        (
            "def f(x):\n    return x + 1",
            "16",
            "17",
            "To find an input such that executing f on the input leads to the given output, we can "
            "work backwards from the given assertion. We know that f(??) == 17. \n\n"
            "Since the function f(x) returns x + 1, for f(??) to be equal to 17, the value of ?? "
            "should be 16. \n",
        ),
    ),
}

# --- prompts --------------------------------------------------------------------------------


def _question(mode: Mode, code: str, argument: str, output: str) -> str:
    call = f"f({argument}) == ??" if mode == "output" else f"f(??) == {output}"
    return f"[PYTHON]\n{code}\nassert {call}\n[/PYTHON]\n"


def answer(row: Mapping[str, Any]) -> str:
    """The whole assertion, which both modes ask for."""
    return f"assert f({row['input']}) == {row['output']}"


def prompt(row: Mapping[str, Any], mode: Mode, cot: bool) -> str:
    """The official prompt of one row (`code`, `input`, `output`)."""
    parts = [_INSTRUCTIONS[mode, cot] + "\n"]
    for code, argument, output, reasoning in _EXAMPLES[mode, cot]:
        thought = f"[THOUGHT]\n{reasoning}[/THOUGHT]\n" if cot else ""
        solved = answer({"input": argument, "output": output})
        question = _question(mode, code, argument, output)
        parts.append(f"{question}{thought}[ANSWER]\n{solved}\n[/ANSWER]\n")
    question = _question(mode, row["code"], row["input"], row["output"])
    return "\n".join([*parts, question + ("[THOUGHT]\n" if cot else "[ANSWER]\n")])


def documents(rows: Sequence[Mapping[str, Any]], mode: Mode, cot: bool) -> list[Document]:
    """Documents with what the scorers in `scoring.cruxeval` need, in the order of the rows."""
    return [
        {
            "id": str(row.get("id", number)),
            "prompt": prompt(row, mode, cot),
            "target": answer(row),
            "code": row["code"],
            "input": row["input"],
            "output": row["output"],
            "cot": cot,
        }
        for number, row in enumerate(rows)
    ]


def build(request: Request) -> list[Concrete]:
    """One concrete task, with several sampled answers per document or one greedy one.

    Probes come from the end of the file, never from the documents that are scored. There are none
    where the model reasons first: the benchmark has no reasoning to compare with.
    """
    settings, found = request.settings, request.rows("cruxeval")
    check_literals(request, found.rows)
    mode: Mode = "output" if settings.kind == "cruxeval_output" else "input"
    every = documents(found.rows, mode, settings.cot)
    test = every[: request.samples]
    first_spare = max(len(test), len(every) - request.probes)
    wanted = request.probes and not settings.cot
    sampling: dict[str, Any] = {}
    if settings.generations > 1:
        sampling = {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
        }
    return request.whole(
        test,
        every[first_spare:] if wanted else [],
        generation=sampling,
        repeats=settings.generations,
        facts=found.facts,
    )
