"""The endless task mixture that the nano models are trained on, and its packing into rows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rad.data.nano import crux, gsm, ruler, text
from rad.data.nano.example import Example, split_of
from rad.data.nano.tokenizer import token_length
from rad.data.nano.words import NOUNS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

# Shares are of documents; a retrieval document is about twice as long as the others.
SHARES: dict[str, float] = {
    "gsm_nano": 0.36,
    "crux_nano": 0.36,
    "ruler_nano": 0.20,
    "text_nano": 0.08,
}
HARD_SHARE = 0.3  # of the documents above the easy level,
TOP_SHARE = 0.4  # and of those at the level of the `hard` split
TRAIN_CONTEXT = 128
PROMPT_WEIGHT = 0.1
_RULER_SHARES = {"single": 0.2, "multikey": 0.4, "vt": 0.25, "cwe": 0.15}


def _document(
    rng: random.Random,
    shares: dict[str, float],
    hard_share: float,
    top_share: float,
    crux_turns: int,
    trace_share: float | None,
    trace: str,
    length: ruler.Length,
) -> Example:
    family = rng.choices(list(shares), list(shares.values()))[0]
    level = int(rng.random() < hard_share)
    if level and top_share and rng.random() < top_share:
        level = 2
    if family == gsm.FAMILY:
        return gsm.build(rng, level)
    if family == crux.FAMILY:
        return crux.build(rng, level, crux_turns)
    if family == text.FAMILY:
        return text.build(rng, level)
    parts = dict(_RULER_SHARES)
    if trace_share is not None:
        rest = sum(share for task, share in parts.items() if task != "vt")
        parts = {task: share * (1 - trace_share) / rest for task, share in parts.items()}
        parts["vt"] = trace_share
    task = rng.choices(list(parts), list(parts.values()))[0]
    tokens = rng.choice((48, 64, 96, TRAIN_CONTEXT, TRAIN_CONTEXT))
    # Every question that fits is asked, so that a context gives much retrieval signal.
    return ruler.build(
        rng,
        level,
        length=length,
        task=task,
        tokens=tokens,
        turns=len(NOUNS),
        trace=trace,
    )


def training_documents(
    seed: int,
    *,
    shares: dict[str, float] | None = None,
    hard_share: float = HARD_SHARE,
    top_share: float = TOP_SHARE,
    crux_turns: int = 1,
    trace_share: float | None = None,
    trace: str = "path",
    length: ruler.Length | None = None,
) -> Iterator[Example]:
    """The mixture of all families, without end; no prompt belongs to test or hard."""
    rng = random.Random(f"nano/mixture/{seed}")
    measure = token_length if length is None else length
    mix = SHARES if shares is None else shares
    while True:
        example = _document(
            rng, mix, hard_share, top_share, crux_turns, trace_share, trace, measure
        )
        if split_of(example.prompt) == "train":
            yield example


def encode(example: Example, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[float]]:
    """Token ids of `<s> prompt answer </s> [question answer </s> ...]` and each one's weight."""
    ids, weights = [tokenizer.bos_token_id], [0.0]
    for prompt, answer in [(example.prompt, example.answer), *example.meta.get("turns", [])]:
        asked = tokenizer.encode(prompt, add_special_tokens=False)
        given = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
        ids += asked + given
        weights += [PROMPT_WEIGHT] * len(asked) + [1.0] * len(given)
    return ids, weights


def rows(
    documents: Iterator[Example],
    tokenizer: PreTrainedTokenizerFast,
    context: int = TRAIN_CONTEXT,
    pool_size: int = 64,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Rows of whole documents packed back to back: ids (context,) and loss weights (context,).

    A document is never cut: a question without its context would be noise. From a pool of
    waiting documents the longest that still fits is taken, so little padding remains.
    """
    import numpy as np

    pool: list[tuple[list[int], list[float]]] = []
    while True:
        while len(pool) < pool_size:
            document = encode(next(documents), tokenizer)
            if len(document[0]) <= context:
                pool.append(document)
        ids = np.full(context, tokenizer.pad_token_id, dtype=np.int64)
        weights = np.zeros(context, dtype=np.float32)
        at = 0
        index: int | None = 0  # the oldest first, so that nothing waits for ever
        while index is not None:
            taken, weight = pool.pop(index)
            ids[at : at + len(taken)] = taken
            weights[at : at + len(taken)] = weight
            at += len(taken)
            fitting = [i for i, (d, _) in enumerate(pool) if len(d) <= context - at]
            index = max(fitting, key=lambda i: len(pool[i][0])) if fitting else None
        yield ids, weights
