"""Run a teacher once over a corpus and store what it says (`rad.distillation.stored`).

    start     settings checked, head and start record written
    part i    every N-th shard, by a process of its own; N does not change a byte of any shard
    merge     one manifest out of the shards' records

A shard's files are renamed into place whole, and the record that lists them after them: writing
goes on where it stopped, and a reader never sees half a shard. Legend: B batch, T context, E hidden
size, V vocabulary, K stored entries of a token.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rad.data.corpus import Corpus
from rad.data.packing import PADDING
from rad.distillation.encoding import Encoder, Sums, mean_loss
from rad.distillation.shards import (
    HEAD,
    MANIFEST,
    SPLITS,
    START,
    StoredError,
    find,
    identity,
    missing_of,
    rows_of,
    shards_of,
    stem,
)
from rad.distillation.stored import DTYPES, KINDS, SCHEMA, Arrays, corpus_digest, row_checks
from rad.distillation.targets import check_head, head_of, rows_hidden
from rad.files import file_digest, read_json, replacing, write_json
from rad.progress import Progress

# 64 tokens in 256 bytes, and draws whose ~12 different tokens suffice (performance notes, A4)
DEFAULT_K = {"hidden": 0, "top_k": 64, "sampled": 50}
SHARD_BYTES = 2**28
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what this module writes, whole or as the temporary file of a job that was killed
_OURS = re.compile(r"\.?(start|manifest|head|part-\d+-of-\d+|(train|held_out)-\d+)\..+")


def write_outputs(
    teacher: Any,
    corpus_folder: Path,
    out: Path,
    kind: str,
    k: int | None = None,
    dtype: str | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Run `teacher` over every row of a corpus, write `out`, return its manifest; resumable.

    Start, the only part and merge in one process; settings and errors are those of `Writer`.
    """
    writer = Writer(teacher, corpus_folder, out, kind, k, dtype, **settings)
    writer.start()
    writer.part()
    return merge(out)


class Writer:
    """A teacher, a corpus and a folder: what to store, and how far it has come."""

    def __init__(
        self,
        teacher: Any,
        corpus_folder: Path,
        out: Path,
        kind: str,
        k: int | None = None,
        dtype: str | None = None,
        *,
        teacher_sha256: str,
        tokenizer_sha256: str = "",
        temperature: float = 1.0,
        seed: int = 0,
        batch_size: int = 8,
        vocabulary: int | None = None,
        shard_bytes: int = SHARD_BYTES,
        order_seed: int | None = None,
    ) -> None:
        """`kind`: `hidden`, `top_k` or `sampled` (random-sampling KD, arXiv 2503.16870).

        `k`: entries of `top_k`, draws of `sampled`; `dtype` of hidden states (default: the
        teacher's own, which is exact) or log-probabilities (default float16). `vocabulary`: rows of
        the head that count (default all). `temperature` softens `top_k` and `sampled`; hidden
        states serve any. `order_seed`: training rows in the order in which students of that seed
        see them first (default: the corpus' order).
        Raises `StoredError` on settings that make no sense and on a corpus of another vocabulary.
        """
        self.teacher, self.corpus, self.out = teacher, Corpus(corpus_folder), Path(out)
        self.batch_size = batch_size
        self.head = head_of(teacher).detach()
        native = str(self.head.weight.dtype).removeprefix("torch.")
        default = {"top_k": "float16", "sampled": "float32"}.get(kind, native)
        self.spec: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": kind,
            "k": DEFAULT_K.get(kind, 0) if k is None else k,
            "dtype": dtype or default,
            "temperature": float(temperature),
            "seed": seed if kind == "sampled" else 0,
            "order_seed": order_seed,
            "vocab_size": self.head.vocabulary,
            "vocabulary": self.head.vocabulary if vocabulary is None else vocabulary,
            "context": self.corpus.context,
            "rows": {split: len(self.corpus.rows(split)) for split in SPLITS},
            "corpus_sha256": corpus_digest(self.corpus),
            "teacher_sha256": teacher_sha256,
            "tokenizer_sha256": tokenizer_sha256,
        }
        _check_settings(self.spec, self.corpus)
        check_head(teacher)
        self.encode = Encoder(self.head, self.spec)
        row_bytes = self.encode.bytes_per_token * self.corpus.context
        self.rows_per_shard = max(1, shard_bytes // row_bytes)

    def start(self) -> dict[str, Any]:
        """Write the start record, and the head of kind `hidden`; returns the record.

        An earlier one of the same settings stays as it is, its size of shards too.
        Raises `StoredError` on a folder of another teacher, corpus or setting, and a full disk.
        """
        path = self.out / START
        with _space(self.out):
            start = self._earlier()
            if self.spec["kind"] == "hidden" and not self._head_is_whole(start):
                start["head"] = self._write_head()
                path.unlink(missing_ok=True)
            if not path.exists():
                write_json(path, start)
        return start

    def part(self, part: int = 0, parts: int = 1) -> None:
        """Write the shards of a part that are not there yet, then the part's record.

        Raises `StoredError` without a start record or with one of other settings, on an output
        that is no number, and on a full disk.
        """
        if not 0 <= part < parts:
            raise StoredError(f"part {part} of {parts}: parts are counted from 0 to {parts - 1}")
        start = self._started()
        steps = missing_of(self.out, start, part, parts)
        if steps:
            (self.out / MANIFEST).unlink(missing_ok=True)  # it says that nothing is missing
        total = len(shards_of(start)[part::parts])
        title = "teacher outputs" if parts == 1 else f"teacher outputs, part {part} of {parts}"
        was_training = self.teacher.training
        self.teacher.eval()
        try:
            with _space(self.out), Progress(title, total, total - len(steps)) as progress:
                self._tidy({stem(*shard) for shard in steps})
                for split, index in steps:
                    record = self._shard(start, split, index)
                    record["start"] = identity(start)
                    write_json(self.out / f"{stem(split, index)}.json", record)
                    progress.advance(stem(split, index))
                name = f"part-{part:05d}-of-{parts:05d}.json"
                write_json(self.out / name, {"start": identity(start), "shards": total})
        finally:
            self.teacher.train(was_training)

    def _started(self) -> dict[str, Any]:
        """The start record, which has to be that of these settings."""
        start = read_start(self.out)
        self._same(start)
        if self.spec["kind"] == "hidden" and not self._head_is_whole(start):
            raise StoredError(f"{self.out / HEAD}: missing or cut off; write the start again")
        return start

    def _same(self, found: Mapping[str, Any]) -> None:
        other = [key for key, value in self.spec.items() if found.get(key) != value]
        if other:
            raise StoredError(
                f"{self.out}: holds teacher outputs with another {other[0]}; remove it or name "
                "another folder"
            )

    def _earlier(self) -> dict[str, Any]:
        """The start record of an earlier call, or a new one in a folder that may have it."""
        self.out.mkdir(parents=True, exist_ok=True)
        for path in self.out.iterdir():
            if not _OURS.fullmatch(path.name):
                raise StoredError(
                    f"{self.out}: holds other files; remove it or name another folder"
                )
        self._tidy({Path(name).stem for name in (HEAD, START, MANIFEST)})
        start: dict[str, Any]
        for name in (START, MANIFEST):
            if (self.out / name).exists():
                start = read_json(self.out / name)
                self._same(start)
                if name == START:
                    return start
                return {key: start[key] for key in (*self.spec, "rows_per_shard")}
        start = {**self.spec, "rows_per_shard": self.rows_per_shard}
        # a workflow removes the start record before it is written again; shards tell whose they are
        for split, index in shards_of(start):
            find(self.out, start, split, index)
        return start

    def _tidy(self, stems: set[str]) -> None:
        """Remove temporary files that an earlier job left when it was killed."""
        for path in self.out.glob(".*"):
            if path.name.split(".")[1] in stems:
                path.unlink()

    def _head_is_whole(self, start: Mapping[str, Any]) -> bool:
        path = self.out / HEAD
        return "head" in start and path.exists() and path.stat().st_size == start["head"]["bytes"]

    def _write_head(self) -> dict[str, Any]:
        from safetensors.torch import save

        tensors = {"weight": self.head.weight.contiguous().cpu()}
        if self.head.bias is not None:
            tensors["bias"] = self.head.bias.contiguous().cpu()
        path = self.out / HEAD
        with replacing(path) as temporary:
            temporary.write_bytes(save(tensors))  # save_file hides why it could not write
        return {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": file_digest(path),
            "scale": self.head.scale,
            "softcap": self.head.softcap,
        }

    @torch.no_grad()
    def _shard(self, start: Mapping[str, Any], split: str, index: int) -> dict[str, Any]:
        """Compute and write a shard's arrays; returns its record."""
        numbers = rows_of(start, split, index)  # (R,)
        rows = np.asarray(self.corpus.rows(split)[numbers])
        marked = self.corpus.boundaries(split)[numbers] if self.corpus.isolated else None
        parts: list[Arrays] = []
        measured: Sums = {}
        for first in range(0, len(rows), self.batch_size):
            some = slice(first, first + self.batch_size)
            tokens = torch.from_numpy(rows[some].astype(np.int64))
            tokens = tokens.to(self.head.weight.device)
            marks = None
            real = torch.ones_like(tokens, dtype=torch.bool)
            if marked is not None:
                marks = torch.from_numpy(np.array(marked[some])).to(tokens.device)
                real = marks != PADDING
            # a model in pieces may end on another device than its head is on
            hidden = rows_hidden(self.teacher, tokens, marks).to(tokens.device)
            if not bool(torch.isfinite(hidden).all()):
                raise StoredError(
                    f"{self.out}: the teacher gave a value that is no number for rows "
                    f"{_listed(numbers[some])} of {split}; check its weights and dtype"
                )
            arrays, sums = self.encode(hidden, real, split, numbers[some].tolist(), first)
            parts.append(arrays)
            for name, value in sums.items():
                measured[name] = measured.get(name, 0.0) + value
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        arrays["check"] = row_checks(rows)
        files = {
            name: _save(self.out / f"{stem(split, index)}.{name}.npy", array)
            for name, array in arrays.items()
        }
        first = index * start["rows_per_shard"]
        return {"first": first, "rows": len(rows), "files": files, "measured": measured}


def read_start(out: Path) -> dict[str, Any]:
    """The start record of a folder; raises `StoredError` when there is none."""
    try:
        start: dict[str, Any] = read_json(Path(out) / START)
    except ValueError as error:
        raise StoredError(f"{error}: write the start of the teacher's outputs first") from error
    return start


def merge(out: Path) -> dict[str, Any]:
    """Write the manifest of a folder whose shards are all there, and return it.

    It has `bytes_per_token` and `loss`, in nats per token: `kl`, KL(teacher || stored) (of `top_k`
    with the missing mass even over the other tokens); for `sampled` the mean deviation of the
    estimate, zero but for its `standard_error`. The same whoever wrote which shard.
    Raises `StoredError` when a shard is missing or cut off, and on a full disk.
    """
    out = Path(out)
    start = read_start(out)
    missing = missing_of(out, start)
    if missing:
        raise StoredError(
            f"{out}: {len(missing)} of {len(shards_of(start))} shards are missing, the first is "
            f"{stem(*missing[0])}; run the parts again, each goes on where it stopped"
        )
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for split, index in sorted(shards_of(start)):
        record = find(out, start, split, index)
        assert record is not None
        shards[split].append(record)
    records = [record for split in SPLITS for record in shards[split]]
    tokens = sum(start["rows"].values()) * start["context"]
    stored = sum(file["bytes"] for record in records for file in record["files"].values())
    manifest = {
        **start,
        "complete": True,
        "shards": shards,
        "tokens": tokens,
        "bytes_per_token": stored / tokens,
        "loss": mean_loss(record["measured"] for record in records),
    }
    with _space(out):
        write_json(out / MANIFEST, manifest)
    return manifest


@contextmanager
def _space(out: Path) -> Iterator[None]:
    """A failed write as one line that says what to do."""
    try:
        yield
    except OSError as error:
        remedy = "make room and run" if error.errno in _FULL else "then run"
        raise StoredError(
            f"{out}: {error.strerror or error}; the shards written so far are kept: {remedy} the "
            "same command again"
        ) from error


def _listed(numbers: NDArray[np.int64]) -> str:
    """Row numbers of a batch: a range where they are one."""
    if len(numbers) > 1 and bool((np.diff(numbers) == 1).all()):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _check_settings(spec: Mapping[str, Any], corpus: Corpus) -> None:
    kind, k, rows = spec["kind"], spec["k"], spec["vocabulary"]
    if kind not in KINDS:
        raise StoredError(f"teacher outputs of kind {kind!r}: it is one of {', '.join(KINDS)}")
    if spec["dtype"] not in DTYPES:
        raise StoredError(f"dtype {spec['dtype']!r}: it is one of {', '.join(DTYPES)}")
    if kind == "sampled" and spec["dtype"] != "float32":
        raise StoredError(
            f"dtype {spec['dtype']!r}: sampled stores tokens and counts; leave it out"
        )
    if kind == "hidden" and k:
        raise StoredError(f"k={k}: hidden states are stored whole; leave k out")
    if kind == "top_k" and not 1 <= k <= rows:
        raise StoredError(f"k={k}: top_k needs 1 to {rows} (the vocabulary)")
    if kind == "sampled" and not 1 <= k <= 255:
        raise StoredError(f"k={k}: sampled needs 1 to 255 draws per token")
    if not spec["temperature"] > 0 or (kind == "hidden" and spec["temperature"] != 1):
        raise StoredError(
            f"temperature {spec['temperature']:g}: above 0, and 1 for hidden states, which serve "
            "any temperature"
        )
    tokens, theirs = corpus.manifest.get("vocab_size", 0), corpus.manifest.get("tokenizer_sha256")
    if not tokens <= rows <= spec["vocab_size"]:
        raise StoredError(
            f"{corpus.folder}: a vocabulary of {tokens} tokens, {rows} rows to store and a head of "
            f"{spec['vocab_size']}: each at most the next; use a corpus of the teacher's tokenizer"
        )
    if theirs and spec["tokenizer_sha256"] and theirs != spec["tokenizer_sha256"]:
        raise StoredError(
            f"{corpus.folder}: tokenised with another tokenizer than the teacher's; build the "
            "corpus with a tokenizer of the teacher's family"
        )


def _save(path: Path, array: NDArray[Any]) -> dict[str, Any]:
    """Write a .npy file whole or not at all; returns its record."""
    with replacing(path) as temporary:
        with open(temporary, "wb") as stream:
            # not np.save, which does not say why it could not write
            header = np.lib.format.header_data_from_array_1_0(array)
            np.lib.format.write_array_header_1_0(stream, header)
            stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            stream.flush()
            os.fsync(stream.fileno())
        record = {"bytes": temporary.stat().st_size, "sha256": file_digest(temporary)}
    return {"name": path.name, **record}
