"""How many documents, requests and tokens the task kinds have that are not made to a length.

Documents are the published sizes of the parts that the tasks score (lm-eval 0.4.13's, ZeroEval's
and CRUXEval's own); tokens are assumed, for the Llama 3 and Qwen 2.5 tokenizers, without having
read the data. `longest` decides memory, `mean` the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

SHOT = {"gsm8k": 180, "gsm8k_cot": 110, "gsm8k_cot_llama": 120, "crux": 150}
PAIR = {"kv_retrieval": 6, "record_recall": 11}  # tokens of an entry
WIKITEXT = 290_000  # tokens of WikiText-2's test part
CONTEXT = 2048  # of a perplexity block, when neither the model nor the task says
# tokens that RULER lets a sub-task answer
RULER = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}
RULER_TASKS, RULER_ANSWER, RULER_TEXT_TASKS = 13, 128, 4
COT_TOKENS = 500  # CRUXEval's worked example


@dataclass(frozen=True)
class Documents:
    """`requests` of every document run through the model; `answer` tokens at most, 0: scored only.

    `logits`: positions of the longest row whose logits exist at once, 1 where only the next token
    is wanted. `source` of the number of documents.
    """

    count: int
    mean: int
    longest: int
    requests: float = 1.0
    answer: int = 0
    logits: int = 1
    source: str = "assumed"


def _choices(count: int, requests: float, mean: int, longest: int, answer: int) -> Documents:
    return Documents(
        count, mean, longest, requests, logits=answer, source="lm-eval 0.4.13, part that is scored"
    )


# kind -> without answers, which the task's settings limit
SETS: dict[str, Documents] = {
    "gsm8k": Documents(1319, 110, 350, source="openai/gsm8k, test"),
    "gsm8k_cot": Documents(1319, 110, 350, source="openai/gsm8k, test"),
    "gsm8k_cot_llama": Documents(1319, 160, 400, source="openai/gsm8k, test"),
    "gsm_zeroeval": Documents(1319, 350, 600, source="ZeroEval, openai/gsm8k, test"),
    "crux_zeroeval": Documents(800, 450, 900, source="ZeroEval, cruxeval-org/cruxeval"),
    "crux": Documents(800, 250, 700, source="cruxeval-org/cruxeval"),
    "cruxeval_output": Documents(800, 350, 800, source="cruxeval-org/cruxeval"),
    "cruxeval_input": Documents(800, 350, 800, source="cruxeval-org/cruxeval"),
    "swde": Documents(1111, 1000, 3000, source="hazyresearch/based-swde-v2"),
    "fda": Documents(1102, 2000, 4000, source="hazyresearch/based-fda"),
    "squad_completion": Documents(2984, 250, 900, source="hazyresearch/based-squad"),
    "kv_retrieval": Documents(200, 30, 40, source="made here"),
    "record_recall": Documents(200, 30, 40, source="made here"),
    "qa_recall": Documents(1190, 250, 900, source="XQuAD, English"),
    "arc_easy": _choices(2376, 4, 45, 250, 60),
    "arc_challenge": _choices(1172, 4, 50, 250, 60),
    "hellaswag": _choices(10042, 4, 90, 250, 120),
    "piqa": _choices(1838, 2, 50, 300, 250),
    "winogrande": _choices(1267, 2, 30, 80, 40),
    "openbookqa": _choices(500, 4, 25, 120, 40),
    "mmlu": _choices(14042, 4, 160, 1500, 4),
    "pubmedqa": _choices(500, 3, 400, 1000, 4),
    "race": _choices(1045, 4, 500, 1500, 60),
    "truthfulqa_mc1": _choices(817, 4114 / 817, 280, 400, 80),
    "truthfulqa_mc2": _choices(817, 5882 / 817, 280, 400, 80),
    "lambada": _choices(5153, 1, 90, 300, 8),
    "gsm_nano": Documents(100, 60, 96, source="made here"),
    "crux_nano": Documents(100, 60, 96, source="made here"),
}


def documents(task: Any, wanted: int | None, limit: int) -> list[Documents]:
    """The documents of a task, by length, at most `wanted` each; `limit`: of a block of text.

    Other prompts are not cut, here as in the harness.
    """
    kind = task.kind
    if kind == "perplexity":
        # as the task cuts its text: what one length asks for, no more than there is
        room = min([limit, *task.lengths])
        blocks = max(1, WIKITEXT // room)
        count = blocks if wanted is None else min(wanted, blocks)
        return [Documents(count, room, room, logits=room, source="WikiText-2, test")]
    if kind.startswith("ruler"):
        return _ruler(task, wanted)
    found, shots = SETS[kind], 0
    if kind in SHOT:
        default = {"gsm8k": 5, "crux": 0}.get(kind, 8)
        shots = (default if task.shots is None else task.shots) * SHOT[kind]
    if kind in PAIR:
        shots = task.pairs * PAIR[kind]
    if getattr(task, "cot", False):
        shots = COT_TOKENS
    made = found.source == "made here"
    count = wanted if made and wanted else min(wanted or found.count, found.count)
    scored = found.source.startswith("lm-eval")
    return [
        replace(
            found,
            count=count,
            mean=found.mean + shots,
            longest=found.longest + shots,
            requests=float(getattr(task, "generations", found.requests)),
            answer=0 if scored else task.max_new_tokens,
        )
    ]


def _ruler(task: Any, wanted: int | None) -> list[Documents]:
    """Prompt and answer fill each of the lengths."""
    default = RULER_TASKS if task.kind == "ruler" else RULER_TEXT_TASKS
    names: Sequence[str] = task.subtasks or [""] * default
    found = []
    for length in task.lengths or [CONTEXT]:
        for answer, count in _answers(task, names):
            prompt = max(1, length - answer)
            number = count * (wanted or 100)
            found.append(Documents(number, prompt, prompt, answer=answer, source="made here"))
    return found


def _answers(task: Any, names: Sequence[str]) -> list[tuple[int, int]]:
    """(tokens of an answer, sub-tasks that allow them)."""
    if task.kind != "ruler":
        return [(task.max_new_tokens, len(names))]
    if not task.subtasks:
        names = [*RULER, *(f"niah_{index}" for index in range(RULER_TASKS - len(RULER)))]
    each = [RULER.get(name, RULER_ANSWER) for name in names]
    return [(answer, each.count(answer)) for answer in sorted(set(each))]
