"""Words and fields that tables and figures share: budgets, kept heads, blocks, references."""

from __future__ import annotations

from typing import Any

from rad.placement import Budget, Placement
from rad.reporting.collect import Results, RunResult
from rad.reporting.plan import Block, Cell, cells, row_titles
from rad.reporting.scores import members
from rad.reporting.statistics import Estimate

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


def kept_memory(result: RunResult) -> tuple[int, int, float]:
    """Kept query heads, all query heads, and KV bytes per token as measured on the student."""
    placement = result.placement
    assert placement is not None
    total = placement.layers * placement.heads
    return len(placement.softmax), total, result.efficiency.kv_bytes_per_token


def cell_record(cell: Cell) -> dict[str, Any]:
    record: dict[str, Any] = {name: getattr(cell, name) for name in CELL_FIELDS}
    return {"view": cell.view, **record, "seeds": len(cell.seeds)}


def interval_fields(prefix: str, value: Estimate | None) -> dict[str, Any]:
    """`prefix`, low and high of an estimate as fields."""
    stem = prefix.split("_")[0]
    if value is None:
        return {prefix: None, f"{stem}_low": None, f"{stem}_high": None}
    return {prefix: value.value, f"{stem}_low": value.low, f"{stem}_high": value.high}


def estimate_fields(value: Estimate) -> dict[str, Any]:
    return {"value": value.value, "low": value.low, "high": value.high, "n": value.n}


def block_title(block: Block) -> str:
    """What a block holds fixed, in words."""
    return (
        f"base: {block.base} · kept: {budget_text(block.budget)} · mixer: {block.mixer} · "
        f"initialisation: {block.initialisation} · recipe: {block.recipe}"
    )


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
