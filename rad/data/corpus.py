"""Token corpora: rows of tokens with loss weights, in flat memory-mapped files.

`build` writes `corpus/<name>/` (docs/contracts.md), `Corpus` reads it. The held-out split shares no
document with the training split. Legend: R rows, T context.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rad.data.text import hub_documents, text_documents
from rad.files import digest, read_json, replacing, write_json
from rad.settings import CorpusSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Row = tuple[NDArray[np.int64], NDArray[np.float32]]


class CorpusError(ValueError):
    """A corpus that cannot be built or read; the message names the file and the remedy."""


class Corpus:
    """A corpus on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = read_json(self.folder / "manifest.json")
        self.context: int = self.manifest["context"]

    def rows(self, split: str) -> NDArray[Any]:
        """(R, T) token ids, memory-mapped."""
        return self._map(f"{split}.bin", split, np.dtype(self.manifest["dtype"]))

    def weights(self, split: str) -> NDArray[Any]:
        """(R, T) loss weights of predicting the token at each position, uint8 in 1/255."""
        return self._map(f"{split}_weight.bin", split, np.dtype("uint8"))

    def _map(self, name: str, split: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        path = self.folder / name
        shape = (self.manifest["splits"][split]["rows"], self.context)
        want = shape[0] * shape[1] * dtype.itemsize
        if not path.exists() or path.stat().st_size != want:
            found = path.stat().st_size if path.exists() else "no file"
            raise CorpusError(f"{path}: expected {want} bytes, found {found}; rebuild the corpus")
        return np.memmap(path, dtype=dtype, mode="r", shape=shape)


def build(
    name: str,
    settings: CorpusSettings,
    tokenizer: PreTrainedTokenizerFast,
    output: Path,
    *,
    tokenizer_sha256: str = "",
) -> dict[str, Any]:
    """Write the corpus to folder `output` and return its manifest.

    Raises `CorpusError` when the source has too few tokens or a file is missing.
    """
    wanted = {
        "held_out": -(-settings.held_out_tokens // settings.context),
        "train": -(-settings.tokens // settings.context),
    }
    dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
    sources = _nano_rows if settings.source == "nano" else _packed_rows
    splits: dict[str, dict[str, int]] = {}
    stream = sources(settings, tokenizer, wanted["held_out"])
    for split in ("held_out", "train"):
        tokens = np.zeros((wanted[split], settings.context), dtype=dtype)
        weights = np.zeros((wanted[split], settings.context), dtype=np.uint8)
        filled = 0
        for ids, weight in stream:
            tokens[filled], weights[filled] = ids, np.rint(weight * 255)
            filled += 1
            if filled == wanted[split]:
                break
        if filled < wanted[split]:
            raise CorpusError(
                f"corpora.{name}: the source has {filled * settings.context} tokens for split "
                f"{split}, {wanted[split] * settings.context} are asked for; "
                f"lower corpora.{name}.tokens or add files"
            )
        for suffix, array in (("", tokens), ("_weight", weights)):
            with replacing(output / f"{split}{suffix}.bin") as temporary:
                array.tofile(temporary)
        splits[split] = {
            "rows": filled,
            "tokens": filled * settings.context,
            "weighted_tokens": int((weights > 0).sum()),
            "documents": int((tokens == tokenizer.bos_token_id).sum()),
        }
    manifest = {
        "schema": 1,
        "name": name,
        "context": settings.context,
        "dtype": dtype.str,
        "vocab_size": len(tokenizer),
        "tokenizer_sha256": tokenizer_sha256,
        "settings": settings.model_dump(mode="json"),
        "settings_sha256": digest(settings.model_dump(mode="json")),
        "splits": splits,
    }
    write_json(output / "manifest.json", manifest)
    return manifest


def _nano_rows(
    settings: CorpusSettings, tokenizer: PreTrainedTokenizerFast, held_out: int
) -> Iterator[Row]:
    """Rows of whole nano documents; the first `held_out` rows' prompts never come again."""
    from rad.data.nano.example import Example
    from rad.data.nano.mixture import PROMPT_WEIGHT, rows, training_documents

    def weighted(row: Row) -> Row:
        ids, weight = row
        # float32 rounding: the mixture marks prompt tokens with this very weight
        prompt = np.isclose(weight, PROMPT_WEIGHT)
        return ids, np.where(prompt, np.float32(settings.prompt_weight), weight)

    reserved: set[str] = set()

    def remember(documents: Iterator[Example]) -> Iterator[Example]:
        for document in documents:
            reserved.add(document.prompt)
            yield document

    first = rows(remember(training_documents(settings.seed + 1)), tokenizer, settings.context)
    for _ in range(held_out):
        yield weighted(next(first))
    fresh = (d for d in training_documents(settings.seed) if d.prompt not in reserved)
    for row in rows(fresh, tokenizer, settings.context):
        yield weighted(row)


def _packed_rows(
    settings: CorpusSettings, tokenizer: PreTrainedTokenizerFast, held_out: int
) -> Iterator[Row]:
    """Rows cut from `<s> document </s>` laid end to end, every token weighing 1.

    Documents are shuffled by the seed; the held-out rows come first and the document that the last
    of them ends in is dropped, so that no document is on both sides.
    """
    if settings.source == "text":
        documents = text_documents([Path(file) for file in settings.files])
        random.Random(settings.seed).shuffle(documents)
        stream: Iterator[str] = iter(documents)
    else:
        if settings.dataset is None:
            raise CorpusError("source `hub` needs the key `dataset`")
        stream = hub_documents(settings.dataset, settings.split, settings.column, settings.seed)
    rows_left = held_out
    pending: list[int] = []
    ones = np.ones(settings.context, dtype=np.float32)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for document in stream:
        # verbose=False: documents longer than the context are cut into rows here, not an error
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        pending += ([bos] if bos is not None else []) + ids + ([eos] if eos is not None else [])
        while len(pending) >= settings.context:
            row = np.asarray(pending[: settings.context], dtype=np.int64)
            pending = pending[settings.context :]
            yield row, ones
            rows_left -= 1
            if rows_left == 0:
                pending = []
