"""What verbs share: shapes of arguments, and reading the study that they name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rad.files import read_json

if TYPE_CHECKING:
    from rad.study import Study


def as_json(text: str) -> Any:
    """An argument that is JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error


def load_study(files: Sequence[Path]) -> Study:
    """The study of YAML files, with the selectors that have a rule of their own here."""
    from rad.settings import SELECTOR_SETTINGS
    from rad.study import load

    rules = Path("workflow/rules/selection").glob("*.smk")
    return load(files, sorted({rule.stem for rule in rules} - set(SELECTOR_SETTINGS)))


def recorded_study(path: Path) -> Study:
    """The study of a `study.json`, as the workflow leaves it beside the results."""
    from rad.study import Study

    raw = read_json(path)
    return Study.from_config(raw, raw.pop("external_selectors", ()))


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
