"""GSM8K in the three forms of lm-eval 0.4.13: 5 examples, 8 with reasoning, and Meta's chat form.

The worked examples of `gsm8k` are the first rows of the training file, the same for every question;
those with reasoning are the eight of Wei et al., arXiv 2201.11903, in `gsm8k_shots.json`.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import NamedTuple

from rad.evaluation.request import Concrete, Request
from rad.evaluation.sources import Document

# Meta's evaluation details of Llama 3.1 (lm-eval: gsm8k_cot_llama version 4)
_LLAMA = (
    "Given the following problem, reason and give a final answer to the problem.\n"
    "Problem: {question}\n"
    'Your response should end with "The final answer is [answer]" where [answer] is the response '
    "to the problem."
)


class Form(NamedTuple):
    """How a question and an answer are written."""

    question: str
    answer: str  # with a space in front where it follows on the same line
    shots: int
    chat: bool


FORMS: dict[str, Form] = {
    "gsm8k": Form("Question: {question}\nAnswer:", " {answer}", 5, False),
    "gsm8k_cot": Form("Q: {question}\nA:", " {steps} The answer is {number}.", 8, False),
    "gsm8k_cot_llama": Form(_LLAMA, "{steps} The final answer is {number}", 8, True),
}


def cot_shots() -> list[Document]:
    """The eight questions with reasoning: `question`, `steps`, `answer`."""
    file = resources.files("rad.evaluation").joinpath("documents", "gsm8k_shots.json")
    rows: list[Document] = json.loads(file.read_text("utf-8"))
    return rows


def final_number(answer: str) -> tuple[str, str]:
    """(worked steps, final number) of a GSM8K answer."""
    steps, _, number = answer.rpartition("####")
    return steps.strip(), number.strip()


def _examples(request: Request, form: Form, wanted: int) -> list[tuple[str, str]]:
    """(question, answer) texts of the worked examples."""
    settings = request.settings
    if settings.kind == "gsm8k":
        rows: list[Document] = []
        if wanted or settings.shot_files:
            rows = request.rows("gsm8k_train", settings.shot_files).rows
        pairs = [(row["question"], form.answer.format(answer=row["answer"])) for row in rows]
    else:
        pairs = [
            (row["question"], form.answer.format(steps=row["steps"], number=row["answer"]))
            for row in cot_shots()
        ]
    if len(pairs) < wanted:
        where = "the shot files have" if settings.kind == "gsm8k" else f"{settings.kind} has"
        raise request.error("shots", f"{wanted} examples asked for, {where} {len(pairs)}")
    return pairs


def _prompt(request: Request, form: Form, shots: list[tuple[str, str]], question: str) -> str:
    settings = request.settings
    asked = form.question.format(question=question)
    if form.chat if settings.chat is None else settings.chat:
        turns = [text for q, a in shots for text in (form.question.format(question=q), a.strip())]
        return request.chat.turns([*turns, asked])
    worked = [
        form.question.format(question=q) + (a if a.startswith(" ") else f" {a}") for q, a in shots
    ]
    return "\n\n".join([*worked, asked])


def _check_room(
    request: Request, form: Form, shots: list[tuple[str, str]], rows: list[Document]
) -> None:
    """Raise `TaskError` saying how many worked examples fit when they do not."""
    new, wanted = int(request.settings.max_new_tokens), len(shots)
    longest = max((row["question"] for row in rows), key=request.count)

    def need(used: int) -> int:
        return request.count(_prompt(request, form, shots[:used], longest)) + new

    if wanted and need(wanted) > request.limit:
        fitting = [used for used in range(wanted) if need(used) <= request.limit]
        fit = f"{fitting[-1]} would fit" if fitting else "not even none would fit"
        raise request.error(
            "shots",
            f"{wanted} worked examples, the longest question and {new} new tokens need "
            f"{need(wanted)} tokens, the limit is {request.limit}; {fit} (or raise "
            "evaluation.max_length)",
        )


def build(request: Request) -> list[Concrete]:
    """The test questions behind the worked examples.

    A probe of `gsm8k` is a later row of the shot files with its worked steps in the prompt and only
    the final number to be predicted: nobody's own steps are word for word those of the data.
    """
    settings, form = request.settings, FORMS[request.settings.kind]
    found = request.rows("gsm8k")
    rows = found.rows[: request.samples]
    wanted = form.shots if settings.shots is None else settings.shots
    examples = _examples(request, form, wanted)
    shots = examples[:wanted]
    _check_room(request, form, shots, rows)
    documents = [
        {
            "id": str(row.get("id", number)),
            "prompt": _prompt(request, form, shots, row["question"]),
            "target": " " + row["answer"],
        }
        for number, row in enumerate(rows)
    ]
    probe: list[Document] = []
    if settings.kind == "gsm8k":
        for question, answer in examples[wanted : wanted + 4 * request.probes]:
            steps, _, number = answer.rpartition("#### ")
            item = {
                "prompt": f"{_prompt(request, form, [], question)}{steps}####",
                "target": f" {number.strip()}",
            }
            if request.count(item["prompt"] + item["target"]) <= request.limit:
                probe.append(item)
    facts = {**found.facts, "shots": wanted}
    return request.whole(documents, probe[: request.probes], facts=facts)
