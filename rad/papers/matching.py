"""Which runs of a study a published number stands for: the rules of `matches.yaml`, applied.

A row without a match is not an error: most studies run a part of what was published. What is
missing is said, from the base to the number of kept layers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, Literal

from pydantic import Field, model_validator

from rad.papers.data import Facts, has_settings, parse, shipped
from rad.papers.evidence import SELF, Cell, Findings, Side
from rad.papers.published import Number
from rad.study import Study


class ArmRule(Facts):
    """How a published arm is selected for in a study."""

    papers: list[str] = Field(default_factory=list, description="these; default: any")
    arms: list[str] = Field(default_factory=list, description="published names; default: any")
    ids: str = Field("*", description="pattern of the numbers' ids")
    reference: bool = Field(False, description="the untouched model")
    base: str | None = Field(None, description="base, where the paper does not name the model")
    selectors: list[dict[str, Any]] = Field(
        default_factory=list, description="settings that the selector has, any of the list"
    )

    def covers(self, number: Number) -> bool:
        """Whether the rule is about a number."""
        if self.papers and number.paper not in self.papers:
            return False
        if self.arms and number.arm not in self.arms:
            return False
        return fnmatchcase(number.id, self.ids)


class Quantity(Facts):
    """Which of our measurements a published metric is."""

    benchmarks: list[str]
    metrics: list[str]
    kinds: dict[str, str] = Field(default_factory=dict, description="task kind -> metric")
    over: Literal["base"] | None = Field(None, description="divided by the untouched base's")
    length: int | None = None
    subtask: str | None = None
    bytes: int | None = Field(None, description="measured cache at this context")
    selection_tokens: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Quantity:
        if sum((bool(self.kinds), self.bytes is not None, self.selection_tokens)) != 1:
            raise ValueError("a quantity is kinds, bytes or selection_tokens")
        return self


class Matches(Facts):
    """The whole file."""

    schema_: Literal[1] = Field(alias="schema")
    studies: dict[str, list[dict[str, Any]]] = Field(
        description="method -> selectors that make a study one of that method"
    )
    models: dict[str, str]
    shapes: dict[str, tuple[int, int, int]] = Field(description="layers, query heads, head dim")
    mixers: dict[str, str]
    arms: list[ArmRule]
    quantities: list[Quantity]


@functools.cache
def rules() -> Matches:
    """The shipped rules, checked."""
    return parse(Matches, shipped("matches.yaml"), "matches.yaml")


def quantity_of(number: Number) -> Quantity | None:
    """Our measurement of a published number, None where there is none."""
    for quantity in rules().quantities:
        if number.benchmark in quantity.benchmarks and number.metric in quantity.metrics:
            return quantity
    return None


def methods_of(study: Study) -> set[str]:
    """The methods whose published numbers are held against a study."""
    return {
        method
        for method, wanted in rules().studies.items()
        for settings in study.selector_settings.values()
        if any(has_settings(settings, each) for each in wanted)
    }


def hub_name(study: Study, model: str) -> str:
    """Last part of a model's source: the name that papers use."""
    return study.models[model].source.rstrip("/").rpartition("/")[2]


def base_of(number: Number, rule: ArmRule) -> str | None:
    """Name on the hub of the base that a row's model was made from."""
    if number.model is None:
        return rule.base
    return rules().models.get(number.model, number.model)


class NoMatch(ValueError):
    """A study has no run of a published row; the message is what it lacks."""


def find(findings: Findings, number: Number) -> list[Side]:
    """The cells, or the untouched model, that a published number stands for.

    Raises `NoMatch` saying what the study lacks.
    """
    rule = next((rule for rule in rules().arms if rule.covers(number)), None)
    if rule is None:
        raise NoMatch("cannot be run with this package" if number.arm else "no arm is named")
    study, base = findings.study, base_of(number, rule)
    if rule.reference:
        for name, evidence in findings.references.items():
            if hub_name(study, name) == base:
                return [evidence]
        raise NoMatch(f"{base} is no reference of the study")
    cells = [cell for cell in findings.cells if hub_name(study, cell.run.base) == base]
    if not cells:
        raise NoMatch(f"no run has the base {base or 'of this row, which is not named'}")
    steps: tuple[tuple[str, Callable[[Cell], bool]], ...] = (
        ("selector", lambda cell: _selected(study, cell, rule)),
        (f"teacher {number.teacher}", lambda cell: _taught(study, cell, number)),
        (f"mixer {number.mixer}", lambda cell: _mixed(study, cell, number)),
        (f"budget {number.kept}", lambda cell: _kept(cell, number, base)),
        (f"state size {number.state}", lambda cell: _state(study, cell, number, base)),
    )
    for what, fits in steps:
        cells = [cell for cell in cells if fits(cell)]
        if not cells:
            raise NoMatch(f"no run on {base} has this {what}")
    return list(cells)


def _selected(study: Study, cell: Cell, rule: ArmRule) -> bool:
    settings = study.selector_settings[cell.run.selector]
    return any(has_settings(settings, wanted) for wanted in rule.selectors)


def _taught(study: Study, cell: Cell, number: Number) -> bool:
    if number.teacher is None:
        return True
    name = cell.run.base if cell.run.teacher == SELF else cell.run.teacher
    return hub_name(study, name) == number.teacher


def _mixed(study: Study, cell: Cell, number: Number) -> bool:
    if number.mixer is None:
        return True
    return study.mixers[cell.run.mixer].type == rules().mixers.get(number.mixer)


def _kept(cell: Cell, number: Number, base: str | None) -> bool:
    if number.share is None:
        return True
    budget = cell.run.budget
    if budget.fraction is not None:
        share = budget.fraction
    else:
        layers, heads, _ = rules().shapes.get(base or "", (0, 0, 0))
        total = layers if budget.layers is not None else layers * heads
        kept = budget.layers if budget.layers is not None else budget.heads
        if kept is None or (not total and kept):
            return False
        share = kept / total if total else 0.0
    return abs(share - number.share) < 1e-3


def _state(study: Study, cell: Cell, number: Number, base: str | None) -> bool:
    if number.state is None:
        return True
    mixer = study.mixers[cell.run.mixer]
    size = getattr(mixer, "state_size", None)
    return (size or rules().shapes.get(base or "", (0, 0, 0))[2]) == number.state
