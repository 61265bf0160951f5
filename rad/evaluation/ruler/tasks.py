"""The 13 tasks of RULER: prompt texts, generated tokens, scoring, and variants for short lengths.

The prompt strings below are the protocol and are those of NVIDIA/RULER (scripts/data/synthetic,
commit c3f5e3b; Copyright (c) 2024 NVIDIA CORPORATION, Apache-2.0). Everything else is our own.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import Any, Literal

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
# (text before the answer prefix, answer prefix)
NIAH_MANY = (
    "Some special magic {kind}s are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind}s afterwards.\n{context}\n"
    "What are all the special magic {kind}s for {query} mentioned in the provided text?",
    " The special magic {kind}s for {query} mentioned in the provided text are",
)
NIAH_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)
# The prefix ends in a space: the official one does.
VT = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\nQuestion: Find all variables that are assigned the value {value} "
    "in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {value}, they are: ",
)
CWE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the {count} most common words in the above list?",
    " Answer: The top {count} words that appear most often in the list are:",
)
FWE = (
    "Read the following coded text and track the frequency of each coded word. Find the three most "
    "frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
_QA_INSTRUCTION = (
    "Answer the question based on the given documents. "
    "Only give me the answer and do not output any other words."
)
QA = (
    f"{_QA_INSTRUCTION}\n\nThe following are given documents.\n\n{{context}}\n\n"
    f"{_QA_INSTRUCTION}\n\nQuestion: {{query}}",
    " Answer:",
)

Variant = dict[str, Any]


@dataclass(frozen=True)
class RulerTask:
    """One of the tasks; `variants[0]` is the official form, the others fit into less."""

    family: Literal["niah", "vt", "cwe", "fwe", "qa"]
    new_tokens: int
    match: Literal["all", "part"]
    variants: tuple[Variant, ...]
    options: Variant = field(default_factory=dict)
    essay: bool = False  # needs haystack files
    dataset: str | None = None  # needs a question file
    stand_in: str | None = None  # for which task, when its data are missing


def _niah(
    haystack: str, key: str = "word", value: str = "number", scaled: str | None = None
) -> RulerTask:
    """A needle task; `scaled` of its keys, values or queries are four (less in short contexts)."""
    variants: tuple[Variant, ...] = ({},)
    if scaled:
        variants = tuple({scaled: number} for number in (4, 3, 2))
    options = {"haystack": haystack, "key": key, "value": value}
    return RulerTask("niah", 128, "all", variants, options, essay=haystack == "essay")


# Official hops and an example of 500 tokens; then the shortest example; then fewer hops.
_VT_VARIANTS = (
    {"hops": 4, "example_tokens": 500},
    {"hops": 4, "example_tokens": 0},
    {"hops": 3, "example_tokens": 0},
    {"hops": 2, "example_tokens": 0},
    {"hops": 1, "example_tokens": 0},
)


def _cwe(common: int, often: int, seldom: int, others: int, twice: int, once: int) -> Variant:
    return {
        "common": common,
        "often": often,
        "seldom": seldom,
        "example": {"others": others, "often": twice, "seldom": once},
    }


# Official: 30 and 3 times from 4096 tokens on (the example: 10 and 3), below it 6 and 1 (3 and 1).
_CWE_LONG = _cwe(10, 30, 3, 30, 10, 3)
_CWE_SHORT = (
    _cwe(10, 6, 1, 10, 3, 1),
    _cwe(5, 6, 1, 5, 3, 1),
    _cwe(3, 6, 1, 3, 3, 1),
    _cwe(2, 4, 1, 2, 2, 1),
    _cwe(1, 4, 1, 1, 2, 1),
)
_CWE_LONG_FROM = 4096

TASKS: dict[str, RulerTask] = {
    "niah_single_1": _niah("noise"),
    "niah_single_2": _niah("essay"),
    "niah_single_3": _niah("essay", value="uuid"),
    "niah_multikey_1": _niah("essay", scaled="keys"),
    "niah_multikey_2": _niah("needle"),
    "niah_multikey_3": _niah("needle", key="uuid", value="uuid"),
    "niah_multivalue": _niah("essay", scaled="values"),
    "niah_multiquery": _niah("essay", scaled="queries"),
    "vt": RulerTask("vt", 30, "all", _VT_VARIANTS),
    "cwe": RulerTask("cwe", 120, "all", (_CWE_LONG, *_CWE_SHORT)),
    "fwe": RulerTask("fwe", 50, "all", ({},)),
    "qa_1": RulerTask("qa", 32, "part", ({},), dataset="squad"),
    "qa_2": RulerTask(
        "qa", 32, "part", ({"given": "all"}, {"given": "supporting"}), dataset="hotpotqa"
    ),
}
# Not of the 13: what stands in for qa_1 where SQuAD is missing, and is labelled as such.
STAND_IN = "qa_xquad"
EVERY: dict[str, RulerTask] = {
    **TASKS,
    STAND_IN: RulerTask("qa", 32, "part", ({},), dataset="xquad", stand_in="qa_1"),
}


def find(name: str) -> RulerTask:
    """The task of that name; `ValueError` offers the closest ones."""
    if name not in EVERY:
        near = difflib.get_close_matches(name, EVERY, n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"unknown RULER task {name!r}; {hint}known: {', '.join(EVERY)}")
    return EVERY[name]


def variants(name: str, length: int) -> tuple[Variant, ...]:
    """What may be built at a length, the official form first."""
    every = find(name).variants
    return every[1:] if name == "cwe" and length < _CWE_LONG_FROM else every
