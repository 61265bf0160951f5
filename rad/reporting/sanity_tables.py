"""Table of controls: what reviewers ask of a score before they believe it.

One row per model, the untouched base and the references first: the headline beside every other
metric of the same answers (strict beside lenient scoring), how many answers had none, how many were
cut at the token limit, and how much softmax attention is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rad.reporting.collect import Results, RunResult
from rad.reporting.describe import (
    ATTENTION_COLUMNS,
    ATTENTION_FIELDS,
    ATTENTION_NOTE,
    DIFFERENCE_FIELDS,
    ESTIMATE_FIELDS,
    ROW_FIELDS,
    Row,
    attention,
    difference_fields,
    estimate_fields,
    missing_note,
    row_record,
    score_column,
    sections,
    seeds_note,
)
from rad.reporting.samples import Task
from rad.reporting.scores import (
    Family,
    Reader,
    adjusted,
    all_families,
    difference,
    documents_of,
    estimate,
    estimate_of,
)
from rad.reporting.writers import Column, Entry, Panel, Table, score_entry

TITLES = {"new_tokens": "tokens/answer", "no_answer": "no answer %", "truncated": "cut off %"}


@dataclass(frozen=True)
class Metric:
    """Another metric of the answers of some tasks of a family."""

    name: str
    tasks: tuple[Task, ...]
    share: bool  # all values lie between 0 and 1

    @property
    def read(self) -> Reader:
        """Reads the metric's values of a task off a result."""
        return lambda result, task: dict(result.samples.metrics[task.name][self.name])

    @property
    def title(self) -> str:
        """Column title with the unit."""
        return TITLES.get(self.name, f"{self.name} %" if self.share else self.name)


def other_metrics(results: Results, family: Family) -> list[Metric]:
    """Metrics beside the headline that every model has for a task of the family."""
    if family.is_perplexity:
        return []
    everyone = results.everything
    found: dict[str, list[Task]] = {}
    for task in family.tasks:
        for name in everyone[0].samples.metrics.get(task.name, {}):
            shared = all(name in result.samples.metrics.get(task.name, {}) for result in everyone)
            if name != task.metric and shared:
                found.setdefault(name, []).append(task)
    # how answers ended comes last, whatever order the records have
    order = sorted(found, key=lambda name: list(TITLES).index(name) if name in TITLES else -1)
    metrics = []
    for name in order:
        values = [
            value
            for result in everyone
            for task in found[name]
            for value in result.samples.metrics[task.name][name].values()
        ]
        inside = bool(np.min(values) >= 0 and np.max(values) <= 1)
        metrics.append(Metric(name, tuple(found[name]), inside and name != "new_tokens"))
    return metrics


def _untouched(results: Results, row: Row) -> RunResult | None:
    """The base that a student was made from, where it was scored."""
    return results.references.get(row.cell.base) if row.cell is not None else None


def _headline(
    results: Results, rows: Sequence[Row], family: Family
) -> list[tuple[Entry, dict[str, Any]]]:
    """Headline of every row with its difference to the untouched base, adjusted over the rows."""
    gaps = []
    for row in rows:
        base = _untouched(results, row)
        gaps.append(difference(row.group, [base], family) if base and family.tasks else None)
    found = []
    for row, gap, corrected in zip(rows, gaps, adjusted(gaps), strict=True):
        value = estimate(row.group, family) if family.tasks else None
        better = family.higher_is_better
        entry = score_entry(value, family.is_share, gap, better, adjusted=corrected)
        record = {
            "family": family.family,
            "metric": family.metric,
            "headline": 1,
            **estimate_fields(value, family.reason),
            **difference_fields(gap, corrected),
        }
        found.append((entry, record))
    return found


def _other(
    rows: Sequence[Row], family: Family, metric: Metric
) -> list[tuple[Entry, dict[str, Any]]]:
    found = []
    for row in rows:
        value = estimate_of(row.group, metric.tasks, metric.read)
        record = {"family": family.family, "metric": metric.name, "headline": 0}
        record |= difference_fields(None, None)
        found.append((score_entry(value, metric.share), {**record, **estimate_fields(value)}))
    return found


def controls(results: Results) -> Table:
    """Strict beside lenient scores, answers that are none, and the softmax that is left."""
    chosen = [(family, other_metrics(results, family)) for family in all_families(results)]
    columns = [Column("model", numeric=False), Column("what it is", numeric=False)]
    columns += ATTENTION_COLUMNS
    for family, metrics in chosen:
        # the family is the heading above: below it stands the metric
        unit = " % ↑" if family.is_share else " ↑" if family.higher_is_better else " ↓"
        columns.append(score_column(results, family, family.name, f"{family.metric}{unit}"))
        for metric in metrics:
            count = documents_of(results, Family(family.name, metric.tasks))
            columns.append(Column(metric.title, family.name, detail=f"n = {count:,}"))
    panels, records, seeds = [], [], []
    for section in sections(results):
        body: list[list[Entry]] = []
        about: list[dict[str, Any]] = []
        for row in section.rows:
            kept = attention(results, row.group)
            body.append([Entry(row.title), Entry(row.about), *kept.entries])
            about.append({**row_record(row), **kept.record})
            seeds.append(len(row.group))
        for family, metrics in chosen:
            found = [_headline(results, section.rows, family)]
            found += [_other(section.rows, family, metric) for metric in metrics]
            for column in found:
                for index, (entry, record) in enumerate(column):
                    body[index].append(entry)
                    records.append({**about[index], **record})
        panels.append(Panel(section.title, tuple(columns), tuple(map(tuple, body))))
    others = any(metrics for _, metrics in chosen)
    beside = (
        "Beside the headline every other metric of the same answers: lenient scoring that is far "
        "above the headline says that the format was lost and not the ability; answers without a "
        "result and answers cut off at the token limit explain low scores."
        if others
        else "These results were written without other metrics of the same answers."
    )
    return Table(
        "controls",
        "Sanity controls",
        f"All models under the same harness and prompts. Δ: paired difference to the untouched "
        f"base, p adjusted by Holm over the rows of a panel. {beside} 95 % intervals. "
        f"{seeds_note(seeds)} {ATTENTION_NOTE}{missing_note(results)}",
        tuple(panels),
        (
            *(*ROW_FIELDS, *ATTENTION_FIELDS, "family", "metric", "headline", *ESTIMATE_FIELDS),
            *DIFFERENCE_FIELDS,
        ),
        records,
    )
