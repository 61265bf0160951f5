"""Whether two results of one study are the same but for what clocks and memory say."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# names of values; a resumed job says where it went on
MEASURED = re.compile(
    r"(.*_)?seconds|.*_per_second|speed_up|time|peak_memory.*|memory_limit_bytes|resumed"
)


def differences(first: Path, second: Path) -> tuple[int, list[str]]:
    """How many files both folders have, and what differs: missing files, values by their place.

    Weights, token files: by bytes. JSON and JSON lines: by value, without `MEASURED`. Benchmark
    files, tables and the report are made of times and left out.
    """
    names = {str(path.relative_to(first)) for path in _files(first)}
    others = {str(path.relative_to(second)) for path in _files(second)}
    found = [f"{name}: only in one of them" for name in sorted(names ^ others)]
    for name in sorted(names & others):
        found += _unequal(first / name, second / name, name)
    return len(names & others), found


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        if path.is_file() and parts[0] not in ("benchmarks", "tables", "figures", "report.html"):
            yield path


def _unequal(first: Path, second: Path, name: str) -> list[str]:
    if first.suffix in (".json", ".jsonl"):
        return list(_values(_read(first), _read(second), name))
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (first, second)}
    return [] if len(digests) == 1 else [f"{name}: other bytes"]


def _read(path: Path) -> Any:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def _values(first: Any, second: Any, place: str) -> Iterator[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted(set(first) | set(second)):
            if MEASURED.fullmatch(key):
                continue
            if key not in first or key not in second:
                yield f"{place}/{key}: only in one of them"
            else:
                yield from _values(first[key], second[key], f"{place}/{key}")
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for number, pair in enumerate(zip(first, second, strict=True)):
            yield from _values(*pair, f"{place}/{number}")
    elif first != second:
        yield f"{place}: {str(first)[:80]} and {str(second)[:80]}"
