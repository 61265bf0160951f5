"""Placement: which (layer, query head) pairs stay softmax attention, and the budget for them.

A placement is the output of every selector and the input of every conversion; its JSON form
(`placement.json`) is the extension point of the benchmark: whatever writes a valid one is a
selection method. This module imports neither torch nor transformers.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rad.files import read_json, write_json


class BudgetError(ValueError):
    """A budget cannot be met by the model it is asked of."""


_BUDGET_KEYS = {"l": "layers", "h": "heads", "f": "fraction", "b": "kv_bytes_per_token"}


class Budget(BaseModel):
    """How much attention stays; exactly one of the four keys is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: int | None = Field(None, ge=0, description="whole layers that stay softmax attention")
    heads: int | None = Field(None, ge=0, description="query heads that stay, over all layers")
    fraction: float | None = Field(None, ge=0, le=1, description="share of (layer, head) pairs")
    kv_bytes_per_token: int | None = Field(
        None, ge=0, description="most bytes of keys and values cached per token, over all layers"
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Budget:
        given = [name for name in _BUDGET_KEYS.values() if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"a budget names exactly one of {', '.join(_BUDGET_KEYS.values())}; "
                f"got {given or 'none'}"
            )
        return self

    @property
    def slug(self) -> str:
        """A short name for file paths: `l2`, `h8`, `f0.25` or `b1024`."""
        letter, value = next(
            (letter, value)
            for letter, name in _BUDGET_KEYS.items()
            if (value := getattr(self, name)) is not None
        )
        return f"{letter}{value:g}" if letter == "f" else f"{letter}{value}"

    @classmethod
    def parse(cls, slug: str) -> Budget:
        """Inverse of `slug`, or the long form `layers:2`; raises `BudgetError` on others."""
        try:
            name, colon, text = slug.partition(":")
            if not colon:
                name, text = _BUDGET_KEYS[slug[0]], slug[1:]
            if name not in _BUDGET_KEYS.values():
                raise KeyError(name)
            return cls.model_validate({name: float(text) if name == "fraction" else int(text)})
        except (KeyError, IndexError, ValueError) as error:
            raise BudgetError(
                f"budget {slug!r}: expected layers:2, heads:8, fraction:0.25 or "
                "kv_bytes_per_token:1024 (short: l2, h8, f0.25, b1024)"
            ) from error

    def layer_count(self, layers: int, heads: int, kv_bytes_per_layer: int | None = None) -> int:
        """Whole layers that meet this budget exactly, or the most that fit a budget in bytes.

        `kv_bytes_per_layer`: bytes that a whole softmax layer caches per token. Raises
        `BudgetError` when no whole number of layers does.
        """
        if self.kv_bytes_per_token is not None:
            if not kv_bytes_per_layer:
                raise BudgetError(f"budget {self.slug}: the base's bytes per layer are not known")
            return min(layers, self.kv_bytes_per_token // kv_bytes_per_layer)
        kept = self.head_count(layers, heads)
        if kept % heads:
            raise BudgetError(
                f"budget {self.slug} is {kept} of {layers * heads} heads, not a whole number of "
                f"layers of {heads} heads; a layer-wise selector needs a multiple of {heads}"
            )
        return kept // heads

    def head_count(self, layers: int, heads: int) -> int:
        """Query heads that meet this budget exactly; raises `BudgetError` when out of range.

        A budget in bytes has no such number: it depends on which heads stay.
        """
        total = layers * heads
        if self.kv_bytes_per_token is not None:
            raise BudgetError(f"budget {self.slug} does not say how many heads stay")
        if self.layers is not None:
            kept: float = self.layers * heads
        elif self.heads is not None:
            kept = self.heads
        else:
            assert self.fraction is not None
            kept = self.fraction * total
        if not math.isclose(kept, round(kept), abs_tol=1e-6):
            raise BudgetError(
                f"budget {self.slug} is {kept:g} of {total} heads, not a whole number; "
                f"the nearest that is: {round(kept) / total:g}"
            )
        if round(kept) > total:
            raise BudgetError(
                f"budget {self.slug} asks for {round(kept)} heads but the base has {layers} layers "
                f"x {heads} heads = {total}"
            )
        return round(kept)


class Cost(BaseModel):
    """What choosing the placement cost."""

    model_config = ConfigDict(extra="forbid")

    tokens: int = Field(0, ge=0, description="tokens that went through any model")
    seconds: float = Field(0.0, ge=0, description="wall time of the selection")
    forward_passes: int = Field(0, ge=0, description="model calls (batches)")
    trained_tokens: int = Field(0, ge=0, description="tokens among them that were trained on")
    flops: float = Field(0.0, ge=0, description="2 per weight and token, 6 when trained on")


class Footprint(BaseModel):
    """What the kept attention costs when the hybrid runs."""

    model_config = ConfigDict(extra="forbid")

    heads: int = Field(ge=0, description="query heads that stay")
    kv_heads: int = Field(ge=0, description="key/value heads cached, over all layers")
    kv_bytes_per_token: int = Field(ge=0, description="bytes of keys and values cached per token")


class Scores(BaseModel):
    """The numbers the ranking was made from."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["layer", "head"]
    name: str = Field(description="what the number is, with its unit")
    values: list[float] | list[list[float]] = Field(description="(layers,) or (layers, heads)")
    higher_is_kept: bool = True


class Placement(BaseModel):
    """(layer, query head) pairs that stay softmax attention in a base of known shape."""

    model_config = ConfigDict(extra="forbid")
    SHAPE: ClassVar[tuple[str, ...]] = ("layers", "heads", "kv_heads")

    schema_: Literal[1] = Field(1, alias="schema")
    base: str
    layers: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    softmax: list[tuple[int, int]]
    selector: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    scores: Scores | None = None
    cost: Cost = Field(default_factory=Cost)
    footprint: Footprint | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _pairs_exist(self) -> Placement:
        for layer, head in self.softmax:
            if not 0 <= layer < self.layers or not 0 <= head < self.heads:
                raise ValueError(
                    f"softmax names layer {layer} head {head}, but the base has layers "
                    f"0-{self.layers - 1} and heads 0-{self.heads - 1}"
                )
        if len(set(self.softmax)) != len(self.softmax):
            raise ValueError("softmax names a (layer, head) pair twice")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} heads cannot share {self.kv_heads} kv heads evenly")
        self.softmax = sorted(self.softmax)
        return self

    @classmethod
    def from_layers(
        cls, kept: list[int], *, layers: int, heads: int, kv_heads: int, **fields: Any
    ) -> Placement:
        """The placement that keeps whole layers `kept`."""
        pairs = [(layer, head) for layer in sorted(kept) for head in range(heads)]
        return cls(layers=layers, heads=heads, kv_heads=kv_heads, softmax=pairs, **fields)

    def kept_heads(self, layer: int) -> list[int]:
        """Query heads of `layer` that stay softmax attention, ascending."""
        return [head for owner, head in self.softmax if owner == layer]

    def kind(self, layer: int) -> Literal["softmax", "mixer", "hybrid"]:
        """Whether `layer` keeps all, none or some of its heads."""
        kept = len(self.kept_heads(layer))
        if kept == self.heads:
            return "softmax"
        return "hybrid" if kept else "mixer"

    def kept_layers(self) -> list[int]:
        """Layers that keep at least one head."""
        return sorted({layer for layer, _ in self.softmax})

    def cached_kv_heads(self) -> int:
        """Key/value head pairs cached per token over all layers.

        A whole softmax layer caches its `kv_heads`; a kept head of a mixed layer has keys and
        values of its own (retrieval-aware distillation, section 4.2), also when two kept heads
        shared a group in the base.
        """
        total = 0
        for layer in range(self.layers):
            kept = len(self.kept_heads(layer))
            total += self.kv_heads if kept == self.heads else kept
        return total

    def fraction(self) -> float:
        """Share of (layer, head) pairs that stay softmax attention."""
        return len(self.softmax) / (self.layers * self.heads)

    def check_base(self, name: str, layers: int, heads: int, kv_heads: int) -> None:
        """Raise `ValueError` when this placement is for another base, or one of another shape."""
        mine = (self.layers, self.heads, self.kv_heads)
        if mine != (layers, heads, kv_heads):
            raise ValueError(
                f"the placement is for {mine[0]} layers x {mine[1]} heads ({mine[2]} kv), the base "
                f"has {layers} x {heads} ({kv_heads} kv)"
            )
        if self.base != name:
            raise ValueError(f"the placement is for base {self.base!r}, not {name!r}")

    def check_budget(self, budget: Budget) -> None:
        """Raise `BudgetError` when this placement keeps more or fewer heads than `budget`.

        A budget in bytes is a limit: it needs the footprint, which selectors write.
        """
        if budget.kv_bytes_per_token is not None:
            if self.footprint is None:
                raise BudgetError(
                    f"placement of selector {self.selector} has no footprint, so budget "
                    f"{budget.slug} cannot be checked"
                )
            if self.footprint.kv_bytes_per_token > budget.kv_bytes_per_token:
                raise BudgetError(
                    f"placement of selector {self.selector} caches "
                    f"{self.footprint.kv_bytes_per_token} bytes per token, budget {budget.slug} "
                    f"allows {budget.kv_bytes_per_token}"
                )
            return
        want = budget.head_count(self.layers, self.heads)
        if len(self.softmax) != want:
            raise BudgetError(
                f"placement of selector {self.selector} keeps {len(self.softmax)} heads, "
                f"budget {budget.slug} asks for {want}"
            )

    def describe(self) -> str:
        """A few lines for people: what stays, and what it costs."""
        lines = [f"{self.selector} keeps {len(self.softmax)} of {self.layers * self.heads} heads"]
        for layer in self.kept_layers():
            heads = self.kept_heads(layer)
            what = "all heads" if len(heads) == self.heads else f"heads {heads}"
            lines.append(f"  layer {layer}: {what}")
        if self.footprint is not None:
            lines.append(f"KV bytes per token: {self.footprint.kv_bytes_per_token:,}")
        lines.append(
            f"cost: {self.cost.seconds:.1f} s, {self.cost.tokens:,} tokens in "
            f"{self.cost.forward_passes:,} model calls"
        )
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, keys as in the contract."""
        return self.model_dump(by_alias=True, mode="json")

    def save(self, path: Path) -> None:
        """Write the JSON form to `path`, atomically."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path) -> Placement:
        """Read and check a `placement.json`; raises `ValueError` naming the file and the fault."""
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise ValueError(f"{path}: {first_error(error)}") from error


def first_error(error: ValidationError) -> str:
    """The first fault of a pydantic error as `key.path: what is wrong`, on one line."""
    fault = error.errors()[0]
    where = ".".join(str(part) for part in fault["loc"]) or "top level"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {fault['msg'].removeprefix('Value error, ')}{more}"
