"""The documents of one (task, length), every one from a random generator of its own."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from rad.evaluation.ruler import chains, counted, needles, questions, tasks
from rad.evaluation.ruler.haystack import TextFiles
from rad.evaluation.ruler.questions import QuestionFile
from rad.evaluation.ruler.sizing import Coarse, Draft, Filled, Meter, Unfit, fill
from rad.evaluation.ruler.tasks import RulerTask, Variant
from rad.evaluation.sources import Count, Document, TaskError

VERSION = 1  # of the documents: raised when the same arguments make other ones
_PROBES = 4  # drafts that decide which variant fits
_MARGIN = 0.95  # of the room that the smallest context of a variant may take
_ATTEMPTS = 20  # drafts of one document, until nothing in its text is an answer by chance


@dataclass
class Builder:
    """Makes documents with one tokenizer; `wrap` puts text and answer prefix into a chat template.

    `name` is the configured task, for messages. One builder serves every task and length: texts,
    questions and token counts of words are kept.
    """

    name: str
    count: Count
    texts: TextFiles
    questions: dict[str, QuestionFile] = field(default_factory=dict)  # by data set
    wrap: Callable[[str, str], str] | None = None

    def __post_init__(self) -> None:
        self.meter = Meter(self.count, self.wrap)

    def documents(
        self, task: str, length: int, samples: int, seed: int, stream: str = "test"
    ) -> tuple[list[Document], dict[str, Any]]:
        """(`samples` documents, facts about them) of a task at a length in tokens.

        A document depends on (task, length, seed, its index) alone. `stream` separates other
        documents, as those of the probe, from the ones that are scored. Raises `TaskError` when
        the length is too short, naming one that is enough, or data are missing or too few.
        """
        found = self._task(task)
        if samples < 1:
            raise TaskError(f"evaluation.tasks.{self.name}.samples: at least 1, not {samples}")
        job = _Job(self, task, found, length, seed, stream)
        variant = job.choose()
        made = [job.document(variant, index) for index in range(samples)]
        return [document for document, _ in made], job.facts(variant, [each for _, each in made])

    def _task(self, task: str) -> RulerTask:
        try:
            return tasks.find(task)
        except ValueError as error:
            raise TaskError(f"evaluation.tasks.{self.name}.subtasks: {error}") from error


@dataclass
class _Job:
    """One (task, length, seed) of a builder."""

    builder: Builder
    name: str
    task: RulerTask
    length: int
    seed: int
    stream: str
    asked: list[int] = field(default_factory=list)  # questions that fit, in their order
    passed_over: int = 0

    @property
    def room(self) -> int:
        return self.length - self.task.new_tokens

    def error(self, text: str) -> TaskError:
        return TaskError(
            f"evaluation.tasks.{self.builder.name}.lengths: {self.name} at {self.length} tokens: "
            f"{text}"
        )

    # --- one document ---

    def rng(self, index: int | str, attempt: int = 0) -> Random:
        """The generator of a document: of nothing but task, length, seed and index."""
        again = f"|{attempt}" if attempt else ""
        stream = "" if self.stream == "test" else f"{self.stream}|"
        text = f"{stream}{self.name}|{self.length}|{self.seed}|{index}{again}"
        return Random(int.from_bytes(hashlib.sha256(text.encode()).digest()))

    def draft(self, variant: Variant, rng: Random, question: int = 0) -> Draft:
        meter, room = self.builder.meter, max(self.room, 64)
        if self.task.family == "niah":
            hay = self.builder.texts.load() if self.task.essay else None
            return needles.draft(self.task, variant, rng, meter, room, hay)
        if self.task.family == "vt":
            return chains.draft(variant, rng, meter, room)
        if self.task.family == "cwe":
            return counted.draft_cwe(variant, rng, meter, room)
        if self.task.family == "fwe":
            return counted.draft_fwe(rng, meter, room)
        return questions.draft(self.question_set, question, variant, rng, meter, room)

    def smallest(self, draft: Draft) -> int:
        """Tokens of the prompt with the smallest context."""
        return self.builder.meter.tokens(draft.render(draft.least, 0), draft.prefix)

    def document(self, variant: Variant, index: int) -> tuple[Document, Filled]:
        """Document number `index`."""
        question = self.question(variant, index) if self.task.family == "qa" else 0
        for attempt in range(_ATTEMPTS):
            draft = self.draft(variant, self.rng(index, attempt), question)
            try:
                filled = fill(draft, self.builder.meter, self.length, self.task.new_tokens)
            except Unfit as error:
                raise self.too_short(error.needed) from error
            except Coarse as error:
                raise self.error(f"{error}; use a longer length") from error
            if all(filled.text.count(text) == 1 for text in draft.once):
                break
        else:
            raise self.error("the haystack holds every value that was tried; use other files")
        document: Document = {
            "id": f"{self.name}-{self.length}-{index}",
            "prompt": self.builder.meter.prompt(filled.text, draft.prefix),
            "target": draft.target,
            "references": draft.references,
            "match": self.task.match,
            "tokens": filled.tokens,
        }
        if self.task.family == "qa":
            document["question"] = question  # its number in the file
        if self.task.family == "niah":  # how deep the answers are, 0 to 1
            document["depths"] = [
                round(filled.text.index(text) / len(filled.text), 3) for text in draft.references
            ]
        return document, filled

    # --- which variant ---

    def choose(self) -> Variant:
        """The first variant that fits; raises `TaskError` when none does."""
        variant, need = self.fitting()
        if variant is None:
            raise self.too_short(need)
        return variant

    def fitting(self) -> tuple[Variant | None, int]:
        """(first variant that fits or None, tokens of the smallest prompt of any).

        Judged by drafts that are the same for every number of samples.
        """
        needs = []
        for variant in tasks.variants(self.name, self.length):
            if self.task.family == "qa":
                need = self.question_need(variant)
            else:
                drafts = (self.draft(variant, self.rng(f"p{index}")) for index in range(_PROBES))
                need = max(self.smallest(draft) for draft in drafts)
            needs.append(need)
            if need <= _MARGIN * self.room:
                return variant, need
        return None, min(needs)

    def too_short(self, needed: int) -> TaskError:
        """The error that names a length which is enough."""
        least, need = 0, needed
        while True:
            wanted = math.ceil(need / _MARGIN) + self.task.new_tokens
            least = max(least + 16, wanted + -wanted % 16)
            longer = replace(self, length=least, asked=[], passed_over=0)
            variant, need = longer.fitting()
            if variant is not None:
                break
        return self.error(
            f"the shortest prompt has {needed} tokens and {self.task.new_tokens} are generated; "
            f"the least length that fits is {least}"
        )

    # --- questions ---

    @functools.cached_property
    def question_set(self) -> questions.QuestionSet:
        assert self.task.dataset is not None
        if self.task.dataset not in self.builder.questions:
            raise TaskError(
                f"evaluation.tasks.{self.builder.name}.questions: {self.name} needs the questions "
                f"of {self.task.dataset}, and no file is named"
            )
        return self.builder.questions[self.task.dataset].load()

    @functools.cached_property
    def _order(self) -> list[int]:
        order = self.question_set.order(self.seed)
        # from the other end: none of these is among the scored ones while questions suffice
        return order if self.stream == "test" else order[::-1]

    def _need(self, variant: Variant, number: int) -> int:
        question, documents = self.question_set.questions[number], self.question_set.documents
        given = question.gold if variant.get("given") == "supporting" else question.given
        meter = self.builder.meter
        heading = meter.cost("\n\nDocument 100:\n")
        frame = meter.tokens(tasks.QA[0].format(context="", query=question.text), tasks.QA[1])
        return frame + sum(heading + meter.cost(documents[index]) for index in given)

    def question_need(self, variant: Variant) -> int:
        """Tokens of the prompt that half of the first questions do with."""
        needs = sorted(self._need(variant, number) for number in self._order[:16])
        return needs[len(needs) // 2]

    def question(self, variant: Variant, index: int) -> int:
        """Number of the question of document `index`: the index-th one that fits."""
        while len(self.asked) <= index:
            at = len(self.asked) + self.passed_over
            if at >= len(self._order):
                raise TaskError(
                    f"evaluation.tasks.{self.builder.name}.samples: {self.name} at {self.length} "
                    f"tokens has {len(self.asked)} questions that fit; ask for no more samples"
                )
            if self._need(variant, self._order[at]) <= _MARGIN * self.room:
                self.asked.append(self._order[at])
            else:
                self.passed_over += 1
        return self.asked[index]

    # --- facts ---

    def facts(self, variant: Variant, filled: list[Filled]) -> dict[str, Any]:
        """What a table or a sidecar says about the documents."""
        shares = [each.tokens / self.room for each in filled]
        facts: dict[str, Any] = {
            "version": VERSION,
            "task": self.name,
            "length": self.length,
            "samples": len(filled),
            "seed": self.seed,
            "new_tokens": self.task.new_tokens,
            "variant": variant,
            "official": variant == tasks.variants(self.name, self.length)[0],
            "fill": {"min": round(min(shares), 4), "mean": round(sum(shares) / len(shares), 4)},
            "topped_up": sum(each.extra > 0 for each in filled),
        }
        if self.task.stand_in:
            facts["stand_in"] = f"XQuAD (English) for {self.task.stand_in}"
        if self.task.family == "qa":
            facts["passed_over"] = self.passed_over
        return facts
