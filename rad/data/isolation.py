"""Documents of a row run by themselves, and put back in their places: nothing can leak.

    row   | a a a a | b b | c c c c c . |        documents of one row of a corpus, padding
    run     a a a a     b b .     c c c c c      each a sequence of its own, padded on the right

Softmax layers, convolutions and recurrent states all start anew because every document *is* a
sequence; a block-diagonal mask would reach the softmax layers alone. Padding stands behind its
document, so a causal model needs no mask for it. Only the model is run on unfolded documents:
results are folded back to (B,T), where losses and weights stay as they are. Legend: B rows, T
tokens of a row, S documents, L tokens of the longest of them, F any further dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rad.data.packing import PADDING, START

# no part is narrower than this: the gain would not pay for another call
_NARROWEST = 16


@dataclass(frozen=True)
class Unfolded:
    """Documents of similar length, one per row."""

    tokens: Tensor  # (S,L) int64
    mask: Tensor  # (S,L) bool, False at padding
    places: Tensor  # (S,L) int64: place of each token in the flattened rows (B*T); 0 at padding

    def take(self, values: Tensor) -> Tensor:
        """What `values` (B,T,F) says of these tokens: (S,L,F), zero at padding."""
        taken = values.flatten(0, 1)[self.places]
        return taken.masked_fill(~_spread(self.mask, taken), 0)


def document_index(boundaries: Tensor) -> Tensor:
    """Which document of its row each token is of: (B,T) uint8 -> (B,T) int64, -1 at padding.

    What stands before the first start (the rest of a document cut by the row) is one of its own.
    """
    starts = boundaries == START
    starts[:, 0] = True
    return (starts.long().cumsum(1) - 1).masked_fill(boundaries == PADDING, -1)


def unfold(tokens: Tensor, boundaries: Tensor, pad: int = 0) -> list[Unfolded]:
    """Rows (B,T) as documents, in parts of widths T, T/2, T/4, ...: each at most half padding.

    Every token that is no padding comes exactly once. The order of documents is that of their
    rows, so rows may be dealt out to processes before: parts of part of the rows hold the same
    documents.
    """
    batch, time = tokens.shape
    index = document_index(boundaries)
    real = index >= 0  # (B,T)
    begins = real & torch.cat([real.new_ones(batch, 1), index.diff(dim=1) != 0], dim=1)
    starts = begins.flatten().nonzero().squeeze(1)  # (S,) in B*T
    segment = begins.flatten().cumsum(0) - 1  # document of each token among all
    lengths = torch.bincount(segment[real.flatten()], minlength=len(starts))  # (S,)
    parts = []
    upper = time
    while upper > 0 and len(starts):
        lower = upper // 2 if upper // 2 >= _NARROWEST else 0
        chosen = (lengths <= upper) & (lengths > lower)
        if chosen.any():
            parts.append(_part(tokens, starts[chosen], lengths[chosen], upper, pad))
        upper = lower
    return parts


def _part(tokens: Tensor, starts: Tensor, lengths: Tensor, width: int, pad: int) -> Unfolded:
    steps = torch.arange(width, device=tokens.device)
    mask = steps < lengths.unsqueeze(1)  # (S,L)
    places = (starts.unsqueeze(1) + steps).masked_fill(~mask, 0)
    chosen = tokens.flatten()[places].masked_fill(~mask, pad)
    return Unfolded(chosen, mask, places)


def fold(values: list[Tensor], parts: list[Unfolded], batch: int, time: int) -> Tensor:
    """Results of all parts, each (S,L,F), in the places of their tokens: (B,T,F), else zero."""
    first = values[0]
    rows = first.new_zeros(batch * time, *first.shape[2:])
    for value, part in zip(values, parts, strict=True):
        rows = rows.index_copy(0, part.places[part.mask], value[part.mask])
    return rows.view(batch, time, *rows.shape[1:])


def isolated(
    forward: Callable[[Tensor], Tensor], tokens: Tensor, boundaries: Tensor, pad: int = 0
) -> Tensor:
    """`forward` ((S,L) tokens -> (S,L,F)) of every document by itself, as rows (B,T,F).

    `forward` must be causal and start from an empty state; padding of the rows comes out as zero.
    Raises `ValueError` when there is no token but padding.
    """
    parts = unfold(tokens, boundaries, pad)
    if not parts:
        raise ValueError("rows of padding alone: there is nothing to run")
    return fold([forward(part.tokens) for part in parts], parts, *tokens.shape)


def _spread(mask: Tensor, values: Tensor) -> Tensor:
    return mask.reshape(*mask.shape, *[1] * (values.dim() - 2))
