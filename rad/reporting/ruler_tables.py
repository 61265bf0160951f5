"""Table of RULER by context length: the mean over sub-tasks per length, and the effective length.

The effective length is the longest length at which the mean exceeds that of Llama-2-7B-chat at 4k
tokens, 85.6 % (Hsieh et al., RULER, arXiv 2404.06654, section 4; the repository's README).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rad.evaluation.scoring.ruler import THRESHOLD, effective_length, first_failure
from rad.reporting.collect import Results, RunResult
from rad.reporting.describe import (
    ATTENTION_COLUMNS,
    ATTENTION_FIELDS,
    ATTENTION_NOTE,
    ESTIMATE_FIELDS,
    ROW_FIELDS,
    attention,
    estimate_fields,
    missing_note,
    row_record,
    score_column,
    sections,
    seeds_note,
)
from rad.reporting.plan import LengthTask, length_tasks
from rad.reporting.samples import Task
from rad.reporting.scores import Family, estimate
from rad.reporting.statistics import Estimate
from rad.reporting.writers import Column, Entry, Panel, Table, score_entry


def by_length(results: Results, task: LengthTask) -> dict[int, Family]:
    """Length in tokens -> the sub-tasks at this length as a family, also those without data."""
    found = {}
    for length in task.lengths:
        scored = [each for each in results.tasks.values() if _is_of(task, length, each)]
        missing = [each for each in results.missing.values() if _is_of(task, length, each)]
        if scored or missing:
            found[length] = Family(f"{length:,} tokens", tuple(scored), tuple(missing))
    return found


def _is_of(task: LengthTask, length: int, concrete: Task) -> bool:
    # a task without any data was never expanded into lengths
    whole = bool(concrete.missing) and concrete.length is None
    return concrete.parent == task.name and (whole or concrete.length == length)


def _length_entry(values: dict[int, Estimate]) -> Entry:
    """The effective length with those of both ends of the intervals."""
    if not values:
        return Entry("–")
    shortest, longest = min(values), max(values)

    def text(scores: dict[int, float]) -> str:
        found = effective_length(scores)
        if found is None:
            return f"< {shortest:,}"
        return f"≥ {found:,}" if found == longest else f"{found:,}"

    low, high = (
        text({length: getattr(value, end) for length, value in values.items()})
        for end in ("low", "high")
    )
    scores = {length: value.value for length, value in values.items()}
    reach, failed = effective_length(scores), first_failure(scores)
    gap = f"fails at {failed:,}" if reach and failed and failed < reach else ""
    return Entry(text(scores), f"[{low}, {high}]", spread=gap)


def lengths_of(group: Sequence[RunResult], families: Mapping[int, Family]) -> dict[int, Estimate]:
    """Length -> mean over its sub-tasks, for lengths that have data."""
    return {length: estimate(group, family) for length, family in families.items() if family.tasks}


def ruler(results: Results) -> Table:
    """Scores per length, averaged over sub-tasks, and the effective length."""
    panels, records, seeds = [], [], []
    for task in length_tasks(results.study):
        families = by_length(results, task)
        subtasks = {each.subtask for family in families.values() for each in family.tasks}
        group = f"{task.name}, mean of {len(subtasks)} sub-tasks (%)"
        columns = [Column("model", numeric=False), Column("what it is", numeric=False)]
        columns += ATTENTION_COLUMNS
        columns += [
            score_column(results, family, group, f"{length:,}")
            for length, family in families.items()
        ]
        columns.append(Column("effective length", detail="tokens"))
        for section in sections(results):
            rows = []
            for row in section.rows:
                kept, values = attention(results, row.group), lengths_of(row.group, families)
                seeds.append(len(row.group))
                entries = [
                    score_entry(values.get(length), family.is_share)
                    for length, family in families.items()
                ]
                about = (Entry(row.title), Entry(row.about), *kept.entries)
                rows.append((*about, *entries, _length_entry(values)))
                reach = effective_length({length: value.value for length, value in values.items()})
                records += [
                    {
                        **row_record(row),
                        **kept.record,
                        "task": task.name,
                        "length": length,
                        "subtasks": len(family.tasks),
                        "metric": family.metric,
                        **estimate_fields(values.get(length), family.reason),
                        "effective_length": reach,
                    }
                    for length, family in families.items()
                ]
            panels.append(Panel(section.title, tuple(columns), tuple(rows)))
    return Table(
        "ruler",
        "RULER by context length",
        "Mean over sub-tasks at each context length with its 95 % interval. Effective length: the "
        f"longest length at which the mean exceeds {100 * THRESHOLD:.1f} % (Llama-2-7B-chat "
        "at 4k, the rule of RULER); in brackets by the lower and by the upper ends of the "
        f"intervals. {seeds_note(seeds)} {ATTENTION_NOTE}{missing_note(results)}",
        tuple(panels),
        (
            *(*ROW_FIELDS, *ATTENTION_FIELDS, "task", "length", "subtasks", "metric"),
            *(*ESTIMATE_FIELDS, "effective_length"),
        ),
        records,
    )
