"""The tables of a study by name, and how they are written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rad.files import write_text
from rad.reporting import (
    controlled_tables,
    convergence_table,
    cost_tables,
    efficiency_tables,
    ruler_tables,
    sanity_tables,
    score_tables,
    selection_tables,
)
from rad.reporting.collect import Results
from rad.reporting.plan import table_names
from rad.reporting.scores import all_families, single_tasks
from rad.reporting.writers import Table, csv_text, write_table

TABLES: dict[str, Callable[[Results], Table]] = {
    "controlled": controlled_tables.controlled,
    "tasks": controlled_tables.tasks,
    "teachers": controlled_tables.teachers,
    "convergence": convergence_table.convergence,
    "faithful": score_tables.faithful,
    "references": score_tables.references,
    "controls": sanity_tables.controls,
    "ruler": ruler_tables.ruler,
    "selection": selection_tables.selection,
    "selection_cost": selection_tables.selection_cost,
    "agreement": selection_tables.agreement,
    "heldout": cost_tables.heldout,
    "efficiency": cost_tables.efficiency,
    "speed": efficiency_tables.speed,
}


def all_tables(results: Results) -> dict[str, Table]:
    """The tables that the study has, by name."""
    return {name: TABLES[name](results) for name in table_names(results.study)}


def write_tables(results: Results, folder: Path) -> dict[str, Table]:
    """Write every table and the tidy `scores.csv` and `families.csv`; returns the tables."""
    for name, chosen in (("scores", single_tasks(results)), ("families", all_families(results))):
        records = score_tables.score_records(results, chosen)
        write_text(folder / f"{name}.csv", csv_text(score_tables.SCORE_FIELDS, records))
    tables = all_tables(results)
    for table in tables.values():
        write_table(table, folder)
    return tables
