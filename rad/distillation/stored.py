"""Teacher outputs on disk: one pass of a teacher over a corpus, read by any number of students.

    <folder>/manifest.json               what was stored, of which teacher and corpus, how well
    <folder>/head.safetensors            kind `hidden`: the teacher's output head
    <folder>/<split>-00000.<array>.npy   a shard of rows; memory-mapped when read, never unpickled
    <folder>/...json                     records of single shards (`rad.distillation.shards`)

| kind      | a token's arrays                                   | what a student gets            |
|-----------|----------------------------------------------------|--------------------------------|
| `hidden`  | final hidden state (E)                             | the teacher's own distribution |
| `top_k`   | ids (K), log_probs (K)                             | the K most likely tokens       |
| `sampled` | ids and counts of K draws, merged; entropy         | an unbiased estimate           |

`rad.distillation.teacher_outputs` writes them; shards can be read as soon as they are there.
Legend: B batch, R rows, T context, E hidden size, K stored entries of a token.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rad.data.corpus import Corpus
from rad.distillation.shards import MANIFEST, SPLITS, START, Arrivals, StoredError, row_order
from rad.distillation.targets import LogitHead
from rad.files import file_digest, read_json

__all__ = ["SPLITS", "StoredError", "StoredOutputs", "corpus_digest", "row_checks"]

SCHEMA = 1
KINDS = ("hidden", "top_k", "sampled")
DTYPES = ("float32", "bfloat16", "float16")
Arrays = dict[str, NDArray[Any]]
AGAIN = "remove it and run the command that writes the outputs again"


def corpus_digest(corpus: Corpus) -> str:
    """sha256 of a corpus' tokens, their order and whether its documents are isolated."""
    content = hashlib.sha256()
    for split in SPLITS:
        arrays = [corpus.rows(split)]
        if corpus.isolated:
            arrays.append(corpus.boundaries(split))
        for array in arrays:
            content.update(f"{split} {array.shape}".encode())
            for start in range(0, len(array), 4096):
                block = np.ascontiguousarray(array[start : start + 4096], dtype="<u4")
                content.update(block.tobytes())
    return content.hexdigest()


def row_checks(rows: NDArray[Any]) -> NDArray[np.uint32]:
    """CRC-32 of each row of tokens (R,T): reading a row back for other tokens is noticed."""
    wide = np.ascontiguousarray(rows, dtype="<u4")
    return np.array([zlib.crc32(row.tobytes()) for row in wide], dtype=np.uint32)


class StoredOutputs:
    """A folder of teacher outputs. Raises `StoredError` naming what is missing or cut off."""

    def __init__(
        self, folder: Path, *, verify: bool = False, wait_minutes: float | None = None
    ) -> None:
        """`verify` reads every byte and compares digests; sizes and values read are checked always.

        With `wait_minutes`, outputs that are still being written are read too: asking for a row
        waits for its shard, and gives up when none arrived for so long.
        Raises `StoredError` when the folder is incomplete or a file is missing or damaged.
        """
        self.folder, self.verify = Path(folder), verify
        self._arrivals: Arrivals | None = None
        self.manifest = self._manifest(wait_minutes)
        self.kind: str = self.manifest["kind"]
        self._records: dict[tuple[str, int], dict[str, Any]] = {}
        self._open: dict[tuple[str, int, str], NDArray[Any]] = {}
        self._offsets: dict[tuple[str, int], NDArray[np.int64]] = {}
        self._places = {split: np.argsort(row_order(self.manifest, split)) for split in SPLITS}
        if self._arrivals is None:
            for split in SPLITS:
                for index in range(len(self.manifest["shards"][split])):
                    self._record(split, index)
        if self.kind == "hidden":
            self._check(self.manifest["head"])

    def _manifest(self, wait_minutes: float | None) -> dict[str, Any]:
        """The manifest, or the start record when waiting for shards is allowed."""
        path = self.folder / MANIFEST
        begun = (self.folder / START).exists()
        if not path.exists() and begun and wait_minutes is not None:
            path = self.folder / START
        try:
            found: dict[str, Any] = read_json(path)
        except ValueError as error:
            if begun and not path.exists():
                raise StoredError(self._incomplete()) from error
            raise StoredError(f"no teacher outputs: {error}") from error
        if found.get("schema") != SCHEMA or found.get("kind") not in KINDS:
            raise StoredError(f"{path}: not teacher outputs of schema {SCHEMA}; write them again")
        if path.name == START:
            assert wait_minutes is not None
            self._arrivals = Arrivals(self.folder, found, wait_minutes)
        elif not found["complete"]:
            raise StoredError(self._incomplete())
        return found

    def _incomplete(self) -> str:
        return (
            f"{self.folder}: the teacher's outputs are incomplete; run the command that writes "
            "them again, it goes on where it stopped"
        )

    def _record(self, split: str, shard: int) -> dict[str, Any]:
        """The record of a shard, whose files are there with the right sizes."""
        key = (split, shard)
        if key not in self._records:
            if self._arrivals is None:
                record = self.manifest["shards"][split][shard]
            else:
                record = self._arrivals.shard(split, shard)
            for file in record["files"].values():
                self._check(file)
            self._records[key] = record
        return self._records[key]

    def _check(self, file: Mapping[str, Any]) -> None:
        path = self.folder / file["name"]
        found = path.stat().st_size if path.exists() else None
        if found != file["bytes"]:
            what = "missing" if found is None else f"{found} bytes instead of {file['bytes']}"
            raise StoredError(f"{path}: {what}; {AGAIN}")
        if self.verify and file_digest(path) != file["sha256"]:
            raise StoredError(f"{path}: its content has changed; {AGAIN}")

    def _array(self, split: str, shard: int, name: str) -> NDArray[Any]:
        """One array of a shard, memory-mapped."""
        key = (split, shard, name)
        if key not in self._open:
            path = self._path(split, shard, name)
            try:
                self._open[key] = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise StoredError(f"{path}: unreadable ({error}); {AGAIN}") from error
        return self._open[key]

    def _path(self, split: str, shard: int, name: str) -> Path:
        return self.folder / str(self._record(split, shard)["files"][name]["name"])

    def head(self) -> LogitHead:
        """The teacher's output head (kind `hidden`)."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        record = self.manifest["head"]
        path = self.folder / record["name"]
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise StoredError(f"{path}: unreadable ({error}); {AGAIN}") from error
        return LogitHead(tensors["weight"], tensors.get("bias"), record["scale"], record["softcap"])

    def read(self, split: str, tokens: Tensor, rows: Sequence[int]) -> dict[str, Tensor]:
        """Arrays of corpus rows `rows`, whose tokens are `tokens` (B,T), each (B,T,...).

        Raises `StoredError` when a row is not stored, was stored for other tokens, or has a value
        that is no number or no token.
        """
        if split not in SPLITS:
            raise StoredError(f"{self.folder}: no split {split!r}; it has {', '.join(SPLITS)}")
        count, per_shard = self.manifest["rows"][split], self.manifest["rows_per_shard"]
        context = self.manifest["context"]
        if tokens.shape != (len(rows), context):
            raise StoredError(
                f"{self.folder}: tokens {tuple(tokens.shape)} for {len(rows)} rows of {context}: "
                "stored outputs serve whole rows of the corpus, not rows cut to another context"
            )
        checks = row_checks(tokens.cpu().numpy())
        found = []
        for row, check in zip(rows, checks, strict=True):
            if not 0 <= row < count:
                raise StoredError(f"{self.folder}: row {row} of {split}, which has {count} rows")
            shard, place = divmod(int(self._places[split][row]), per_shard)
            if self._array(split, shard, "check")[place] != check:
                raise StoredError(
                    f"{self._path(split, shard, 'check')}: row {row} was stored for other tokens; "
                    "the outputs are not of these rows"
                )
            found.append(self._row(split, shard, place))
        if self.kind == "sampled":
            width = max(arrays["ids"].shape[-1] for arrays in found)
            for arrays in found:
                for name in ("ids", "weights"):
                    extra = width - arrays[name].shape[-1]
                    arrays[name] = np.pad(arrays[name], ((0, 0), (0, extra)))
        tensors = {}
        for name in found[0]:
            tensor = torch.from_numpy(np.stack([arrays[name] for arrays in found]))
            tensors[name] = tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
        return tensors

    def _row(self, split: str, shard: int, place: int) -> Arrays:
        """The arrays (T,...) of one row, checked; ids int64, bfloat16 still as uint16."""
        if self.kind == "hidden":
            hidden = np.array(self._array(split, shard, "hidden")[place])
            self._check_numbers(hidden, split, shard, "hidden", place)
            return {"hidden": hidden}
        if self.kind == "top_k":
            log_probs = np.array(self._array(split, shard, "log_probs")[place])
            self._check_numbers(log_probs, split, shard, "log_probs", place)
            ids = self._array(split, shard, "ids")[place].astype(np.int64)
            self._check_ids(ids, split, shard, place)
            return {"ids": ids, "log_probs": log_probs}
        unique = np.array(self._array(split, shard, "unique")[place])
        start = self._starts(split, shard)[place]
        stop = start + int(unique.sum(dtype=np.int64))
        flat = self._array(split, shard, "ids")[start:stop].astype(np.int64)
        counts = self._array(split, shard, "counts")[start:stop]
        self._check_ids(flat, split, shard, place)
        entropy = np.array(self._array(split, shard, "entropy")[place])
        self._check_numbers(entropy, split, shard, "entropy", place)
        present = np.arange(unique.max()) < unique[:, None]  # (T, most different tokens)
        if int(present.sum()) != len(flat) or len(counts) != len(flat):
            raise StoredError(
                f"{self._path(split, shard, 'ids')}: row {place} of the shard is cut off; {AGAIN}"
            )
        ids = np.zeros(present.shape, dtype=np.int64)
        weights = np.zeros(present.shape, dtype=np.float32)
        ids[present], weights[present] = flat, counts / np.float32(self.manifest["k"])
        return {"ids": ids, "weights": weights, "entropy": entropy}

    def _starts(self, split: str, shard: int) -> NDArray[np.int64]:
        """Where each row's entries start in the flat arrays of a shard."""
        if (split, shard) not in self._offsets:
            per_row = self._array(split, shard, "unique").sum(axis=1, dtype=np.int64)
            self._offsets[split, shard] = np.concatenate([[0], np.cumsum(per_row)])
        return self._offsets[split, shard]

    def _check_numbers(
        self, array: NDArray[Any], split: str, shard: int, name: str, place: int
    ) -> None:
        if array.dtype == np.uint16:  # bfloat16: all exponent bits set is infinite or no number
            fine = bool(((array & 0x7F80) != 0x7F80).all())
        else:
            fine = bool(np.isfinite(array).all())
        if not fine:
            raise StoredError(
                f"{self._path(split, shard, name)}: row {place} of the shard has a value that is "
                f"no number; {AGAIN}"
            )

    def _check_ids(self, ids: NDArray[np.int64], split: str, shard: int, place: int) -> None:
        if ids.size and int(ids.max()) >= self.manifest["vocabulary"]:
            raise StoredError(
                f"{self._path(split, shard, 'ids')}: row {place} of the shard has a token outside "
                f"the vocabulary; {AGAIN}"
            )
