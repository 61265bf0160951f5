"""Checked reading of JSON and JSON Lines: every fault is one `ValueError` naming file and line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rad.files import read_json


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`file:line` and record of each line of a JSON Lines file."""
    try:
        with open(path, encoding="utf-8") as stream:
            for row, line in enumerate(stream, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}:{row}: not JSON ({error})") from error
                if not isinstance(record, dict):
                    raise ValueError(f"{path}:{row}: expected an object")
                yield f"{path}:{row}", record
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text") from error


def json_object(path: Path) -> dict[str, Any]:
    """The object of a JSON file."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected an object")
    return content


def value_of(record: Mapping[str, Any], key: str, where: str | Path) -> Any:
    """A value that must be there."""
    if key not in record:
        raise ValueError(f"{where}: key {key!r} is missing")
    return record[key]


def number(record: Mapping[str, Any], key: str, where: str | Path) -> float:
    """A number that must be there; true and false count as 1 and 0, NaN is none."""
    value = value_of(record, key, where)
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, int | float) or math.isnan(value):
        raise ValueError(f"{where}: {key} is {value!r}, expected a number")
    return float(value)


def optional(record: Mapping[str, Any], key: str, where: str | Path) -> float | None:
    """A number, or None where the key is absent or null."""
    return None if record.get(key) is None else number(record, key, where)
