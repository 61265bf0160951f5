"""Records of data sets, one at a time: JSON Lines, parquet, folders of them, and the hub.

Every fault is one line that names the file (and its line) and what would be right.
"""

from __future__ import annotations

import gzip
import json
import random
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from rad.settings import SourceSettings

T = TypeVar("T")
Located = tuple[str, dict[str, Any]]  # where a record stands, for messages, and the record
_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_SPLITS = ("train", "training", "test", "validation", "valid", "val", "dev", "eval", "evaluation")
_PARQUET_ROWS = 256


class CorpusError(ValueError):
    """A corpus that cannot be built or read; the message names the file and the remedy."""


def records(source: SourceSettings, seed: int, buffer: int) -> Iterator[Located]:
    """Records of a `jsonl`, `parquet` or `hub` source; files come in an order drawn from `seed`."""
    column = source.messages or source.column
    if source.source == "hub":
        if not source.dataset:
            raise CorpusError("source `hub` needs the key `dataset`")
        if not Path(source.dataset).is_dir():
            yield from _hub(source, seed, buffer)
            return
        files = folder_files(Path(source.dataset), source.split)
    else:
        if not source.files:
            raise CorpusError(f"source `{source.source}` needs the key `files`")
        files = [Path(file) for file in source.files]
    random.Random(f"{seed}/files").shuffle(files)
    for file in files:
        if source.source == "parquet" or file.suffix == ".parquet":
            yield from parquet_records(file, column)
        else:
            yield from jsonl_records(file)


def field(where: str, record: dict[str, Any], column: str) -> Any:
    """The value of a record's column; raises `CorpusError` listing the columns there are."""
    if column not in record:
        raise CorpusError(f"{where}: no column {column!r}; it has {', '.join(map(str, record))}")
    return record[column]


def jsonl_records(path: Path) -> Iterator[Located]:
    """Records of a JSON Lines file, gzip-compressed if its name ends in .gz; blank lines pass."""
    if not path.is_file():
        raise CorpusError(f"{path}: no such JSON Lines file")
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise CorpusError(f"{path}, line {number}: not JSON ({error})") from error
                if not isinstance(record, dict):
                    raise CorpusError(
                        f"{path}, line {number}: a {type(record).__name__}, not an object; JSON "
                        "Lines have one object per line"
                    )
                yield f"{path}, line {number}", record
    except (EOFError, OSError, zlib.error) as error:
        raise CorpusError(f"{path}: unreadable after line {number} ({error})") from error


def parquet_records(path: Path, column: str) -> Iterator[Located]:
    """Records of a parquet file with that column alone, a few hundred rows in memory at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise CorpusError("parquet files need pyarrow: pip install 'radbench[data]'") from error
    if not path.is_file():
        raise CorpusError(f"{path}: no such parquet file")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise CorpusError(f"{path}: no column {column!r}; it has {', '.join(names)}")
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield f"{path}, row {number}", {column: value}
    except (pyarrow.ArrowException, OSError) as error:
        raise CorpusError(
            f"{path}: unreadable parquet after row {number} ({first_line(error)})"
        ) from error


def folder_files(folder: Path, split: str) -> list[Path]:
    """Data files of a folder that belong to a split, by the words of their paths, sorted.

    Files that no split name occurs in all belong to `train`.
    """
    files = sorted(file for file in folder.rglob("*") if file.name.endswith(_SUFFIXES))
    if not files:
        raise CorpusError(f"{folder}: no {', '.join(_SUFFIXES)} file below this folder")
    words = {
        file: set(re.split(r"[^a-z0-9]+", str(file.relative_to(folder)).lower())) for file in files
    }
    mine = [file for file in files if split.lower() in words[file]]
    if not mine and split == "train":
        mine = [file for file in files if not words[file] & set(_SPLITS)]
    if not mine:
        some = ", ".join(str(file.relative_to(folder)) for file in files[:5])
        raise CorpusError(f"{folder}: no file of split {split!r} among {some}")
    return mine


def _hub(source: SourceSettings, seed: int, buffer: int) -> Iterator[Located]:
    """Records of a hub dataset, streamed; the library shuffles the order of its files."""
    try:
        import datasets
    except ImportError as error:
        raise CorpusError("hub datasets need datasets: pip install 'radbench[data]'") from error
    where = f"dataset {source.dataset}"
    try:
        data = datasets.load_dataset(
            source.dataset,
            source.subset,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        if buffer > 1:
            # a buffer of 1: our own shuffle follows, here it is about the files' order
            data = data.shuffle(seed=seed, buffer_size=1)
        for number, record in enumerate(data, start=1):
            yield f"{where}, record {number}", record
    except CorpusError:
        raise
    except (OSError, ValueError) as error:
        raise CorpusError(
            f"{where}: cannot be read ({first_line(error)}); check its name, split and the "
            "network, or download it and give the folder"
        ) from error


def shuffled(items: Iterable[T], seed: int, buffer: int) -> Iterator[T]:
    """Items in an order drawn from `seed`, holding `buffer` of them at most.

    When all fit, every order is equally likely; else an item leaves when a later one takes its
    place. `buffer` 1 keeps the order.
    """
    if buffer == 1:
        yield from items
        return
    rng = random.Random(seed)
    held: list[T] = []
    for item in items:
        if len(held) < buffer:
            held.append(item)
            continue
        place = rng.randrange(buffer)
        yield held[place]
        held[place] = item
    rng.shuffle(held)
    yield from held


def first_line(error: Exception) -> str:
    """What an error says, on one line; its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
