"""ZeroEval's gsm and crux: zero-shot, one user turn, an answer asked for in JSON."""

from __future__ import annotations

from rad.evaluation.documents.crux import check_literals
from rad.evaluation.documents.gsm8k import final_number
from rad.evaluation.request import Concrete, Request
from rad.evaluation.scoring import zeroeval
from rad.evaluation.sources import Document


def build(request: Request) -> list[Concrete]:
    """One concrete task; scores follow `rules`, which every document carries."""
    settings = request.settings
    crux = settings.kind == "crux_zeroeval"
    found = request.rows("cruxeval" if crux else "gsm8k")
    rows = found.rows[: request.samples]
    if crux:
        check_literals(request, rows)
    documents: list[Document] = []
    for number, row in enumerate(rows):
        question = zeroeval.question_crux(row) if crux else zeroeval.question_gsm(row)
        prompt = zeroeval.wrap(question)
        if settings.chat:
            prompt = request.chat.wrap(prompt)
        if settings.double_bos:
            prompt = _doubled(request, prompt)
        documents.append(
            {
                "id": str(row.get("id", number)),
                "prompt": prompt,
                "target": row["output"] if crux else final_number(row["answer"])[1],
                "rules": settings.rules,
                "boxed": settings.boxed,
            }
        )
    return request.whole(documents, facts=found.facts)


def _doubled(request: Request, prompt: str) -> str:
    """The prompt behind two `<s>`: the template's (or the tokenizer's) and one more."""
    bos = request.chat.bos if request.settings.chat else ""
    if not bos:
        raise request.error("double_bos", "needs `chat` and a tokenizer with a <s>")
    return bos + (prompt if prompt.startswith(bos) else bos + prompt)
