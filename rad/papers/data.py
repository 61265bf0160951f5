"""Reading of the data files that this package ships; a fault in them is one line naming the key."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from importlib import resources
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from rad.placement import first_error

# libyaml reads the published numbers in a seventh of the time; not every build of PyYAML has it
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Facts(BaseModel):
    """Declared data: unknown keys are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Model = TypeVar("Model", bound=Facts)


def shipped(name: str) -> str:
    """The text of a data file of this package."""
    return resources.files("rad.papers").joinpath(name).read_text(encoding="utf-8")


def parse(model: type[Model], text: str, name: str) -> Model:
    """YAML as `model`; raises `ValueError` naming the file and the key."""
    try:
        content = yaml.load(text, Loader=LOADER)
    except yaml.YAMLError as error:
        raise ValueError(f"{name}: not YAML ({str(error).splitlines()[0]})") from error
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{name}: {first_error(error)}") from error


def has_settings(settings: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether settings have these values; texts are patterns with * and ?."""
    for key, value in wanted.items():
        own = getattr(settings, key, None)
        if isinstance(value, str) and isinstance(own, str):
            if not fnmatchcase(own, value):
                return False
        elif own != value:
            return False
    return True
