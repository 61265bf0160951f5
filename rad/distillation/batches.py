"""The order in which training rows are seen: a function of the seed and the step alone.

Every run of a study with one seed sees the same rows in the same order, whatever its selector and
however many processes share the work, which removes most of the data noise from comparisons.
Legend: R rows, B batch, T context.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rad.data.corpus import Corpus, CorpusError


@dataclass(frozen=True)
class Batch:
    """Rows of a corpus: tokens (B,T) int64, weight (B,T) float32, rows (B,) int64, their numbers.

    `boundaries` (B,T) uint8 where documents of a row must not see each other, else None.
    """

    tokens: Tensor
    weight: Tensor
    rows: Tensor
    boundaries: Tensor | None = None

    def split(self, parts: int) -> Iterator[Batch]:
        """The batch in `parts` equal micro-batches."""
        size = len(self.tokens) // parts
        for start in range(0, len(self.tokens), size):
            part = slice(start, start + size)
            boundaries = None if self.boundaries is None else self.boundaries[part]
            yield Batch(self.tokens[part], self.weight[part], self.rows[part], boundaries)

    def dealt(self, number: int, count: int) -> Batch:
        """The rows of process `number` of `count`: every count-th one."""
        if count == 1:
            return self
        part = slice(number, None, count)
        boundaries = None if self.boundaries is None else self.boundaries[part]
        return Batch(self.tokens[part], self.weight[part], self.rows[part], boundaries)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device; the numbers of the rows stay."""
        boundaries = None if self.boundaries is None else self.boundaries.to(device)
        return Batch(self.tokens.to(device), self.weight.to(device), self.rows, boundaries)


class Batches:
    """Batches of a corpus split by step number; epochs are shuffled anew.

    `context` cuts rows into shorter ones, which must come out even. Raises `CorpusError` when it
    does not, or when the split is empty.
    """

    def __init__(
        self,
        corpus: Corpus,
        batch_size: int,
        seed: int,
        split: str = "train",
        context: int | None = None,
    ) -> None:
        _check_rows(corpus, split)
        self.rows, self.weight = corpus.rows(split), corpus.weights(split)
        self.boundaries = corpus.boundaries(split) if corpus.isolated else None
        self.context = effective_context(corpus, context)
        if self.context != corpus.context:
            self.rows = self.rows.reshape(-1, self.context)
            self.weight = self.weight.reshape(-1, self.context)
            if self.boundaries is not None:
                self.boundaries = self.boundaries.reshape(-1, self.context)
        self.batch_size, self.seed = batch_size, seed
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of one batch."""
        return self.batch_size * self.context

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))

    def index(self, step: int) -> np.ndarray:
        """Numbers (B,) of the rows of a step, counted from 0."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(positions, len(self.rows))
        return np.asarray(
            [self._order(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)]
        )

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0."""
        index = self.index(step)
        tokens, weight = slice_of(self.rows, self.weight, index)
        rows = torch.from_numpy(index.astype(np.int64))
        if self.boundaries is None:
            return Batch(tokens, weight, rows)
        boundaries = torch.from_numpy(np.array(self.boundaries[index]))
        return Batch(tokens, weight, rows, boundaries)

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens (B,T) int64 and weights (B,T) float32 of a step, counted from 0."""
        batch = self.batch(step)
        return batch.tokens, batch.weight


def _check_rows(corpus: Corpus, split: str) -> None:
    if not corpus.manifest["splits"][split]["rows"]:
        raise CorpusError(f"{corpus.folder}: split {split} has no rows; rebuild the corpus")


def effective_context(corpus: Corpus, context: int | None) -> int:
    """Tokens of a sequence when `context` is the longest that is wanted.

    Raises `CorpusError` when the corpus's rows cannot be cut into pieces of that size.
    """
    if context is None or context >= corpus.context:
        return corpus.context
    if corpus.context % context:
        raise CorpusError(
            f"{corpus.folder}: rows of {corpus.context} tokens do not divide into pieces of "
            f"{context}; build the corpus with a multiple of it"
        )
    return context


def slice_of(
    rows: np.ndarray, weight: np.ndarray, index: np.ndarray | slice
) -> tuple[Tensor, Tensor]:
    """Chosen rows as tensors: tokens (B,T) int64 and weights (B,T) float32 in [0, 1]."""
    tokens = torch.from_numpy(rows[index].astype(np.int64))
    return tokens, torch.from_numpy(weight[index].astype(np.float32) / 255)


def held_out(corpus: Corpus, rows: int) -> Batch:
    """The first rows of the held-out split."""
    _check_rows(corpus, "held_out")
    chosen = slice(0, rows)
    tokens, weight = slice_of(corpus.rows("held_out"), corpus.weights("held_out"), chosen)
    numbers = torch.arange(len(tokens))
    if not corpus.isolated:
        return Batch(tokens, weight, numbers)
    boundaries = torch.from_numpy(np.array(corpus.boundaries("held_out")[chosen]))
    return Batch(tokens, weight, numbers, boundaries)
