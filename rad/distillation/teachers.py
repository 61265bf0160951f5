"""Teachers: a model at hand, or what a model that ran earlier has left on disk.

Legend: B batch, T time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rad.data.corpus import Corpus
from rad.distillation.stored import StoredError, StoredOutputs, corpus_digest
from rad.distillation.targets import Targets, align_vocabulary, check_head, head_of, rows_hidden


class Teacher(ABC):
    """Whatever says what the next tokens should be.

    `vocabulary`: rows of the heads that a student is compared on, an argument of the losses.
    """

    vocabulary: int

    @abstractmethod
    def targets(
        self,
        tokens: Tensor,
        rows: Sequence[int] | Tensor,
        *,
        split: str = "train",
        boundaries: Tensor | None = None,
    ) -> Targets:
        """What the teacher says at every position of tokens (B,T), rows `rows` of a corpus split.

        `boundaries` (B,T): documents of isolated packing, run one by one.
        """


class LiveTeacher(Teacher):
    """A model in memory, run without gradients on every batch; kept in evaluation mode."""

    def __init__(self, model: Any, vocabulary: int | None = None) -> None:
        """`vocabulary`: from `align_vocabulary`; default: all rows of the model's head.

        Raises `ValueError` when the model's logits are not its head of its hidden states.
        """
        check_head(model)
        self.model = model.eval()
        self.vocabulary = head_of(model).vocabulary if vocabulary is None else vocabulary

    @torch.no_grad()
    def targets(
        self,
        tokens: Tensor,
        rows: Sequence[int] | Tensor = (),
        *,
        split: str = "train",
        boundaries: Tensor | None = None,
    ) -> Targets:
        """Hidden states and head of the model; `rows` and `split` do not matter."""
        hidden = rows_hidden(self.model, tokens, boundaries)
        return Targets("hidden", hidden=hidden, head=head_of(self.model).detach())


class StoredTeacher(Teacher):
    """The outputs that `teacher_outputs.write_outputs` stored for this very corpus."""

    def __init__(
        self,
        folder: Path,
        corpus: Corpus,
        *,
        vocab_size: int,
        teacher_sha256: str | None = None,
        tokenizer_sha256: str | None = None,
        device: torch.device | str = "cpu",
        verify: bool = False,
        wait_minutes: float | None = None,
    ) -> None:
        """`vocab_size`, `tokenizer_sha256`: the student's (default: the corpus' tokenizer).

        `teacher_sha256`: the teacher expected.

        `verify` compares every file with its digest. With `wait_minutes`, shards that are still to
        come are waited for, until none came for so long. Raises `StoredError` when the outputs are
        incomplete or damaged, or of another corpus, teacher or vocabulary.
        """
        self.outputs = StoredOutputs(folder, verify=verify, wait_minutes=wait_minutes)
        self.device = torch.device(device)
        stored = self.outputs.manifest
        if stored["corpus_sha256"] != corpus_digest(corpus):
            raise StoredError(
                f"{folder}: stored for another corpus than {corpus.folder}; store the teacher's "
                "outputs for this one"
            )
        if teacher_sha256 is not None and stored["teacher_sha256"] != teacher_sha256:
            raise StoredError(
                f"{folder}: stored from another teacher ({stored['teacher_sha256'][:12]}, wanted "
                f"{teacher_sha256[:12]}); store the outputs of this one"
            )
        try:
            common = align_vocabulary(
                vocab_size,
                stored["vocab_size"],
                int(corpus.manifest.get("vocab_size", 0)),
                student_tokenizer=tokenizer_sha256
                or corpus.manifest.get("tokenizer_sha256")
                or None,
                teacher_tokenizer=stored["tokenizer_sha256"] or None,
            )
        except ValueError as error:
            raise StoredError(f"{folder}: {error}") from error
        self.vocabulary = min(common, stored["vocabulary"])
        if stored["kind"] != "hidden" and stored["vocabulary"] > vocab_size:
            raise StoredError(
                f"{folder}: probabilities over {stored['vocabulary']} rows, the student's head has "
                f"{vocab_size}; store them with vocabulary={common}"
            )
        self._head = self.outputs.head() if stored["kind"] == "hidden" else None

    def targets(
        self,
        tokens: Tensor,
        rows: Sequence[int] | Tensor,
        *,
        split: str = "train",
        boundaries: Tensor | None = None,
    ) -> Targets:
        """What was stored for `rows`; `boundaries` had their effect when it was stored.

        Raises `StoredError` when the tokens are not those of the rows, or a value is no number.
        """
        found = self.outputs.read(split, tokens, [int(row) for row in rows])
        found = {name: tensor.to(self.device) for name, tensor in found.items()}
        if self._head is not None and self._head.weight.device != self.device:
            self._head = self._head.to(self.device)
        stored = self.outputs.manifest
        return Targets(stored["kind"], head=self._head, temperature=stored["temperature"], **found)
