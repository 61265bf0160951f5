"""The papers' claims as data: what is compared with what, in which direction, by which margin.

A claim names arms by what their configuration says (method, teacher, mixer, how much stays), never
by the names of a study, so that the same claims are tested on every study that has such arms.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, model_validator

from rad.papers.data import Facts, has_settings, parse, shipped
from rad.papers.evidence import (
    SELF,
    Cell,
    Evidence,
    Findings,
    Side,
    cache_bytes,
    contexts,
    kept_share,
    state_size,
    teacher_size,
)
from rad.papers.published import numbers, published

TWO, FOUR = ("first", "second"), ("kept", "kept_small", "none", "none_small")
EFFECTS: dict[str, tuple[str, ...]] = {"difference": TWO, "ratio": TWO, "interaction": FOUR}
CellField = Literal[
    "base", "selector", "budget", "mixer", "initialisation", "recipe", "teacher", "seed"
]


class ArmSpec(Facts):
    """Which students of a study an arm can be; without keys, all."""

    reference: bool = Field(False, description="the untouched base of the other arms instead")
    selectors: list[dict[str, Any]] = Field(
        default_factory=list, description="settings of its selector, any of the list"
    )
    view: str | None = None
    teacher: Literal["self", "other"] | None = None
    initialisation: list[str] = Field(default_factory=list, description="one of these")
    at_least: float | None = Field(None, description="share of the attention that stays")
    at_most: float | None = Field(None, description="the same, upper end")
    state: Literal["full", "small"] | None = Field(
        None, description="of the mixer: as wide as a head, or less"
    )


class Same(Facts):
    """Keys of the grid that arms must have in common."""

    arms: list[str]
    fields: list[CellField]


class Order(Facts):
    """`less` names two arms, the first of which must have less of something."""

    by: Literal["teacher", "kept", "state", "cache"]
    less: tuple[str, str]
    strict: bool = True
    factor: float | None = Field(None, description="the second has exactly this many times more")


class Formula(Facts):
    """Points (kept heads, state dim) of the memory formula of arXiv 2602.11374, appendix A.4."""

    points: list[tuple[int, int]]
    layers: int = Field(description="whole attention layers of the hybrid that they are held to")
    tokens: int


class Test(Facts):
    """A small test over results; `margin` is what the effect must exceed."""

    kind: Literal["score", "held_out_kl", "tokens", "cache", "formula"]
    effect: Literal["difference", "ratio", "interaction"]
    margin: float
    needs: Literal["all", "any"] = Field(
        "all", description="which comparisons of a study must hold for the claim to hold"
    )
    families: list[str] = Field(
        default_factory=list, description="the first of these that was scored is used"
    )
    arms: dict[str, ArmSpec] = Field(default_factory=dict)
    same: list[Same] = Field(default_factory=list)
    order: list[Order] = Field(default_factory=list)
    formula: Formula | None = None

    @model_validator(mode="after")
    def _complete(self) -> Test:
        if (self.kind == "formula") != (self.formula is not None):
            raise ValueError("formula: goes with kind formula, and with no other")
        wanted = () if self.formula else EFFECTS[self.effect]
        if tuple(self.arms) != wanted:
            raise ValueError(f"arms: {self.effect} needs {', '.join(wanted) or 'none'}, in order")
        if (self.kind == "score") != bool(self.families):
            raise ValueError("families: go with kind score, and with no other")
        if self.kind in ("tokens", "cache") and self.effect != "ratio":
            raise ValueError(f"effect: {self.kind} is a ratio")
        named = {arm for same in self.same for arm in same.arms}
        named |= {arm for order in self.order for arm in order.less}
        if odd := named - set(self.arms):
            raise ValueError(f"same or order: unknown arm {sorted(odd)[0]!r}")
        if sum(spec.reference for spec in self.arms.values()) == len(self.arms) > 0:
            raise ValueError("arms: one of them must be a student")
        return self


class Stated(Facts):
    """What the paper states; `value` is in the unit of the margin."""

    text: str
    value: float | None = None
    numbers: list[str] = Field(default_factory=list, description="ids of published numbers")


class Claim(Facts):
    """A claim of a paper, in our words, and its test."""

    id: str
    paper: str
    says: str
    published: Stated
    test: Test


class Claims(Facts):
    """The whole file."""

    schema_: Literal[1] = Field(alias="schema")
    sets: dict[str, list[dict[str, Any]]] = Field(description="anchors of ways of selecting")
    claims: list[Claim]

    @model_validator(mode="after")
    def _consistent(self) -> Claims:
        seen: set[str] = set()
        known = {number.id for number in numbers()}
        for claim in self.claims:
            if claim.id in seen:
                raise ValueError(f"{claim.id}: this id is there twice")
            seen.add(claim.id)
            if claim.paper not in published().papers:
                raise ValueError(f"{claim.id}: unknown paper {claim.paper!r}")
            if odd := [name for name in claim.published.numbers if name not in known]:
                raise ValueError(f"{claim.id}: no published number {odd[0]!r}")
        return self


@functools.cache
def claims() -> tuple[Claim, ...]:
    """The shipped claims, checked."""
    return tuple(parse(Claims, shipped("claims.yaml"), "claims.yaml").claims)


# --- which cells are meant ------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One set of arms that a claim is about, by arm name."""

    arms: Mapping[str, Side]

    @property
    def cells(self) -> list[Cell]:
        """The students among the arms."""
        return [side for side in self.arms.values() if isinstance(side, Cell)]

    @property
    def members(self) -> list[Evidence]:
        """Every model of every arm."""
        return [member for side in self.arms.values() for member in side.members]


def matches(findings: Findings, spec: ArmSpec, cell: Cell) -> bool:
    """Whether a cell can be the arm; what is not known of a cell is not matched."""
    run, study = cell.run, findings.study
    settings = study.selector_settings[run.selector]
    if spec.selectors and not any(has_settings(settings, each) for each in spec.selectors):
        return False
    if spec.view is not None and spec.view not in cell.views:
        return False
    if spec.teacher is not None and (run.teacher == SELF) != (spec.teacher == SELF):
        return False
    if spec.initialisation and run.initialisation not in spec.initialisation:
        return False
    if spec.at_least is not None or spec.at_most is not None:
        share = kept_share(findings, cell)
        low, high = spec.at_least or 0.0, 1.0 if spec.at_most is None else spec.at_most
        if share is None or not low <= share <= high:
            return False
    return spec.state is None or _state(findings, cell) == spec.state


def _state(findings: Findings, cell: Cell) -> str | None:
    mixer = findings.study.mixers[cell.run.mixer]
    if not hasattr(mixer, "state_size"):
        return None
    width = findings.shapes.get(cell.run.base, {}).get("head_dim")
    return "full" if mixer.state_size in (None, width) else "small"


def _amount(findings: Findings, order: Order, sides: Mapping[str, Side], arm: str) -> float | None:
    cell = sides[arm]
    if not isinstance(cell, Cell):
        return None
    if order.by == "teacher":
        return teacher_size(findings, cell)
    if order.by == "kept":
        return kept_share(findings, cell)
    if order.by == "state":
        return state_size(findings, cell)
    both = [side.members[0] for side in sides.values() if isinstance(side, Cell)]
    shared = contexts(both)
    return cache_bytes(cell, shared[-1]) if shared else None


def _fits(findings: Findings, test: Test, sides: Mapping[str, Side]) -> bool:
    for same in test.same:
        chosen = [sides[arm] for arm in same.arms]
        for name in same.fields:
            values = {str(getattr(side.run, name)) for side in chosen if isinstance(side, Cell)}
            if len(values) > 1:
                return False
    for order in test.order:
        low, high = (_amount(findings, order, sides, arm) for arm in order.less)
        if low is None or high is None or low > high or (order.strict and low == high):
            return False
        if order.factor is not None and abs(high - order.factor * low) > 1e-6 * high:
            return False
    return True


def comparisons(findings: Findings, test: Test) -> Iterator[Comparison]:
    """Every set of arms of a study that the test is about, in grid order."""
    choices: dict[str, list[Cell]] = {
        name: [cell for cell in findings.cells if matches(findings, spec, cell)]
        for name, spec in test.arms.items()
        if not spec.reference
    }
    for picked in itertools.product(*choices.values()):
        if len(set(map(id, picked))) < len(picked):
            continue  # a student is not compared with itself
        sides: dict[str, Side] = dict(zip(choices, picked, strict=True))
        for name, spec in test.arms.items():
            if spec.reference and picked[0].run.base in findings.references:
                sides[name] = findings.references[picked[0].run.base]
        if len(sides) == len(test.arms) and _fits(findings, test, sides):
            yield Comparison({name: sides[name] for name in test.arms})


def absent(findings: Findings, test: Test) -> str:
    """Why a study has nothing that the test is about."""
    for name, spec in test.arms.items():
        if spec.reference:
            if not findings.references:
                return "the study scores no untouched base (references)"
        elif not any(matches(findings, spec, cell) for cell in findings.cells):
            return f"no run of the study is the {name} arm: {describe_spec(spec)}"
    return "the study has such runs, but none that differ as the test asks"


def describe_spec(spec: ArmSpec) -> str:
    """An arm in words."""
    parts = [" ".join(map(str, each.values())) for each in spec.selectors[:1]]
    parts += [f"{spec.view} view"] if spec.view else []
    parts += [f"teacher {spec.teacher}"] if spec.teacher else []
    parts += [f"initialisation {' or '.join(spec.initialisation)}"] if spec.initialisation else []
    if spec.at_most == 0:
        parts.append("no attention kept")
    elif spec.at_most is not None:
        parts.append(f"at most {100 * spec.at_most:g} % kept")
    elif spec.at_least is not None:
        parts.append("some attention kept")
    parts += [f"{spec.state} state"] if spec.state else []
    return ", ".join(parts) or "any"
