"""Run a teacher once over a corpus and store what it says (`rad.distillation.stored`).

A shard's files are renamed into place whole, and the manifest that lists them after them: writing
goes on where it stopped, and a reader never sees half a shard. Legend: B batch, T context, E hidden
size, V vocabulary, K stored entries of a token.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rad.data.corpus import Corpus
from rad.data.packing import PADDING
from rad.distillation.encoding import Encoder, Sums, mean_loss
from rad.distillation.stored import (
    DTYPES,
    KINDS,
    SCHEMA,
    SPLITS,
    Arrays,
    StoredError,
    corpus_digest,
    row_checks,
)
from rad.distillation.targets import LogitHead, check_head, head_of, rows_hidden
from rad.files import file_digest, read_json, replacing, write_json
from rad.progress import Progress

# 64 tokens in 256 bytes, and draws whose ~12 different tokens suffice (performance notes, A4)
DEFAULT_K = {"hidden": 0, "top_k": 64, "sampled": 50}
SHARD_BYTES = 2**28
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_outputs(
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
) -> dict[str, Any]:
    """Run `teacher` over every row of a corpus, write `out`, return its manifest; resumable.

    `kind`: `hidden`, `top_k` or `sampled` (random-sampling KD, arXiv 2503.16870); `k`: entries of
    `top_k`, draws of `sampled`; `dtype` of hidden states (default: the teacher's own, which is
    exact) or log-probabilities (default float16). `vocabulary`: rows of the head that count
    (default all). `temperature` softens `top_k` and `sampled`; hidden states serve any.
    The manifest has `bytes_per_token` and `loss`, in nats per token: `kl`, KL(teacher || stored)
    (of `top_k` with the missing mass even over the other tokens); for `sampled` the mean deviation
    of the estimate, zero but for its `standard_error`.
    Raises `StoredError` on settings that make no sense, a folder of another teacher, corpus or
    setting, a corpus of another vocabulary, an output that is no number, and a full disk.
    """
    corpus, out = Corpus(corpus_folder), Path(out)
    head = head_of(teacher).detach()
    native = str(head.weight.dtype).removeprefix("torch.")
    default = {"top_k": "float16", "sampled": "float32"}.get(kind, native)
    rows = head.vocabulary if vocabulary is None else vocabulary
    spec = {
        "schema": SCHEMA,
        "kind": kind,
        "k": DEFAULT_K.get(kind, 0) if k is None else k,
        "dtype": dtype or default,
        "temperature": float(temperature),
        "seed": seed if kind == "sampled" else 0,
        "vocab_size": head.vocabulary,
        "vocabulary": rows,
        "context": corpus.context,
        "corpus_sha256": corpus_digest(corpus),
        "teacher_sha256": teacher_sha256,
        "tokenizer_sha256": tokenizer_sha256,
    }
    _check_settings(spec, corpus)
    check_head(teacher)
    writer = _Writer(teacher, head, corpus, out, spec, batch_size, shard_bytes)
    try:
        return writer.write()
    except OSError as error:
        remedy = "make room and run" if error.errno in _FULL else "then run"
        raise StoredError(
            f"{out}: {error.strerror or error}; the shards written so far are kept: {remedy} the "
            "same command again"
        ) from error


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


class _Writer:
    """One job of writing: what to store, where, and how far it has come."""

    def __init__(
        self,
        teacher: Any,
        head: LogitHead,
        corpus: Corpus,
        out: Path,
        spec: dict[str, Any],
        batch_size: int,
        shard_bytes: int,
    ) -> None:
        self.teacher, self.head, self.corpus, self.out = teacher, head, corpus, out
        self.spec, self.batch_size = spec, batch_size
        self.encode = Encoder(head, spec)
        row_bytes = self.encode.bytes_per_token * corpus.context
        self.rows_per_shard = max(1, shard_bytes // row_bytes)

    def write(self) -> dict[str, Any]:
        """Everything that is not there yet; returns the manifest."""
        manifest = self._begin()
        path = self.out / "manifest.json"
        counts = {split: len(self.corpus.rows(split)) for split in SPLITS}
        size = manifest["rows_per_shard"]
        steps = [
            (split, index)
            for split in SPLITS
            for index in range(-(-counts[split] // size))
            if index >= len(manifest["shards"][split]) or not manifest["shards"][split][index]
        ]
        total = sum(-(-counts[split] // size) for split in SPLITS)
        was_training = self.teacher.training
        self.teacher.eval()
        try:
            with Progress("teacher outputs", total, total - len(steps)) as progress:
                for split, index in steps:
                    shards = manifest["shards"][split]
                    last = min((index + 1) * size, counts[split])
                    record = self._shard(split, index, index * size, last)
                    shards[index : index + 1] = [record]
                    write_json(path, manifest)
                    progress.advance(f"{split} rows to {last}")
        finally:
            self.teacher.train(was_training)
        records = [shard for split in SPLITS for shard in manifest["shards"][split]]
        tokens = sum(counts.values()) * self.corpus.context
        stored = sum(file["bytes"] for shard in records for file in shard["files"].values())
        manifest |= {
            "complete": True,
            "rows": counts,
            "tokens": tokens,
            "bytes_per_token": stored / tokens,
            "loss": mean_loss(shard["measured"] for shard in records),
        }
        write_json(path, manifest)
        return manifest

    def _begin(self) -> dict[str, Any]:
        """The manifest of an earlier, interrupted call, or a new one."""
        path = self.out / "manifest.json"
        if path.exists():
            manifest: dict[str, Any] = read_json(path)
            other = [key for key, value in self.spec.items() if manifest.get(key) != value]
            if other:
                raise StoredError(
                    f"{self.out}: holds teacher outputs with another {other[0]}; remove it or name "
                    "another folder"
                )
            for shards in manifest["shards"].values():
                for index, shard in enumerate(shards):  # missing or cut off: written again
                    shards[index] = shard if shard and self._is_whole(shard) else None
            manifest["complete"] = False
            if self.spec["kind"] == "hidden" and not (self.out / "head.safetensors").exists():
                manifest["head"] = self._write_head()
            return manifest
        if self.out.exists() and any(self.out.iterdir()):
            raise StoredError(f"{self.out}: holds other files; remove it or name another folder")
        self.out.mkdir(parents=True, exist_ok=True)
        manifest = {
            **self.spec,
            "complete": False,
            "rows_per_shard": self.rows_per_shard,
            "shards": {split: [] for split in SPLITS},
        }
        if self.spec["kind"] == "hidden":
            manifest["head"] = self._write_head()
        write_json(path, manifest)
        return manifest

    def _is_whole(self, shard: Mapping[str, Any]) -> bool:
        paths = [(self.out / file["name"], file["bytes"]) for file in shard["files"].values()]
        return all(path.exists() and path.stat().st_size == size for path, size in paths)

    def _write_head(self) -> dict[str, Any]:
        from safetensors.torch import save_file

        tensors = {"weight": self.head.weight.contiguous().cpu()}
        if self.head.bias is not None:
            tensors["bias"] = self.head.bias.contiguous().cpu()
        path = self.out / "head.safetensors"
        with replacing(path) as temporary:
            save_file(tensors, str(temporary))
        return {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": file_digest(path),
            "scale": self.head.scale,
            "softcap": self.head.softcap,
        }

    @torch.no_grad()
    def _shard(self, split: str, index: int, first: int, last: int) -> dict[str, Any]:
        """Compute and write rows [first, last); returns the shard's record."""
        rows = np.asarray(self.corpus.rows(split)[first:last])
        parts: list[Arrays] = []
        measured: Sums = {}
        for start in range(0, len(rows), self.batch_size):
            tokens = torch.from_numpy(rows[start : start + self.batch_size].astype(np.int64))
            tokens = tokens.to(self.head.weight.device)
            marks = None
            real = torch.ones_like(tokens, dtype=torch.bool)
            if self.corpus.isolated:
                part = self.corpus.boundaries(split)[first + start : first + start + len(tokens)]
                marks = torch.from_numpy(np.array(part)).to(tokens.device)
                real = marks != PADDING
            hidden = rows_hidden(self.teacher, tokens, marks)
            if not bool(torch.isfinite(hidden).all()):
                raise StoredError(
                    f"{self.out}: the teacher gave a value that is no number for rows "
                    f"{first + start} to {first + start + len(tokens) - 1} of {split}; check its "
                    "weights and dtype"
                )
            arrays, sums = self.encode(hidden, real, split, first + start, start)
            parts.append(arrays)
            for name, value in sums.items():
                measured[name] = measured.get(name, 0.0) + value
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        arrays["check"] = row_checks(rows)
        files = {
            name: _save(self.out / f"{split}-{index:05d}.{name}.npy", array)
            for name, array in arrays.items()
        }
        return {"first": first, "rows": last - first, "files": files, "measured": measured}


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
