"""The tidy form of all scores, and the tables of the faithful view and of references.

Views are never mixed: each table has the runs of one view. The controlled view has its own tables
in `controlled_tables.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rad.reporting.collect import Results, RunResult
from rad.reporting.describe import (
    ATTENTION_COLUMNS,
    ATTENTION_FIELDS,
    ATTENTION_NOTE,
    CELL_FIELDS,
    ESTIMATE_FIELDS,
    attention,
    budget_text,
    cell_record,
    difference_fields,
    estimate_fields,
    missing_note,
    reference_rows,
    score_column,
    seeds_note,
)
from rad.reporting.plan import cells, row_titles, views
from rad.reporting.scores import (
    Family,
    all_families,
    difference,
    estimate,
    members,
    reference_run_of,
)
from rad.reporting.writers import Column, Entry, Panel, Table, score_entry

SCORE_FIELDS = (
    *("run", "view", *CELL_FIELDS, "seed", "task", "family", "metric"),
    *("value", "low", "high", "n", "reference"),
    *("difference", "difference_low", "difference_high", "p", "missing"),
)


# --- the tidy form of everything ------------------------------------------------------------


def score_records(results: Results, chosen: Sequence[Family]) -> list[dict[str, Any]]:
    """One record per view, run and family of `chosen`, fields as `SCORE_FIELDS`.

    Each run stands for itself here: intervals cover documents only, differences are to the
    reference run of the same seed and their p-values are not adjusted.
    """
    records: list[dict[str, Any]] = []

    def add(about: dict[str, Any], result: RunResult, other: RunResult | None) -> None:
        for family in chosen:
            # one task: its name; several: the family's mean
            task = "mean" if len(family.tasks) > 1 else (*family.tasks, *family.missing)[0].name
            value = estimate([result], family) if family.tasks else None
            gap, reference = None, None
            if value is not None and other is not None and other.id != result.id:
                gap = difference([result], [other], family)
                reference = other.run.selector if other.run is not None else None
            record = {
                **about,
                "task": task,
                "family": family.family,
                "metric": family.metric,
                **estimate_fields(value, family.reason),
                "reference": reference,
                **difference_fields(gap, None),
            }
            records.append({key: record.get(key) for key in SCORE_FIELDS})

    for view in views(results.study):
        for cell in cells(results.study, view):
            for index, run in enumerate(cell.runs):
                about = {"run": run, "view": view, "seed": cell.seeds[index]}
                about |= {name: getattr(cell, name) for name in CELL_FIELDS}
                add(about, results.runs[run], reference_run_of(results, cell, index))
    for name, result in results.references.items():
        about = {field: None for field in (*CELL_FIELDS, "seed")}
        add({**about, "run": result.id, "view": "reference", "base": name}, result, None)
    return records


# --- faithful and references ----------------------------------------------------------------


def score_row(
    group: Sequence[RunResult], chosen: Iterable[Family]
) -> tuple[list[Entry], list[dict[str, Any]]]:
    """Entries and records of a model's scores."""
    entries, records = [], []
    for family in chosen:
        value = estimate(group, family) if family.tasks else None
        entries.append(score_entry(value, family.is_share))
        about = {"family": family.name, "metric": family.metric}
        records.append({**about, **estimate_fields(value, family.reason)})
    return entries, records


def faithful(results: Results) -> Table:
    """Each method as its paper has it; rows differ in more than one thing."""
    chosen = all_families(results)
    names = ("method", "selector", "kept", "mixer", "initialisation", "recipe", "teacher")
    columns = [*(Column(name, numeric=False) for name in names), *ATTENTION_COLUMNS]
    columns += [score_column(results, family) for family in chosen]
    panels, records = [], []
    everything = cells(results.study, "faithful")
    titles = row_titles(everything)
    for base in dict.fromkeys(cell.base for cell in everything):
        rows = []
        for cell in everything:
            if cell.base != base:
                continue
            group = members(results, cell)
            entries, more = score_row(group, chosen)
            kept = attention(results, group)
            about = (cell.selector, budget_text(cell.budget), cell.mixer, cell.initialisation)
            texts = (titles[cell], *about, cell.recipe, cell.teacher)
            rows.append((*map(Entry, texts), *kept.entries, *entries))
            records += [
                {"method": titles[cell], **cell_record(cell), **kept.record, **record}
                for record in more
            ]
        panels.append(Panel(f"base: {base}", tuple(columns), tuple(rows)))
    return Table(
        "faithful",
        "Faithful comparison",
        "Each method with its own paper's initialisation, recipe, budget and teacher: rows differ "
        f"in more than the selector, so compare methods, not selectors. 95 % intervals. "
        f"{seeds_note(len(cell.seeds) for cell in everything)} {ATTENTION_NOTE}"
        f"{missing_note(results)}",
        tuple(panels),
        (
            *("method", "view", *CELL_FIELDS, *ATTENTION_FIELDS),
            *("family", "metric", *ESTIMATE_FIELDS),
        ),
        records,
    )


def references(results: Results) -> Table:
    """Models as they are, and students that bound what a selection can gain or lose."""
    chosen = all_families(results)
    columns = [Column("model", numeric=False), Column("what it is", numeric=False)]
    columns += [*ATTENTION_COLUMNS, *(score_column(results, family) for family in chosen)]
    rows, records, seeds = [], [], []
    for title, role, group, cell in reference_rows(results):
        entries, more = score_row(group, chosen)
        kept = attention(results, group)
        seeds.append(len(group))
        rows.append((Entry(title), Entry(role), *kept.entries, *entries))
        about = {name: getattr(cell, name) if cell else None for name in CELL_FIELDS}
        records += [
            {"model": title, "role": role, **about, **kept.record, **record} for record in more
        ]
    return Table(
        "references",
        "References",
        "The untouched models, a student without attention and baselines without training, under "
        f"the same harness and prompts as every student. 95 % intervals. {seeds_note(seeds)} "
        f"{ATTENTION_NOTE}{missing_note(results)}",
        (Panel("", tuple(columns), tuple(rows)),),
        (
            *("model", "role", *CELL_FIELDS, *ATTENTION_FIELDS),
            *("family", "metric", *ESTIMATE_FIELDS),
        ),
        records,
    )
