"""Numbers that papers printed, one record each, with where they come from.

The file has a row per model of a table; `numbers()` flattens it. A value keeps the digits that were
printed, and says whether it is exact, about, or the end of a range.
"""

from __future__ import annotations

import functools
import re
from typing import Literal

from pydantic import Field, model_validator

from rad.papers.data import Facts, parse, shipped

Unit = Literal[
    "percent",
    "fraction",
    "points",
    "ratio",
    "x",
    "ppl",
    "nats",
    "norm",
    "score_1_10",
    "tokens",
    "iterations",
    "FLOP",
    "MB",
    "USD",
    "seconds",
    "hours",
    "days",
    "GPU_hours",
    "A800_hours",
    "hours_on_8xMI300X",
]
# what a unit can be at most; coverage counts from the teacher, so it may pass 100
CEILING = {"percent": 105.0, "fraction": 1.0, "score_1_10": 10.0}
PRINTED = re.compile(r"(~|<=|>=|<)?(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
KEPT = re.compile(r"(\d+)(?:/(\d+))? (layers|heads|mla layers|converted layers)")


class Paper(Facts):
    """A paper that numbers were printed in."""

    title: str
    arxiv: str | None = None


class Row(Facts):
    """One model of a table, with its values."""

    id: str = Field(description="start of the ids of its numbers")
    model: str | None = Field(None, description="evaluated model, None where the source is silent")
    arm: str | None = Field(None, description="variant or method")
    teacher: str | None = None
    mixer: str | None = Field(None, description="replacement mixer as the paper calls it")
    kept: str | None = Field(None, description="attention that stays, as 20/28 layers")
    state: int | None = Field(None, description="state dim of the mixer")
    unit: Unit
    note: str | None = Field(None, description="key of `notes`, for all its values")
    values: list[tuple[str, str, str, str] | tuple[str, str, str, str, str]] = Field(
        description="rest of the id, benchmark, metric, number as printed, key of `notes`"
    )


class Group(Facts):
    """Rows of one table, figure or place of a paper."""

    paper: str
    place: str
    source: str
    trust: Literal["primary", "secondary"]
    method: Literal["rad", "kl_guided", "retrieval_aware"] = Field(
        description="the method whose studies are held against these numbers"
    )
    rows: list[Row]


class Number(Facts):
    """One published number."""

    id: str
    paper: str
    place: str
    source: str
    trust: str
    method: str
    model: str | None
    arm: str | None
    teacher: str | None
    mixer: str | None
    kept: str | None
    state: int | None
    benchmark: str
    metric: str
    printed: str
    unit: Unit
    note: str

    @property
    def relation(self) -> str:
        """`=`, `~` about, `<=` and `>=` ends of a range, `<` a bound."""
        match = PRINTED.fullmatch(self.printed)
        return (match[1] if match else None) or "="

    @property
    def value(self) -> float:
        """The number."""
        match = PRINTED.fullmatch(self.printed)
        assert match is not None, self.id  # checked when the file was read
        return float(match[2])

    @property
    def share(self) -> float | None:
        """Share of the attention that stays, None where it is not known."""
        match = KEPT.fullmatch(self.kept or "")
        if match is None or (match[2] is None and int(match[1])):
            return None
        return int(match[1]) / int(match[2]) if match[2] else 0.0


class Published(Facts):
    """The whole file; checked as one, because ids and notes must fit together."""

    schema_: Literal[1] = Field(alias="schema")
    papers: dict[str, Paper]
    sources: dict[str, str]
    notes: dict[str, str]
    tables: list[Group]

    @model_validator(mode="after")
    def _consistent(self) -> Published:
        seen: set[str] = set()
        for group in self.tables:
            if group.paper not in self.papers or group.source not in self.sources:
                raise ValueError(f"{group.paper}, {group.place}: unknown paper or source")
            for row in group.rows:
                if row.kept is not None and not KEPT.fullmatch(row.kept):
                    raise ValueError(f"{row.id}: kept {row.kept!r}, expected as 20/28 layers")
                for value in row.values:
                    name = f"{row.id}.{value[0]}"
                    if name in seen:
                        raise ValueError(f"{name}: this id is there twice")
                    seen.add(name)
                    self._check(name, row.unit, value[3])
                    for note in filter(None, (row.note, *value[4:])):
                        if note not in self.notes:
                            raise ValueError(f"{name}: unknown note {note!r}")
        return self

    @staticmethod
    def _check(name: str, unit: str, printed: str) -> None:
        match = PRINTED.fullmatch(printed)
        if match is None:
            raise ValueError(f"{name}: {printed!r} is not a number as printed")
        if float(match[2]) > CEILING.get(unit, float("inf")):
            raise ValueError(f"{name}: {printed} {unit} is out of range")

    def numbers(self) -> tuple[Number, ...]:
        """Every number, in the order of the file."""
        found = []
        for group in self.tables:
            for row in group.rows:
                for rest, benchmark, metric, printed, *note in row.values:
                    keys = [key for key in (row.note, *note) if key]
                    found.append(
                        Number(
                            **group.model_dump(exclude={"rows"}),
                            **row.model_dump(exclude={"id", "values", "note"}),
                            id=f"{row.id}.{rest}",
                            benchmark=benchmark,
                            metric=metric,
                            printed=printed,
                            note="; ".join(self.notes[key] for key in keys),
                        )
                    )
        return tuple(found)


@functools.cache
def published() -> Published:
    """The shipped file, checked."""
    return parse(Published, shipped("published.yaml"), "published.yaml")


@functools.cache
def numbers() -> tuple[Number, ...]:
    """Every published number, in the order of the file."""
    return published().numbers()
