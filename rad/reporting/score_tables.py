"""Tables of scores. Views are never mixed: each table has the runs of one view.

Each function takes `Results` and returns a `Table`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rad.reporting.collect import Results, RunResult
from rad.reporting.describe import (
    CELL_FIELDS,
    block_title,
    budget_text,
    cell_record,
    estimate_fields,
    interval_fields,
    kept_memory,
    reference_rows,
)
from rad.reporting.plan import Block, blocks, cells, row_titles, views
from rad.reporting.scores import (
    Family,
    best_of,
    difference,
    estimate,
    families,
    members,
    single_tasks,
    uniform_of,
    uniform_run_of,
)
from rad.reporting.writers import MISSING, Column, Entry, Panel, Table, score_entry, size

SCORE_FIELDS = (
    *("run", "view", *CELL_FIELDS, "seed", "task", "family", "metric"),
    *("value", "low", "high", "n"),
    *("difference_to_uniform", "difference_low", "difference_high"),
)


# --- the tidy form of everything ------------------------------------------------------------


def score_records(results: Results, chosen: Sequence[Family]) -> list[dict[str, Any]]:
    """One record per view, run and family of `chosen`, fields as `SCORE_FIELDS`."""
    records = []

    def add(about: dict[str, Any], result: RunResult, uniform: RunResult | None) -> None:
        for family in chosen:
            # one task: its name; several: the family's mean
            task = family.tasks[0].name if len(family.tasks) == 1 else "mean"
            gap = None
            if uniform is not None and uniform.id != result.id:
                gap = difference([result], [uniform], family)
            records.append(
                {
                    **about,
                    "task": task,
                    "family": family.tasks[0].family,
                    "metric": family.metric,
                    **estimate_fields(estimate([result], family)),
                    **interval_fields("difference_to_uniform", gap),
                }
            )

    for view in views(results.study):
        for cell in cells(results.study, view):
            for index, run in enumerate(cell.runs):
                about = {"run": run, "view": view, "seed": cell.seeds[index]}
                about |= {name: getattr(cell, name) for name in CELL_FIELDS}
                add(about, results.runs[run], uniform_run_of(results, cell, index))
    for name, result in results.references.items():
        about = {field: None for field in (*CELL_FIELDS, "seed")}
        add({**about, "run": result.id, "view": "reference", "base": name}, result, None)
    return records


# --- controlled -----------------------------------------------------------------------------


def _controlled_panel(
    results: Results, block: Block, chosen: Sequence[Family]
) -> tuple[Panel, list[dict[str, Any]]]:
    columns = [Column("selector", numeric=False), Column("heads"), Column("KV/token")]
    memory = {
        selector: kept_memory(members(results, cell)[0])
        for selector in block.selectors
        for cell in block.cells
        if cell.selector == selector
    }
    entries: dict[str, list[Entry]] = {
        selector: [Entry(f"{kept}/{total}"), Entry(size(kv))]
        for selector, (kept, total, kv) in memory.items()
    }
    records = []
    for teacher in block.teachers:
        uniform = uniform_of(results, block, teacher)
        for family in chosen:
            columns.append(Column(family.heading, group=f"teacher: {teacher}"))
            values = {
                cell.selector: estimate(members(results, cell), family)
                for cell in block.cells
                if cell.teacher == teacher
            }
            best = best_of(family, [value.value for value in values.values()])
            for selector in block.selectors:
                cell = block.cell(selector, teacher)
                if cell is None:
                    entries[selector].append(MISSING)
                    continue
                value, gap = values[selector], None
                if uniform is not None and uniform != cell:
                    gap = difference(members(results, cell), members(results, uniform), family)
                entries[selector].append(
                    score_entry(
                        value,
                        family.is_share,
                        gap,
                        family.higher_is_better,
                        best=best == value.value,
                    )
                )
                records.append(
                    {
                        **cell_record(cell),
                        "heads": memory[selector][0],
                        "kv_bytes_per_token": memory[selector][2],
                        "family": family.name,
                        "metric": family.metric,
                        **estimate_fields(value),
                        **interval_fields("difference_to_uniform", gap),
                        "best": int(best == value.value),
                    }
                )
    rows = tuple((Entry(selector), *row) for selector, row in entries.items())
    return Panel(block_title(block), tuple(columns), rows), records


SEED_NOTE = "Seeds are averaged per document before the interval is taken."


def controlled(results: Results) -> Table:
    """Selectors against each other, everything else fixed, for each teacher."""
    panels, records = [], []
    for block in blocks(results.study):
        panel, more = _controlled_panel(results, block, families(results))
        panels.append(panel)
        records += more
    seeds = max(record["seeds"] for record in records)
    return Table(
        "controlled",
        "Controlled comparison",
        "Only the selector differs within a teacher. Score with 95 % interval; below it (Δ) the "
        "paired difference to uniform with the same teacher. Bold: best of the column. As many "
        "heads can cache different bytes: both are given. "
        + (f"{seeds} seeds. {SEED_NOTE}" if seeds > 1 else "One seed."),
        tuple(panels),
        (
            *("view", *CELL_FIELDS, "seeds", "heads", "kv_bytes_per_token"),
            *("family", "metric", "value", "low", "high", "n"),
            *("difference_to_uniform", "difference_low", "difference_high", "best"),
        ),
        records,
    )


def tasks(results: Results) -> Table:
    """The controlled comparison task by task, with selectors and teachers as rows."""
    chosen = single_tasks(results)
    panels, records = [], []
    for block in blocks(results.study):
        columns = [Column("selector", numeric=False), Column("teacher", numeric=False)]
        columns += [Column(family.heading, group=family.tasks[0].family) for family in chosen]
        rows = []
        for cell in block.cells:
            group = members(results, cell)
            values = [estimate(group, family) for family in chosen]
            rows.append(
                (
                    *(Entry(cell.selector), Entry(cell.teacher)),
                    *(
                        score_entry(value, family.is_share)
                        for value, family in zip(values, chosen, strict=True)
                    ),
                )
            )
            records += [
                {
                    **cell_record(cell),
                    "task": family.name,
                    "family": family.tasks[0].family,
                    "metric": family.metric,
                    **estimate_fields(value),
                }
                for value, family in zip(values, chosen, strict=True)
            ]
        panels.append(Panel(block_title(block), tuple(columns), tuple(rows)))
    return Table(
        "tasks",
        "Controlled comparison, task by task",
        "Score with 95 % interval; families with several tasks are averages of these.",
        tuple(panels),
        (
            *("view", *CELL_FIELDS, "seeds", "task", "family", "metric"),
            *("value", "low", "high", "n"),
        ),
        records,
    )


def teachers(results: Results) -> Table:
    """The effect of the teacher on each selector, against self-distillation."""
    panels, records = [], []
    for block in blocks(results.study):
        columns = [Column("selector", numeric=False)]
        rows: dict[str, list[Entry]] = {selector: [] for selector in block.selectors}
        for family in families(results):
            for teacher in block.teachers:
                columns.append(Column(teacher, group=family.heading))
                for selector in block.selectors:
                    cell, own = block.cell(selector, teacher), block.cell(selector, "self")
                    if cell is None:
                        rows[selector].append(MISSING)
                        continue
                    group, gap = members(results, cell), None
                    value = estimate(group, family)
                    if own is not None and own != cell:
                        gap = difference(group, members(results, own), family)
                    rows[selector].append(
                        score_entry(value, family.is_share, gap, family.higher_is_better)
                    )
                    records.append(
                        {
                            **cell_record(cell),
                            "family": family.name,
                            "metric": family.metric,
                            **estimate_fields(value),
                            **interval_fields("difference_to_self", gap),
                        }
                    )
        panels.append(
            Panel(
                block_title(block),
                tuple(columns),
                tuple((Entry(selector), *row) for selector, row in rows.items()),
            )
        )
    return Table(
        "teachers",
        "Effect of the teacher",
        "The same students as in the controlled comparison, arranged by teacher. Δ: paired "
        "difference to self-distillation of the same selector.",
        tuple(panels),
        (
            *("view", *CELL_FIELDS, "seeds", "family", "metric", "value", "low", "high", "n"),
            *("difference_to_self", "difference_low", "difference_high"),
        ),
        records,
    )


# --- faithful and references ----------------------------------------------------------------


def _score_row(
    group: Sequence[RunResult], chosen: Iterable[Family]
) -> tuple[list[Entry], list[dict[str, Any]]]:
    entries, records = [], []
    for family in chosen:
        value = estimate(group, family)
        entries.append(score_entry(value, family.is_share))
        records.append({"family": family.name, "metric": family.metric, **estimate_fields(value)})
    return entries, records


def faithful(results: Results) -> Table:
    """Each method as its paper has it; rows differ in more than one thing."""
    chosen = families(results)
    names = ("method", "selector", "kept", "mixer", "initialisation", "recipe", "teacher")
    columns = [Column(name, numeric=False) for name in names]
    columns.append(Column("KV bytes/token"))
    columns += [Column(family.heading) for family in chosen]
    panels, records = [], []
    everything = cells(results.study, "faithful")
    titles = row_titles(everything)
    for base in dict.fromkeys(cell.base for cell in everything):
        rows = []
        for cell in everything:
            if cell.base != base:
                continue
            group = members(results, cell)
            entries, more = _score_row(group, chosen)
            kv = group[0].efficiency.kv_bytes_per_token
            about = (cell.selector, budget_text(cell.budget), cell.mixer, cell.initialisation)
            texts = (titles[cell], *about, cell.recipe, cell.teacher, size(kv))
            rows.append((*map(Entry, texts), *entries))
            records += [
                {"method": titles[cell], **cell_record(cell), "kv_bytes_per_token": kv, **record}
                for record in more
            ]
        panels.append(Panel(f"base: {base}", tuple(columns), tuple(rows)))
    return Table(
        "faithful",
        "Faithful comparison",
        "Each method with its own paper's initialisation, recipe, budget and teacher: rows differ "
        "in more than the selector, so compare methods, not selectors. 95 % intervals.",
        tuple(panels),
        (
            *("method", "view", *CELL_FIELDS, "seeds", "kv_bytes_per_token"),
            *("family", "metric", "value", "low", "high", "n"),
        ),
        records,
    )


def references(results: Results) -> Table:
    """Models as they are, and students that bound what a selection can gain or lose."""
    chosen = families(results)
    columns = [Column("model", numeric=False), Column("what it is", numeric=False)]
    columns.append(Column("KV bytes/token"))
    columns += [Column(family.heading) for family in chosen]
    rows, records = [], []
    for title, role, group, cell in reference_rows(results):
        entries, more = _score_row(group, chosen)
        kv = group[0].efficiency.kv_bytes_per_token
        rows.append((Entry(title), Entry(role), Entry(size(kv)), *entries))
        about = {name: getattr(cell, name) if cell else None for name in CELL_FIELDS}
        records += [
            {"model": title, "role": role, **about, "kv_bytes_per_token": kv, **record}
            for record in more
        ]
    return Table(
        "references",
        "References",
        "The untouched models, a student without attention and baselines without training. "
        "95 % intervals.",
        (Panel("", tuple(columns), tuple(rows)),),
        (
            *("model", "role", *CELL_FIELDS, "kv_bytes_per_token"),
            *("family", "metric", "value", "low", "high", "n"),
        ),
        records,
    )
