"""CRUXEval's output prediction as plain continuation: what base models without a chat can do.

`cruxeval.py` has the official prompts.
"""

from __future__ import annotations

from rad.evaluation.request import Concrete, Request
from rad.evaluation.scoring.literals import parse_literal
from rad.evaluation.sources import Document, TaskError

# The two worked examples of CRUXEval's direct output prompt (facebookresearch/cruxeval, MIT).
_SHOTS = (
    ("def f(n):\n    return n", "17", "17"),
    ('def f(s):\n    return s + "a"', '"x9j"', '"x9ja"'),
)


def _prompt(code: str, argument: str, answer: str = "") -> str:
    return f"{code}\nassert f({argument}) =={answer}"


def check_literals(request: Request, rows: list[Document]) -> None:
    """Raise `TaskError` when a gold output is no literal: nothing could be compared with it."""
    for number, row in enumerate(rows):
        if not parse_literal(row["output"])[0]:
            name = row.get("id", number)
            raise TaskError(
                f"evaluation.tasks.{request.task}: the output of {name} is not a literal"
            )


def build(request: Request) -> list[Concrete]:
    """The function and `assert f(input) ==`, after up to two worked examples.

    Probes come from the end of the file, never from the documents that are scored.
    """
    settings, found = request.settings, request.rows("cruxeval")
    check_literals(request, found.rows)
    if settings.shots > len(_SHOTS):
        raise request.error("shots", f"at most {len(_SHOTS)} of kind crux")
    worked = [_prompt(c, i, f" {o}") for c, i, o in _SHOTS[: settings.shots]]

    def document(number: int) -> Document:
        row = found.rows[number]
        prompt = "\n\n".join([*worked, _prompt(row["code"], row["input"])])
        name = str(row.get("id", number))
        return {"id": name, "prompt": prompt, "target": f" {row['output']}"}

    everything = range(len(found.rows))
    test = everything[: request.samples]
    first_spare = max(len(test), len(everything) - request.probes)
    spare = everything[first_spare:] if request.probes else []
    probe = [document(number) for number in spare]
    return request.whole([document(number) for number in test], probe, facts=found.facts)
