"""Tables of the controlled view, in which only the selector and the teacher differ in a panel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rad.reporting.collect import Results
from rad.reporting.describe import (
    ATTENTION_COLUMNS,
    ATTENTION_FIELDS,
    ATTENTION_NOTE,
    CELL_FIELDS,
    DIFFERENCE_FIELDS,
    ESTIMATE_FIELDS,
    Attention,
    attention,
    block_title,
    cell_record,
    difference_fields,
    estimate_fields,
    missing_note,
    score_column,
    seeds_note,
)
from rad.reporting.plan import Block, Cell, blocks, cells, reference_name
from rad.reporting.score_tables import score_row
from rad.reporting.scores import (
    Family,
    adjusted,
    all_families,
    best_of,
    difference,
    estimate,
    members,
    reference_of,
    single_tasks,
)
from rad.reporting.writers import MISSING, Column, Entry, Panel, Table, score_entry

TEST_NOTE = (
    "p: two-sided, McNemar's exact test where 0/1 scores count equally, else random sign flips of "
    "the documents' differences; with several seeds a t-test over seeds and documents. Holm's "
    "correction"
)


def _seeds(results: Results) -> str:
    return seeds_note(len(cell.seeds) for cell in cells(results.study, "controlled"))


def _kept(results: Results, block: Block) -> dict[str, Attention]:
    """What each selector of a block keeps, the same for every teacher."""
    return {cell.selector: attention(results, members(results, cell)) for cell in block.cells}


def compared(
    results: Results, family: Family, pairs: Mapping[Cell, Cell | None]
) -> tuple[dict[Cell, Entry], list[dict[str, Any]]]:
    """Entries and records of cells, each with its difference to the cell that it is paired with.

    The p-values of all `pairs` are adjusted together.
    """
    values = {
        cell: estimate(members(results, cell), family) if family.tasks else None for cell in pairs
    }
    gaps = {
        cell: difference(members(results, cell), members(results, other), family)
        if other is not None and other != cell and family.tasks
        else None
        for cell, other in pairs.items()
    }
    corrected = dict(zip(pairs, adjusted(list(gaps.values())), strict=True))
    best = best_of(family, [value.value for value in values.values() if value is not None])
    entries, records = {}, []
    for cell, value in values.items():
        leads = value is not None and best == value.value
        entries[cell] = score_entry(
            value, family.is_share, gaps[cell], family.higher_is_better, leads, corrected[cell]
        )
        records.append(
            {
                **cell_record(cell),
                "family": family.family,
                "metric": family.metric,
                **estimate_fields(value, family.reason),
                **difference_fields(gaps[cell], corrected[cell]),
                "best": int(leads),
            }
        )
    return entries, records


def _controlled_panel(
    results: Results, block: Block, chosen: Sequence[Family]
) -> tuple[Panel, list[dict[str, Any]]]:
    columns = [Column("selector", numeric=False), *ATTENTION_COLUMNS]
    kept = _kept(results, block)
    rows: dict[str, list[Entry]] = {name: list(kept[name].entries) for name in block.selectors}
    records = []
    for teacher in block.teachers:
        reference = reference_of(results, block, teacher)
        pairs = {cell: reference for cell in block.cells if cell.teacher == teacher}
        for family in chosen:
            columns.append(score_column(results, family, f"teacher: {teacher}"))
            entries, more = compared(results, family, pairs)
            for selector in block.selectors:
                cell = block.cell(selector, teacher)
                rows[selector].append(MISSING if cell is None else entries[cell])
            named = {"reference": reference.selector if reference is not None else None}
            records += [{**record, **named, **kept[record["selector"]].record} for record in more]
    body = tuple((Entry(selector), *row) for selector, row in rows.items())
    return Panel(block_title(block), tuple(columns), body), records


def controlled(results: Results) -> Table:
    """Selectors against each other, everything else fixed, for each teacher."""
    panels, records = [], []
    for block in blocks(results.study):
        panel, more = _controlled_panel(results, block, all_families(results))
        panels.append(panel)
        records += more
    return Table(
        "controlled",
        "Controlled comparison",
        "Only the selector differs within a teacher. Score with 95 % interval; below it (Δ) the "
        f"paired difference to {reference_name(results.study)} with the same teacher. Bold: best "
        f"of the column. {TEST_NOTE} over the selectors of a teacher, family by family. "
        f"{_seeds(results)} {ATTENTION_NOTE} As many heads can cache different bytes: both are "
        f"given.{missing_note(results)}",
        tuple(panels),
        (
            *("view", *CELL_FIELDS, *ATTENTION_FIELDS, "family", "metric", *ESTIMATE_FIELDS),
            *("reference", *DIFFERENCE_FIELDS, "best"),
        ),
        records,
    )


def tasks(results: Results) -> Table:
    """The controlled comparison task by task, with selectors and teachers as rows."""
    chosen = single_tasks(results)
    panels, records = [], []
    for block in blocks(results.study):
        columns = [Column("selector", numeric=False), Column("teacher", numeric=False)]
        columns += [*ATTENTION_COLUMNS]
        columns += [score_column(results, family, family.family) for family in chosen]
        rows = []
        for cell in block.cells:
            group = members(results, cell)
            kept = attention(results, group)
            scores, more = score_row(group, chosen)
            rows.append((Entry(cell.selector), Entry(cell.teacher), *kept.entries, *scores))
            records += [
                {
                    **cell_record(cell),
                    **kept.record,
                    **record,
                    "task": family.name,
                    "family": family.family,
                }
                for record, family in zip(more, chosen, strict=True)
            ]
        panels.append(Panel(block_title(block), tuple(columns), tuple(rows)))
    return Table(
        "tasks",
        "Controlled comparison, task by task",
        "Score with 95 % interval; families with several tasks are averages of these. "
        f"{_seeds(results)} {ATTENTION_NOTE}{missing_note(results)}",
        tuple(panels),
        (
            *("view", *CELL_FIELDS, *ATTENTION_FIELDS, "task", "family", "metric"),
            *ESTIMATE_FIELDS,
        ),
        records,
    )


def teachers(results: Results) -> Table:
    """The effect of the teacher on each selector, against self-distillation."""
    panels, records = [], []
    for block in blocks(results.study):
        kept = _kept(results, block)
        columns = [Column("selector", numeric=False), *ATTENTION_COLUMNS]
        rows: dict[str, list[Entry]] = {name: list(kept[name].entries) for name in block.selectors}
        for family in all_families(results):
            for teacher in block.teachers:
                columns.append(score_column(results, family, family.heading, teacher))
            for selector in block.selectors:
                mine = [cell for cell in block.cells if cell.selector == selector]
                own = block.cell(selector, "self")
                entries, more = compared(results, family, dict.fromkeys(mine, own))
                for teacher in block.teachers:
                    cell = block.cell(selector, teacher)
                    # which teacher is best is not the question of bold type here
                    entry = MISSING if cell is None else replace(entries[cell], best=False)
                    rows[selector].append(entry)
                for record in more:
                    record["reference"] = "self" if record["difference"] is not None else None
                    records.append({**record, **kept[selector].record})
        body = tuple((Entry(selector), *row) for selector, row in rows.items())
        panels.append(Panel(block_title(block), tuple(columns), body))
    fields = (
        *("view", *CELL_FIELDS, *ATTENTION_FIELDS, "family", "metric", *ESTIMATE_FIELDS),
        *("reference", *DIFFERENCE_FIELDS),
    )
    return Table(
        "teachers",
        "Effect of the teacher",
        "The same students as in the controlled comparison, arranged by teacher. Δ: paired "
        f"difference to self-distillation of the same selector. {TEST_NOTE} over the teachers of "
        f"a selector, family by family. {_seeds(results)}{missing_note(results)}",
        tuple(panels),
        fields,
        [{key: record.get(key) for key in fields} for record in records],
    )
