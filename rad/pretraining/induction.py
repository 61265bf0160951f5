"""The induction phase: repeats of random tokens, on which looking-up heads form.

On the task mixture alone these heads may not form within many millions of tokens; on repeats
they come within a few hundred steps, as a sudden, seed-dependent transition.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST_ORDINARY_TOKEN = 3  # after <pad>, <s>, </s>


def induction_batch(
    generator: torch.Generator,
    rows: int,
    context: int,
    vocabulary: int,
    block: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Rows that repeat a random block: ids (rows, context) and weights (1 on the repeats)."""
    low, high = block
    ids = torch.empty(rows, context, dtype=torch.long)
    weights = torch.ones(rows, context)
    sizes = torch.randint(low, high + 1, (rows,), generator=generator)
    fresh = torch.randint(FIRST_ORDINARY_TOKEN, vocabulary, (rows, high), generator=generator)
    for row, size in enumerate(sizes.tolist()):
        copies = -(-context // size)
        ids[row] = fresh[row, :size].repeat(copies)[:context]
        weights[row, :size] = 0.0
    return ids, weights


def transition_made(losses: list[float], threshold: float, window: int = 10) -> bool:
    """Whether the mean of the last `window` losses lies under `threshold`."""
    recent = losses[-window:]
    return len(recent) == window and sum(recent) / window < threshold
