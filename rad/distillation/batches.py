"""The order in which training rows are seen: a function of the seed and the step alone.

Every run of a study with one seed sees the same rows in the same order, whatever its selector,
which removes most of the data noise from comparisons. Legend: B batch, T context.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from rad.data.corpus import Corpus


class Batches:
    """Batches of a corpus split by step number; epochs are shuffled anew."""

    def __init__(self, corpus: Corpus, batch_size: int, seed: int, split: str = "train") -> None:
        self.rows, self.weight = corpus.rows(split), corpus.weights(split)
        self.batch_size, self.seed = batch_size, seed
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    @property
    def tokens_per_batch(self) -> int:
        """Tokens of one batch."""
        return self.batch_size * int(self.rows.shape[1])

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.rows))

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens (B,T) int64 and weights (B,T) float32 of a step, counted from 0."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(positions, len(self.rows))
        index = [
            self._order(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)
        ]
        return slice_of(self.rows, self.weight, np.asarray(index))


def slice_of(
    rows: np.ndarray, weight: np.ndarray, index: np.ndarray | slice
) -> tuple[Tensor, Tensor]:
    """Chosen rows as tensors: tokens (B,T) int64 and weights (B,T) float32 in [0, 1]."""
    tokens = torch.from_numpy(rows[index].astype(np.int64))
    return tokens, torch.from_numpy(weight[index].astype(np.float32) / 255)
