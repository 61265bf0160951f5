"""Words and fields that tables and figures share: budgets, kept heads, blocks, references."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rad.placement import Budget, Placement
from rad.reporting.collect import Results, RunResult
from rad.reporting.plan import Block, Cell, blocks, cells, row_titles
from rad.reporting.scores import Family, documents_of, members
from rad.reporting.statistics import Difference, Estimate
from rad.reporting.writers import Column, Entry, size

CELL_FIELDS = (
    "base",
    "selector",
    "budget",
    "mixer",
    "initialisation",
    "recipe",
    "teacher",
)


def budget_text(slug: str) -> str:
    """A budget in words."""
    budget = Budget.parse(slug)
    if budget.layers is not None:
        return f"{budget.layers} layer{'' if budget.layers == 1 else 's'}"
    if budget.heads is not None:
        return f"{budget.heads} head{'' if budget.heads == 1 else 's'}"
    if budget.fraction is not None:
        return f"{100 * budget.fraction:g} % of heads"
    # exact: two budgets that round to the same KiB must not get the same title
    return f"≤ {budget.kv_bytes_per_token:,} B KV/token"


def kept_text(placement: Placement) -> str:
    """Kept heads by layer, neighbours merged: `L3: all; L5-L6: 0,2`; `none` when none are."""
    described = []
    for layer in placement.kept_layers():
        heads = placement.kept_heads(layer)
        whole = len(heads) == placement.heads
        described.append((layer, "all" if whole else ",".join(map(str, heads))))
    parts: list[tuple[int, int, str]] = []
    for layer, text in described:
        if parts and parts[-1][1] == layer - 1 and parts[-1][2] == text:
            parts[-1] = (parts[-1][0], layer, text)
        else:
            parts.append((layer, layer, text))
    return (
        "; ".join(
            f"L{first}: {text}" if first == last else f"L{first}-L{last}: {text}"
            for first, last, text in parts
        )
        or "none"
    )


@dataclass(frozen=True)
class Attention:
    """How much full softmax attention a model has left; `total` None where nobody converted it."""

    heads: int | None
    total: int | None
    kv_bytes_per_token: float

    @property
    def fraction(self) -> float:
        """Heads that are softmax attention over all heads; 1 for an untouched model."""
        return 1.0 if self.heads is None or not self.total else self.heads / self.total

    @property
    def entries(self) -> tuple[Entry, Entry]:
        """Entries of `ATTENTION_COLUMNS`."""
        share = f"{100 * self.fraction:.3g} %"
        heads = share if self.total is None else f"{share} ({self.heads}/{self.total})"
        return Entry(heads), Entry(size(self.kv_bytes_per_token))

    @property
    def record(self) -> dict[str, Any]:
        """Fields of `ATTENTION_FIELDS`."""
        values = (self.heads, self.total, self.fraction, self.kv_bytes_per_token)
        return dict(zip(ATTENTION_FIELDS, values, strict=True))


ATTENTION_FIELDS = ("heads", "heads_total", "softmax_fraction", "kv_bytes_per_token")
ATTENTION_COLUMNS = (Column("softmax heads"), Column("KV/token"))
ATTENTION_NOTE = "Softmax heads: query heads that are still full softmax attention, of all heads."


def attention(results: Results, group: Sequence[RunResult]) -> Attention:
    """What the student of a cell keeps, or all of it for a model as it is."""
    placement, cached = group[0].placement, group[0].efficiency.kv_bytes_per_token
    if placement is None:
        base = group[0].id.removeprefix("model-")
        shapes = {
            result.placement.layers * result.placement.heads
            for result in results.runs.values()
            if result.placement is not None and result.run is not None and result.run.base == base
        }
        total = shapes.pop() if len(shapes) == 1 else None
        return Attention(total, total, cached)
    total = placement.layers * placement.heads
    return Attention(len(placement.softmax), total, cached)


def cell_record(cell: Cell) -> dict[str, Any]:
    """Fields `view` and those of `CELL_FIELDS`."""
    record: dict[str, Any] = {name: getattr(cell, name) for name in CELL_FIELDS}
    return {"view": cell.view, **record}


ESTIMATE_FIELDS = ("value", "low", "high", "n", "seeds", "seed_sd", "missing")
# how two models compare, in tables that say to what in a field of their own
DIFFERENCE_FIELDS = ("difference", "difference_low", "difference_high", "p", "p_adjusted", "test")


def difference_fields(value: Difference | None, adjusted: float | None) -> dict[str, Any]:
    """Fields of `DIFFERENCE_FIELDS`, empty without a difference."""
    if value is None:
        return dict.fromkeys(DIFFERENCE_FIELDS)
    ends = (value.value, value.low, value.high, value.p, adjusted, value.test)
    return dict(zip(DIFFERENCE_FIELDS, ends, strict=True))


def estimate_fields(value: Estimate | None, missing: str = "") -> dict[str, Any]:
    """Fields of `ESTIMATE_FIELDS`; without an estimate the reason why it is missing."""
    if value is None:
        return {**dict.fromkeys(ESTIMATE_FIELDS), "n": 0, "missing": missing}
    ends = (value.value, value.low, value.high, value.n, value.seeds, value.seed_sd, None)
    return dict(zip(ESTIMATE_FIELDS, ends, strict=True))


def seeds_note(seeds: Iterable[int]) -> str:
    """What the intervals of scores cover, for cells with so many seeds."""
    numbers = sorted(set(seeds))
    if not numbers or numbers == [1]:
        return "One seed: the interval covers documents only."
    several = f"{numbers[-1]} seeds" if len(numbers) == 1 else f"1 to {numbers[-1]} seeds"
    if numbers[0] > 1 and len(numbers) > 1:
        several = f"{numbers[0]} to {numbers[-1]} seeds"
    text = (
        f"{several}: the interval covers documents and seeds (crossed random effects), sd is the "
        "standard deviation between seeds."
    )
    if numbers[0] == 1:
        text += " Without an sd there is one seed, and the interval covers documents only."
    return text


def missing_note(results: Results) -> str:
    """Tasks that have no data and why, as a sentence; empty where there are none."""
    if not results.missing:
        return ""
    reasons: dict[str, list[str]] = {}
    for task in results.missing.values():
        reasons.setdefault(task.missing, []).append(task.name)
    listed = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    return f" Missing data: {listed}. A mean of a family is over the tasks that have data."


def block_title(block: Block) -> str:
    """What a block holds fixed, in words."""
    return (
        f"base: {block.base} · kept: {budget_text(block.budget)} · mixer: {block.mixer} · "
        f"initialisation: {block.initialisation} · recipe: {block.recipe}"
    )


def score_column(results: Results, family: Family, group: str = "", title: str = "") -> Column:
    """Column of a family's scores with the number of documents below its title."""
    count = documents_of(results, family)
    detail = f"n = {count:,}" if count else "no data"
    if family.tasks and family.missing:
        detail += f", {len(family.missing)} of {len(family.tasks + family.missing)} tasks missing"
    return Column(title or family.heading, group=group, detail=detail)


def reference_rows(results: Results) -> list[tuple[str, str, list[RunResult], Cell | None]]:
    """Title, role, results and cell of every reference."""
    study = results.study
    bases = {entry.base for entry in study.grid}
    used = {teacher for entry in study.grid for teacher in entry.teacher}
    rows: list[tuple[str, str, list[RunResult], Cell | None]] = []
    for name, result in results.references.items():
        role = "base" if name in bases else "teacher" if name in used else "model"
        rows.append((name, role, [result], None))
    converted = cells(study, "reference")
    titles = row_titles(converted)
    for cell in converted:
        role = f"{budget_text(cell.budget)} kept, {cell.mixer}, recipe {cell.recipe}"
        rows.append((titles[cell], role, members(results, cell), cell))
    return rows


@dataclass(frozen=True)
class Row:
    """A model in a table that lists all of them; `cell` is None for a model as it is."""

    title: str
    about: str
    group: tuple[RunResult, ...]
    cell: Cell | None


@dataclass(frozen=True)
class Section:
    """Models that a table lists together: one view, and one block of the controlled view."""

    title: str
    rows: tuple[Row, ...]


def sections(results: Results) -> list[Section]:
    """Every model of the study: references first, then the controlled blocks, then faithful."""
    found = []
    rows = [
        Row(title, role, tuple(own), cell) for title, role, own, cell in reference_rows(results)
    ]
    if rows:
        found.append(Section("references", tuple(rows)))
    for block in blocks(results.study):
        rows = [
            Row(cell.selector, f"teacher: {cell.teacher}", tuple(members(results, cell)), cell)
            for cell in block.cells
        ]
        found.append(Section(f"controlled · {block_title(block)}", tuple(rows)))
    faithful = cells(results.study, "faithful")
    titles = row_titles(faithful)
    if faithful:
        rows = [
            Row(titles[cell], budget_text(cell.budget), tuple(members(results, cell)), cell)
            for cell in faithful
        ]
        found.append(Section("faithful", tuple(rows)))
    return found


def row_record(row: Row) -> dict[str, Any]:
    """Fields of `ROW_FIELDS`."""
    record: dict[str, Any] = dict.fromkeys(CELL_FIELDS)
    if row.cell is not None:
        record |= {name: getattr(row.cell, name) for name in CELL_FIELDS}
    view = row.cell.view if row.cell is not None else "reference"
    return {"model": row.title, "about": row.about, "view": view, **record}


ROW_FIELDS = ("model", "about", "view", *CELL_FIELDS)
