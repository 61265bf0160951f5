"""Argument shapes that verbs share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def as_json(text: str) -> Any:
    """An argument that is JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error


Argument = tuple[str, dict[str, Any]]
PATH: dict[str, Any] = {"type": Path, "required": True}
OPTIONAL: dict[str, Any] = {"type": Path, "default": None}
JSON: dict[str, Any] = {"type": as_json, "required": True}
CONFIG: Argument = ("config", {"type": Path, "nargs": "+", "help": "YAML files, merged in order"})

FOLDER: Argument = ("folder", {"type": Path, "help": "checkpoint folder"})
DTYPE: Argument = (
    "--dtype",
    {"choices": ["float32", "bfloat16"], "default": "float32", "help": "of the weights"},
)

DEVICE: Argument = (
    "--device",
    {
        "default": "auto",
        "help": "cpu, cuda, or auto (default): the variable RAD_DEVICE, else a GPU if there is one",
    },
)

Verb = tuple[Callable[[argparse.Namespace], None], list[Argument]]
