"""Sampling whose result belongs to the answer: not to its batch, its order or its process."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


def seed_of(*parts: object) -> int:
    """A seed of 64 bits for what the parts name, the same on every machine."""
    text = "|".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


class SeededSampling(LogitsProcessor):
    """Turn greedy decoding into sampling, each row of a batch with a generator of its own.

    Temperature, top-k and top-p are the library's own filters. Then Gumbel noise is added: the
    argmax of `log p + G` with independent standard Gumbel `G` is an exact draw from `p` (Gumbel-max
    trick; Maddison, Tarlow and Minka, "A* Sampling", 2014, section 2). Each step of each row takes
    V numbers from the row's generator, whatever the other rows do. Generators live on the device of
    the model; those of a CPU and a GPU give different numbers.
    """

    def __init__(
        self,
        seeds: Sequence[int],
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.filters: list[LogitsProcessor] = []
        if temperature != 1.0:
            self.filters.append(TemperatureLogitsWarper(temperature))
        if top_k:
            self.filters.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self.filters.append(TopPLogitsWarper(top_p))
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) whose argmax is a sample; B rows, V words."""
        for step in self.filters:
            scores = step(input_ids, scores)
        # float64: in float32 the smallest draws are too coarse for words of small probability
        noise = torch.empty(scores.shape, dtype=torch.float64, device=scores.device)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores.double() - noise.log()  # -log of an exponential is Gumbel
