"""qa_*: a question among documents, one of which (several of HotpotQA) has the answer.

Files are SQuAD (1.1 or 2.0) and HotpotQA's distractor file as published; nothing is fetched. Which
questions are asked is a permutation drawn from the seed, the same at every length; a question whose
own documents do not fit is passed over. Distractors are, as in the official builder, the other
paragraphs of the article first, then any; when all are used, they come again. Unlike there, the
documents with the answer come exactly once, and the last distractor is cut after a word where whole
documents would leave more than a tenth of the length empty.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from rad.evaluation.ruler.sizing import Draft, Meter
from rad.evaluation.ruler.tasks import QA, Variant
from rad.evaluation.sources import TaskError
from rad.files import file_digest

_LONGEST_CUT = 1000  # words of a document that may fill the rest


class Question(NamedTuple):
    """A question, its answers, and indices into the documents."""

    text: str
    answers: list[str]
    gold: list[int]  # documents with the answer
    given: list[int]  # documents that come with the question, gold ones too
    near: list[int]  # distractors to take first


class QuestionSet:
    """Questions and documents of one file."""

    def __init__(self, questions: list[Question], documents: list[str]) -> None:
        self.questions, self.documents = questions, documents

    def order(self, seed: int) -> list[int]:
        """The order in which questions are asked; the same for every length."""
        order = list(range(len(self.questions)))
        Random(f"ruler questions {seed}").shuffle(order)
        return order


def _numbered(texts: list[str]) -> tuple[list[str], dict[str, int]]:
    documents = sorted(set(texts))
    return documents, {text: index for index, text in enumerate(documents)}


def read_squad(content: Any) -> QuestionSet:
    """SQuAD 1.1 or 2.0; questions without an answer are left out. Raises `KeyError`."""
    articles = [[part["context"] for part in article["paragraphs"]] for article in content["data"]]
    documents, index = _numbered([text for article in articles for text in article])
    questions = []
    for article, texts in zip(content["data"], articles, strict=True):
        for paragraph in article["paragraphs"]:
            own = index[paragraph["context"]]
            near = [found for text in dict.fromkeys(texts) if (found := index[text]) != own]
            for item in paragraph["qas"]:
                answers = list(dict.fromkeys(answer["text"] for answer in item["answers"]))
                if not item.get("is_impossible", False) and answers:
                    questions.append(Question(item["question"], answers, [own], [own], near))
    return QuestionSet(questions, documents)


def read_hotpotqa(content: Any) -> QuestionSet:
    """HotpotQA's distractor setting; raises `KeyError`."""

    def text(title: str, sentences: list[str]) -> str:
        return f"{title}\n{''.join(sentences)}"

    documents, index = _numbered([text(*part) for item in content for part in item["context"]])
    questions = []
    for item in content:
        support = {title for title, _ in item["supporting_facts"]}
        given = [index[text(*part)] for part in item["context"]]
        gold = [index[text(*part)] for part in item["context"] if part[0] in support]
        questions.append(Question(item["question"], [item["answer"]], gold, given, []))
    return QuestionSet(questions, documents)


READERS: dict[str, Callable[[Any], QuestionSet]] = {
    "squad": read_squad,
    "xquad": read_squad,
    "hotpotqa": read_hotpotqa,
}


class QuestionFile:
    """A file of questions that is read when it is first needed."""

    def __init__(self, task: str, dataset: str, path: Path) -> None:
        self.task, self.dataset, self.path = task, dataset, path
        self._set: QuestionSet | None = None
        self._sha256: str | None = None

    def _error(self, text: str) -> TaskError:
        return TaskError(f"evaluation.tasks.{self.task}.questions: {self.path}: {text}")

    def facts(self) -> dict[str, str]:
        """Name and sha256; raises `TaskError` when the file cannot be read."""
        if self._sha256 is None:
            try:
                self._sha256 = file_digest(self.path)
            except OSError as error:
                raise self._error(f"cannot be read ({error.strerror})") from error
        return {"dataset": self.dataset, "file": self.path.name, "sha256": self._sha256}

    def load(self) -> QuestionSet:
        """The questions; raises `TaskError` when the file is not of the data set's layout."""
        if self._set is None:
            try:
                content = json.loads(self.path.read_text(encoding="utf-8"))
                self._set = READERS[self.dataset](content)
            except OSError as error:
                raise self._error(f"cannot be read ({error.strerror})") from error
            except (KeyError, TypeError, ValueError) as error:
                raise self._error(f"is not in the layout of {self.dataset} ({error!r})") from error
            if not self._set.questions:
                raise self._error("has no question with an answer")
        return self._set


def layout(path: Path) -> str:
    """`squad` or `hotpotqa`, by the first character; raises `OSError`."""
    with open(path, encoding="utf-8", errors="replace") as stream:
        return "hotpotqa" if stream.read(64).lstrip().startswith("[") else "squad"


def _distractors(
    question: Question, given: list[int], total: int, wanted: int, rng: Random
) -> list[int]:
    """At least one document besides those given, near ones first, repeated up to `wanted`."""
    kept = set(given)
    near = [index for index in question.near if index not in kept]
    rng.shuffle(near)
    kept.update(near)
    far = rng.sample(range(total), min(total, wanted + len(kept)))
    found = [*near, *(index for index in far if index not in kept)]
    repeats = -(-wanted // len(found)) if found else 0
    return (found * repeats)[:wanted]


def draft(
    questions: QuestionSet, number: int, variant: Variant, rng: Random, meter: Meter, room: int
) -> Draft:
    """A document of question `number`, whose size is the number of whole distractors."""
    question, documents = questions.questions[number], questions.documents
    given = question.gold if variant.get("given") == "supporting" else question.given
    # no tokenizer writes a heading and a document with fewer than sixteen
    wanted = room // 16 + 2
    others = _distractors(question, given, len(documents), wanted, rng)
    ranks = [rng.random() for _ in others]
    places = [rng.random() for _ in given]
    heading = meter.cost("\n\nDocument 100:\n")
    costs = list(
        accumulate((heading + meter.cost(documents[index]) for index in others), initial=0)
    )

    def words(size: int) -> list[str]:
        return documents[others[size]].split(" ") if size < len(others) else []

    def render(size: int, extra: int) -> str:
        placed = [(rank, documents[index]) for rank, index in zip(places, given, strict=True)]
        placed += [(ranks[at], documents[others[at]]) for at in range(size)]
        if extra:
            placed.append((ranks[size], " ".join(words(size)[:extra])))
        placed.sort(key=lambda pair: pair[0])
        context = "\n\n".join(
            f"Document {position}:\n{text}" for position, (_, text) in enumerate(placed, 1)
        )
        return QA[0].format(context=context, query=question.text)

    return Draft(
        render=render,
        prefix=QA[1],
        references=question.answers,
        target=f" {question.answers[0]}",
        least=0,
        most=len(others),
        estimate=costs.__getitem__,
        extras=lambda size: min(_LONGEST_CUT, len(words(size))),
    )
