"""What a folder of teacher outputs holds so far: the start record and a record for every shard.

    start.json                 what is stored, of which teacher and corpus: written first
    <split>-00000.json         a shard is whole; written after its arrays, by the job that made it
    part-00000-of-00004.json   all shards of a part are whole
    manifest.json              all of it in one file, written last

Every file has one writer and is renamed into place: whoever sees a shard's record may read the
shard, while other jobs still write theirs.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rad.files import digest, read_json
from rad.progress import LINE_EVERY_SECONDS

START, MANIFEST, HEAD = "start.json", "manifest.json", "head.safetensors"
SPLITS = ("train", "held_out")
POLL_SECONDS = 0.5
Shard = tuple[str, int]


class StoredError(ValueError):
    """Teacher outputs that cannot be written or read; the message names the file and the remedy."""


def identity(start: Mapping[str, Any]) -> str:
    """sha256 of what the shards of a start record have in common; each shard's record has it."""
    return digest({key: value for key, value in start.items() if key != "head"})


def stem(split: str, index: int) -> str:
    """How the names of a shard's files begin."""
    return f"{split}-{index:05d}"


def shards_of(start: Mapping[str, Any]) -> list[Shard]:
    """All shards in the order in which they are written: held-out rows are what students ask first.

    Part i of N has every N-th of them, from the i-th: early shards come early whatever N is.
    """
    size = start["rows_per_shard"]
    return [
        (split, index)
        for split in reversed(SPLITS)
        for index in range(-(-start["rows"][split] // size))
    ]


def rows_of(start: Mapping[str, Any], split: str, index: int) -> NDArray[np.int64]:
    """Numbers of the corpus rows in a shard, in their order there."""
    size = start["rows_per_shard"]
    return row_order(start, split)[index * size : (index + 1) * size]


def row_order(start: Mapping[str, Any], split: str) -> NDArray[np.int64]:
    """Numbers of all rows of a split, in stored order.

    `order_seed` is a seed of students, which see training rows in this order in their first epoch
    (`rad.distillation.batches`); None keeps the corpus' order, as held-out rows always have.
    """
    count, seed = start["rows"][split], start.get("order_seed")
    if seed is None or split != "train":
        return np.arange(count)
    return np.random.default_rng([seed, 0]).permutation(count)


def find(folder: Path, start: Mapping[str, Any], split: str, index: int) -> dict[str, Any] | None:
    """The record of a shard; None when it, or a file that it names, is not there whole.

    Raises `StoredError` when the shard belongs to another start record.
    """
    path = folder / f"{stem(split, index)}.json"
    try:
        record: dict[str, Any] = read_json(path)
    except ValueError:  # not there, or cut off by a power cut: written again
        return None
    if record.pop("start", None) != identity(start):
        raise StoredError(
            f"{path}: a shard of another setting, teacher or corpus; remove {folder} or name "
            "another folder"
        )
    paths = [(folder / file["name"], file["bytes"]) for file in record["files"].values()]
    whole = all(path.exists() and path.stat().st_size == size for path, size in paths)
    return record if whole else None


class Arrivals:
    """Records of shards that other jobs are still writing; asking for one waits for it."""

    def __init__(self, folder: Path, start: Mapping[str, Any], wait_minutes: float) -> None:
        """`wait_minutes`: for how long nothing may arrive before waiting is given up."""
        self.folder, self.start, self.minutes = folder, start, wait_minutes
        self.all = shards_of(start)

    def shard(self, split: str, index: int) -> dict[str, Any]:
        """The record of a shard, as soon as it is there.

        Raises `StoredError` when no shard at all arrived for `wait_minutes`, and
        `loop.Interrupted` on SIGINT, SIGTERM or SIGUSR1.
        """
        record = find(self.folder, self.start, split, index)
        return self._wait(split, index) if record is None else record

    def _wait(self, split: str, index: int) -> dict[str, Any]:
        name, total = stem(split, index), len(self.all)
        limit = self.minutes * 60
        began = moved = looked = time.monotonic()
        there = self._count()
        self._say(f"waiting for shard {name}, {there} of {total} are there")
        with _stoppable(f"{self.folder}: stopped while waiting for shard {name}"):
            while (record := find(self.folder, self.start, split, index)) is None:
                time.sleep(POLL_SECONDS)
                now = time.monotonic()
                # a folder of many thousand files is listed now and then only
                if now - looked >= min(LINE_EVERY_SECONDS, limit / 4):
                    looked, before, there = now, there, self._count()
                    moved = now if there > before else moved
                    self._say(
                        f"waiting for shard {name} for {now - began:.0f} s, {there} of {total} "
                        "are there"
                    )
                    if now - moved >= limit:
                        raise StoredError(
                            f"{self.folder}: no shard arrived for {self.minutes:g} minutes, "
                            f"{there} of {total} are there and {name} is not; see whether the "
                            "teacher's jobs run (they need cores beside this one), or raise "
                            "teacher_outputs.<model>.wait_minutes"
                        )
        self._say(f"shard {name} came after {time.monotonic() - began:.0f} s")
        return record

    def _count(self) -> int:
        names = {path.name for path in self.folder.glob("*.json")}
        return sum(f"{stem(*shard)}.json" in names for shard in self.all)

    @staticmethod
    def _say(text: str) -> None:
        print(f"teacher outputs: {text}", file=sys.stderr, flush=True)


@contextmanager
def _stoppable(message: str) -> Iterator[None]:
    """Signals that ask a training job to stop end the block at once, not after the next step."""
    from rad.distillation.loop import Interrupted

    def stop(_number: int, _frame: Any) -> None:
        raise Interrupted(message)

    previous: dict[signal.Signals, Any] = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        try:
            previous[number] = signal.signal(number, stop)
        except ValueError:  # not the main thread: the caller handles signals
            break
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


def missing_of(
    folder: Path, start: Mapping[str, Any], part: int = 0, parts: int = 1
) -> Sequence[Shard]:
    """Shards of a part that are not there whole, in the order of writing."""
    mine = shards_of(start)[part::parts]
    return [shard for shard in mine if find(folder, start, *shard) is None]
