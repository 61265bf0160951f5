"""Packing of documents into rows, and documents of a row run so that nothing leaks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models_fixture import MIXERS, base_model, placement

from rad.data.isolation import document_index, fold, isolated, unfold
from rad.data.packing import PADDING, START, Row, concatenated_rows, whole_rows
from rad.data.sources import Document
from rad.models.convert import convert

PAD, BOS = 0, 1


def _documents(lengths: list[int], divisible: bool = True) -> Iterator[Document]:
    """Document n is BOS and then the token 10 + n."""
    for number, length in enumerate(lengths):
        ids = np.full(length, 10 + number, dtype=np.int64)
        ids[0] = BOS
        yield Document(ids, np.ones(length, dtype=np.float32), number.to_bytes(2), divisible)


def _tensors(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, _, boundaries = (np.stack(parts) for parts in zip(*rows, strict=True))
    return torch.from_numpy(ids), torch.from_numpy(boundaries)


LENGTHS = st.lists(st.integers(1, 90), min_size=1, max_size=40)


@given(LENGTHS, st.integers(9, 40))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_documents_laid_end_to_end(lengths: list[int], context: int) -> None:
    rows = list(concatenated_rows(_documents(lengths), context))
    everything = np.concatenate([document.ids for document in _documents(lengths)])
    assert len(rows) == len(everything) // context
    if not rows:
        return
    ids = np.concatenate([row.ids for row in rows])
    assert np.array_equal(ids, everything[: len(ids)])
    assert np.array_equal(np.concatenate([row.boundaries for row in rows]) == START, ids == BOS)


@given(LENGTHS, st.integers(9, 40), st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rows_of_whole_documents(lengths: list[int], context: int, divisible: bool) -> None:
    rows = list(whole_rows(_documents(lengths, divisible), context, PAD, pool_size=4))
    placed: dict[int, list[int]] = {}
    for row in rows:
        assert row.boundaries[0] == START
        padding = row.boundaries == PADDING
        assert np.array_equal(padding, np.arange(context) >= (~padding).sum())
        assert (row.ids[padding] == PAD).all() and (row.weights[padding] == 0).all()
        assert (row.weights[row.boundaries == START] == 0).all()
        starts = [*np.flatnonzero(row.boundaries == START), (~padding).sum()]
        for start, end in itertools.pairwise(starts):
            piece = row.ids[start:end]
            # a piece holds one document: its number is that of its last token
            placed.setdefault(int(piece[-1]) if len(piece) > 1 else -1, []).append(len(piece))
            assert len(set(piece[1:])) <= 1
    total = sum(sum(pieces) for pieces in placed.values())
    kept = [n for n in lengths if divisible or n <= context]
    assert total == sum(kept)
    for number, length in enumerate(lengths):
        if 1 < length <= context:
            assert length in placed[10 + number]


def test_the_pool_leaves_little_padding() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(5, 120, 2000)]
    rows = list(whole_rows(_documents(lengths), 256, PAD))
    padding = np.mean([(row.boundaries == PADDING).mean() for row in rows[:-5]])
    assert padding < 0.02


@given(LENGTHS, st.integers(9, 70))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_unfolding_takes_every_token_once_and_folding_puts_it_back(
    lengths: list[int], context: int
) -> None:
    for rows in (
        list(concatenated_rows(_documents(lengths), context)),
        list(whole_rows(_documents(lengths), context, PAD)),
    ):
        if not rows:
            continue
        tokens, boundaries = _tensors(rows)
        parts = unfold(tokens, boundaries)
        real = boundaries != PADDING
        assert sum(int(part.mask.sum()) for part in parts) == int(real.sum())
        back = fold([part.tokens for part in parts], parts, *tokens.shape)
        assert torch.equal(back, torch.where(real, tokens, 0))
        index = document_index(boundaries)
        for part in parts:
            assert torch.equal(part.take(tokens), part.tokens)
            width = part.tokens.shape[1]
            # one document per sequence, on the left; at most half padding from the width 32 on
            assert torch.equal(part.mask.long().cumsum(1)[:, -1], part.mask.long().sum(1))
            assert part.mask[:, 0].all() and (part.mask.long().diff(dim=1) <= 0).all()
            assert width <= 31 or (part.mask.sum(1) * 2 >= width).all()
            rows_of = part.places // context
            documents = index.flatten()[part.places] + rows_of * context
            first = documents[:, :1].expand_as(documents)
            assert torch.equal(documents[part.mask], first[part.mask])


def test_rows_can_be_dealt_out_before_they_are_unfolded() -> None:
    lengths = [int(n) for n in np.random.default_rng(1).integers(2, 60, 60)]
    tokens, boundaries = _tensors(list(whole_rows(_documents(lengths), 64, PAD))[:12])

    def documents(chosen: slice) -> list[list[int]]:
        return [
            sequence[mask].tolist()
            for part in unfold(tokens[chosen], boundaries[chosen])
            for sequence, mask in zip(part.tokens, part.mask, strict=True)
        ]

    together = documents(slice(0, 12))
    for processes in (2, 3):
        share = 12 // processes
        apart = [
            d
            for rank in range(processes)
            for d in documents(slice(rank * share, (rank + 1) * share))
        ]
        assert sorted(apart) == sorted(together)


def test_rows_of_padding_alone_are_refused() -> None:
    boundaries = torch.full((1, 16), PADDING, dtype=torch.uint8)
    with pytest.raises(ValueError, match="rows of padding alone"):
        isolated(lambda tokens: tokens, torch.zeros(1, 16, dtype=torch.long), boundaries)


# --- nothing leaks --------------------------------------------------------------------------

# row 0: documents of 9 and 12 tokens, padding; row 1: documents of 20 and 4
STARTS, TIME = ((0, 9), (0, 20)), 24
DOCUMENT = slice(9, 21)  # the second document of row 0
CASES = [
    *((mixer, kind) for mixer in MIXERS for kind in ("mixed", "heads")),
    *((mixer, "none") for mixer in MIXERS if mixer != "skip"),
]


def _rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(3, 96, (2, TIME), generator=torch.Generator().manual_seed(seed))
    boundaries = torch.zeros(2, TIME, dtype=torch.uint8)
    for row, starts in enumerate(STARTS):
        boundaries[row, list(starts)] = START
    boundaries[0, 21:] = PADDING
    tokens[0, 21:] = PAD
    return tokens, boundaries


def _hybrid(mixer: str, kind: str) -> Any:
    return convert(base_model(), placement(kind), MIXERS[mixer], "qkvo")


@torch.no_grad()
@pytest.mark.parametrize(("mixer", "kind"), CASES)
def test_another_document_changes_nothing_in_isolation_and_much_without(
    mixer: str, kind: str
) -> None:
    hybrid = _hybrid(mixer, kind)
    tokens, boundaries = _rows()
    changed = tokens.clone()
    changed[0, :9] = torch.randint(3, 96, (9,), generator=torch.Generator().manual_seed(5))

    def alone(rows: torch.Tensor) -> torch.Tensor:
        return isolated(lambda part: hybrid(part, use_cache=False).logits, rows, boundaries)

    before, after = alone(tokens)[0], alone(changed)[0]
    assert torch.equal(before[DOCUMENT], after[DOCUMENT])
    assert not torch.equal(before[:9], after[:9])
    assert (before[21:] == 0).all()
    # and they are what the document gives when there is nothing else
    expected = hybrid(tokens[:1, DOCUMENT], use_cache=False).logits[0]
    torch.testing.assert_close(before[DOCUMENT], expected, rtol=1e-4, atol=1e-4)
    # without isolation, attention and states run on
    joined = [hybrid(rows, use_cache=False).logits[0, DOCUMENT] for rows in (tokens, changed)]
    assert (joined[0] - joined[1]).abs().max() > 1e-3


@pytest.mark.parametrize("mixer", ["mamba2", "gated_deltanet", "sliding_window"])
def test_no_gradient_flows_from_one_document_into_another(mixer: str) -> None:
    hybrid = _hybrid(mixer, "mixed")
    tokens, boundaries = _rows()
    embedding = hybrid.get_input_embeddings()
    inputs: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, output: torch.Tensor) -> None:
        output.retain_grad()
        inputs.append(output)

    handle = embedding.register_forward_hook(keep)
    parts = unfold(tokens, boundaries)
    logits = fold(
        [hybrid(part.tokens, use_cache=False).logits for part in parts], parts, *tokens.shape
    )
    logits[0, DOCUMENT].square().sum().backward()
    handle.remove()
    gradient = fold([value.grad for value in inputs], parts, *tokens.shape)
    size = gradient.abs().sum(-1)
    assert (size[0, DOCUMENT] > 0).all()
    assert (size[0, :9] == 0).all() and (size[1] == 0).all()
