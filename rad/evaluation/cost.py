"""What a suite costs, known before it starts, and how far it has come."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rad.progress import Progress


class Cost(NamedTuple):
    """Requests to the model and their tokens; of new tokens the most there can be."""

    task: str
    documents: int
    prompts: int
    prompt_tokens: int
    new_tokens: int


def of(entry: Mapping[str, Any]) -> Cost:
    """The cost of one concrete task of the manifest; every answer and choice is a prompt."""
    generated = entry["output_type"] == "generate_until"
    return Cost(
        entry["name"],
        entry["samples"],
        entry["prompts"],
        entry["prompt_tokens_total"],
        entry["prompts"] * entry["max_new_tokens"] if generated else 0,
    )


def summary(manifest: Mapping[str, Any]) -> tuple[list[Cost], Cost]:
    """(cost of every concrete task that has data, total)."""
    rows = [of(entry) for entry in manifest["tasks"] if entry["status"] == "ready"]
    return rows, total(rows)


def total(rows: Sequence[Cost]) -> Cost:
    """All rows together."""
    columns = zip(*(row[1:] for row in rows), strict=True) if rows else [()] * 4
    return Cost("total", *(sum(column) for column in columns))


def text(manifest: Mapping[str, Any]) -> str:
    """A table with a line per configured task and one for all, in plain text."""
    rows, everything = summary(manifest)
    group = {entry["name"]: entry["task"] for entry in manifest["tasks"]}
    shown = []
    for task in dict.fromkeys(group[row.task] for row in rows):
        shown.append(total([row for row in rows if group[row.task] == task])._replace(task=task))
    shown.append(everything)
    width = max(len("task"), *(len(row.task) for row in shown))
    head = f"{'task':<{width}} {'documents':>10} {'prompts':>10} {'prompt tokens':>14}"
    lines = [f"{head} {'new tokens at most':>19}"]
    lines += [
        f"{row.task:<{width}} {row.documents:>10,} {row.prompts:>10,} {row.prompt_tokens:>14,} "
        f"{row.new_tokens:>19,}"
        for row in shown
    ]
    return "\n".join(lines)


class Tracker:
    """Progress of a suite in prompts, the current task and the tokens generated so far beside."""

    def __init__(self, rows: Sequence[Cost], progress: Progress) -> None:
        self.progress = progress
        self.wanted = {row.task: row.prompts for row in rows}
        self.most = total(rows).new_tokens
        self.done: Counter[str] = Counter()
        self.new_tokens = 0

    def report(self, places: Sequence[tuple[str, int]], new_tokens: int) -> None:
        """A batch is finished: (task, document) of its requests, tokens generated for them."""
        self.new_tokens += new_tokens
        self.done.update(task for task, _ in places)
        tasks = dict.fromkeys(task for task, _ in places)
        notes = [f"{task} {self.done[task]}/{self.wanted[task]}" for task in tasks]
        notes[2:] = [f"{len(notes) - 2} more tasks"] if len(notes) > 2 else []
        notes.append(f"{self.new_tokens:,} new tokens of at most {self.most:,}")
        self.progress.advance(", ".join(notes), len(places))
