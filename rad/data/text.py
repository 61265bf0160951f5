"""Running text: plain files (books) cut into documents, and datasets from the hub or a folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

_GUTENBERG_START = re.compile(r"^\*\*\* ?START OF TH.*$", re.MULTILINE)
_GUTENBERG_END = re.compile(r"^\*\*\* ?END OF TH.*$", re.MULTILINE)
_BLANK = re.compile(r"\n\s*\n")
DOCUMENT_CHARACTERS = 3000


def read_text(path: Path) -> str:
    """A text file with unified line ends and without the Project Gutenberg header and footer."""
    if not path.is_file():
        raise ValueError(f"{path}: no such text file")
    text = path.read_text(encoding="utf-8-sig", errors="replace").replace("\r\n", "\n")
    start, end = _GUTENBERG_START.search(text), _GUTENBERG_END.search(text)
    return text[start.end() if start else 0 : end.start() if end else len(text)].strip()


def paragraphs(path: Path) -> list[str]:
    """The paragraphs of a text file, each on one line."""
    blocks = (" ".join(block.split()) for block in _BLANK.split(read_text(path)))
    return [block for block in blocks if block]


def text_documents(files: list[Path]) -> list[str]:
    """Documents of about `DOCUMENT_CHARACTERS`, never across files; paragraphs are not cut."""
    if not files:
        raise ValueError("source `text` needs the key `files`")
    documents = []
    for file in files:
        waiting: list[str] = []
        for paragraph in paragraphs(file):
            waiting.append(paragraph)
            if sum(map(len, waiting)) >= DOCUMENT_CHARACTERS:
                documents.append("\n".join(waiting))
                waiting = []
        if waiting:
            documents.append("\n".join(waiting))
    return documents


def hub_documents(dataset: str, split: str, column: str, seed: int) -> Iterator[str]:
    """Documents of a dataset: hub id (streamed) or a local folder of JSONL or parquet files."""
    from datasets import load_dataset

    folder = Path(dataset)
    if folder.is_dir():
        data = load_dataset(str(folder), split=split).shuffle(seed=seed)
    else:
        data = load_dataset(dataset, split=split, streaming=True).shuffle(
            seed=seed, buffer_size=10_000
        )
    for record in data:
        if column not in record:
            raise ValueError(f"dataset {dataset}: no column {column!r}; it has {', '.join(record)}")
        yield record[column]
