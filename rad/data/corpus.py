"""Token corpora: rows of tokens with loss weights and document boundaries, in flat mapped files.

`build` writes `corpus/<name>/` (docs/data.md), `Corpus` reads it. Building streams: its memory does
not grow with the corpus. The held-out split shares no document with the training split. Legend: R
rows, T context.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rad.data import packing
from rad.data.packing import Row
from rad.data.records import CorpusError
from rad.data.sources import Mixture, open_sources
from rad.files import digest, read_json, replacing, write_json
from rad.settings import CorpusSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["Corpus", "CorpusError", "build"]
SPLITS = ("held_out", "train")
# file name ending of each array of a split
TOKENS, WEIGHTS, BOUNDARIES = "", "_weight", "_boundary"


class Corpus:
    """A corpus on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = read_json(self.folder / "manifest.json")
        self.context: int = self.manifest["context"]

    def rows(self, split: str) -> NDArray[Any]:
        """(R, T) token ids, memory-mapped."""
        return self._map(split, TOKENS, np.dtype(self.manifest["dtype"]))

    def weights(self, split: str) -> NDArray[Any]:
        """(R, T) loss weights of predicting the token at each position, uint8 in 1/255."""
        return self._map(split, WEIGHTS, np.dtype("uint8"))

    def boundaries(self, split: str) -> NDArray[Any]:
        """(R, T) uint8: 1 where a document starts, 2 at padding, else 0."""
        return self._map(split, BOUNDARIES, np.dtype("uint8"))

    @property
    def isolated(self) -> bool:
        """Whether documents of a row must not see each other (`rad.data.isolation`)."""
        return bool(self.manifest.get("packing") == "isolate")

    def verify(self) -> None:
        """Compare every file with its digest in the manifest; raises `CorpusError`."""
        for split, facts in self.manifest["splits"].items():
            for ending, expected in facts["sha256"].items():
                path = self.folder / f"{split}{ending}.bin"
                with open(path, "rb") as stream:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
                if found != expected:
                    raise CorpusError(f"{path}: not the bytes that were built; rebuild the corpus")

    def _map(self, split: str, ending: str, dtype: np.dtype[Any]) -> NDArray[Any]:
        path = self.folder / f"{split}{ending}.bin"
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

    Raises `CorpusError` when the sources have too few tokens or cannot be read; what stood in
    `output` is then left as it was.
    """
    output = Path(output)
    wanted = {
        "held_out": -(-settings.held_out_tokens // settings.context),
        "train": -(-settings.tokens // settings.context),
    }
    dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")
    mixture = open_sources(settings, tokenizer)
    pad = next((n for n in (tokenizer.pad_token_id, tokenizer.eos_token_id) if n is not None), 0)
    splits: dict[str, dict[str, Any]] = {}
    manifest = output / "manifest.json"
    with _space(output), contextlib.ExitStack() as files:
        for split in SPLITS:
            writer = _Writer(files, output, split, dtype)
            stream = mixture.documents(split)
            if settings.row_packing == "concatenate":
                rows = packing.concatenated_rows(stream, settings.context)
            else:
                rows = packing.whole_rows(stream, settings.context, pad)
            splits[split] = writer.fill(rows, wanted[split]) | {"sources": _read(mixture)}
            if writer.rows < wanted[split]:
                raise CorpusError(_too_few(name, settings, mixture, splits, wanted))
        # leaving the stack puts the files in place: meanwhile no manifest may describe others
        manifest.unlink(missing_ok=True)
    content = {
        "schema": 1,
        "name": name,
        "context": settings.context,
        "dtype": dtype.str,
        "packing": settings.row_packing,
        "vocab_size": len(tokenizer),
        "tokenizer_sha256": tokenizer_sha256,
        "settings": settings.model_dump(mode="json"),
        "settings_sha256": digest(settings.model_dump(mode="json")),
        "splits": splits,
    }
    write_json(manifest, content)
    return content


class _Writer:
    """Writes rows of one split to its three files, with their digests; `files` closes them."""

    def __init__(
        self, files: contextlib.ExitStack, output: Path, split: str, dtype: np.dtype[Any]
    ) -> None:
        self.streams = {}
        for ending in (TOKENS, WEIGHTS, BOUNDARIES):
            path = files.enter_context(replacing(output / f"{split}{ending}.bin"))
            self.streams[ending] = files.enter_context(open(path, "wb"))  # noqa: SIM115
        self.hashes = {ending: hashlib.sha256() for ending in self.streams}
        self.dtype, self.rows = dtype, 0

    def fill(self, rows: Iterator[Row], wanted: int) -> dict[str, Any]:
        """Write up to `wanted` rows and return their counts for the manifest."""
        tokens = weighted = documents = padding = 0
        while self.rows < wanted and (row := next(rows, None)) is not None:
            weights = np.rint(row.weights * 255).astype(np.uint8)
            self._write(TOKENS, row.ids.astype(self.dtype))
            self._write(WEIGHTS, weights)
            self._write(BOUNDARIES, row.boundaries)
            self.rows += 1
            tokens += len(row.ids)
            weighted += int((weights > 0).sum())
            documents += int((row.boundaries == packing.START).sum())
            padding += int((row.boundaries == packing.PADDING).sum())
        for stream in self.streams.values():
            stream.flush()  # a full disk has to show before any file is put in place
        return {
            "rows": self.rows,
            "tokens": tokens,
            "weighted_tokens": weighted,
            "documents": documents,
            "padding": padding,
            "sha256": {ending: value.hexdigest() for ending, value in self.hashes.items()},
        }

    def _write(self, ending: str, values: NDArray[Any]) -> None:
        data = values.tobytes()
        self.streams[ending].write(data)
        self.hashes[ending].update(data)


def _read(mixture: Mixture) -> list[dict[str, Any]]:
    """What was taken from each source, documents waiting for a place in a row included."""
    return [
        {"source": source.name, "documents": source.documents, "tokens": source.tokens}
        for source in mixture.sources
    ]


def _too_few(
    name: str,
    settings: CorpusSettings,
    mixture: Mixture,
    splits: dict[str, dict[str, Any]],
    wanted: dict[str, int],
) -> str:
    read = [part for facts in splits.values() for part in facts["sources"]]
    ended = mixture.exhausted
    several = len(mixture.sources) > 1
    if several and ended is not None:
        read = [part for part in read if part["source"] == ended.name]
    tokens = sum(part["tokens"] for part in read)
    documents = sum(part["documents"] for part in read)
    needed = sum(wanted.values()) * settings.context
    share = f" at weight {ended.weight:g} of " if several and ended is not None else ""
    if share:
        share += f"{sum(source.weight for source in mixture.sources):g}"
    which = f"source {ended.name}" if several and ended is not None else "the source"
    return (
        f"corpora.{name}: {which} has {tokens} tokens in {documents} documents; "
        f"{needed} tokens are needed ({wanted['held_out'] * settings.context} held out and "
        f"{wanted['train'] * settings.context} to train on){share and ',' + share}; "
        f"lower corpora.{name}.tokens or add files"
    )


@contextlib.contextmanager
def _space(output: Path) -> Iterator[None]:
    """Say in one line that the disk, a quota or a limit of file sizes is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise CorpusError(
            f"{output}: no space left for the corpus; what was there is unchanged"
        ) from error
