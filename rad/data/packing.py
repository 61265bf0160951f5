"""Rows of tokens out of documents, with the places where documents begin.

    concatenate   | <s> a a a </s> <s> b b | b b b </s> <s> c c c |     no padding, documents cut
    whole         | <s> a a a </s> <s> c c </s> . . | ...               no document cut, padding

Legend: T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rad.data.sources import Document

# what a boundary file says of each token
INSIDE, START, PADDING = 0, 1, 2
POOL_SIZE = 64


class Row(NamedTuple):
    """One row of a corpus."""

    ids: NDArray[np.int64]  # (T,)
    weights: NDArray[np.float32]  # (T,) loss weight of predicting each token
    boundaries: NDArray[np.uint8]  # (T,) INSIDE, START or PADDING


def concatenated_rows(documents: Iterator[Document], context: int) -> Iterator[Row]:
    """Rows cut from the documents laid end to end; what fills no row at the end is dropped."""
    waiting: list[Row] = []
    length = 0
    for document in documents:
        boundaries = np.full(len(document.ids), INSIDE, dtype=np.uint8)
        boundaries[:1] = START
        waiting.append(Row(document.ids, document.weights, boundaries))
        length += len(document.ids)
        if length < context:
            continue
        ids, weights, marks = (np.concatenate(parts) for parts in zip(*waiting, strict=True))
        for at in range(0, length - context + 1, context):
            cut = slice(at, at + context)
            yield Row(ids[cut], weights[cut], marks[cut])
        rest = slice(length - length % context, length)
        waiting, length = [Row(ids[rest], weights[rest], marks[rest])], length % context


def whole_rows(
    documents: Iterator[Document], context: int, pad: int, pool_size: int = POOL_SIZE
) -> Iterator[Row]:
    """Rows of whole documents; one longer than a row is cut into rows, or dropped if indivisible.

    From a pool of waiting documents the longest that still fits is taken, so little padding
    remains. The first token of a document weighs nothing: nothing before it is about it.
    """
    pool: list[Document] = []
    more = True
    while True:
        while more and len(pool) < pool_size:
            document = next(documents, None)
            if document is None:
                more = False
            else:
                pool += _pieces(document, context)
        if not pool:
            return
        ids = np.full(context, pad, dtype=np.int64)
        weights = np.zeros(context, dtype=np.float32)
        boundaries = np.full(context, PADDING, dtype=np.uint8)
        at = 0
        index: int | None = 0  # the oldest first, so that nothing waits for ever
        while index is not None:
            taken = pool.pop(index)
            place = slice(at, at + len(taken.ids))
            ids[place], weights[place], boundaries[place] = taken.ids, taken.weights, INSIDE
            weights[at], boundaries[at] = 0.0, START
            at = place.stop
            fitting = [i for i, waiting in enumerate(pool) if len(waiting.ids) <= context - at]
            index = max(fitting, key=lambda i: len(pool[i].ids)) if fitting else None
        yield Row(ids, weights, boundaries)


def _pieces(document: Document, context: int) -> list[Document]:
    if len(document.ids) <= context:
        return [document]
    if not document.divisible:
        return []
    return [
        document._replace(ids=document.ids[at:end], weights=document.weights[at:end])
        for at in range(0, len(document.ids), context)
        for end in [at + context]
    ]
