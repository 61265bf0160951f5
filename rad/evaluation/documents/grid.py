"""Tasks that are a grid of sub-tasks and lengths, and what their probe is made of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rad.evaluation.request import Request
from rad.evaluation.sources import Document
from rad.task_settings import closest


def grid(request: Request, known: Sequence[str]) -> list[tuple[str, int]]:
    """The (sub-task, length) pairs asked for; raises `TaskError` on unknown ones or none."""
    settings = request.settings
    chosen = settings.subtasks or list(known)
    for name in chosen:
        if name not in known:
            raise request.error("subtasks", f"unknown {name!r}{closest(name, list(known))}")
    if not settings.lengths:
        raise request.error("lengths", "a ruler task needs at least one length")
    return [(name, length) for name in chosen for length in settings.lengths]


def spread(total: int, parts: int) -> list[int]:
    """`total` divided into `parts` that differ by one at most, the larger ones first."""
    return [total // parts + (index < total % parts) for index in range(parts)]


def interleave(groups: Iterable[list[Document]]) -> list[Document]:
    """Round-robin, so that a prefix of the probe covers every sub-task and length."""
    left = [list(group) for group in groups]
    result = []
    while any(left):
        result += [group.pop(0) for group in left if group]
    return result


def without(documents: list[Document], taken: list[Document], most: int) -> list[Document]:
    """At most `most` of the documents whose prompt is none of `taken`."""
    prompts = {item["prompt"] for item in taken}
    return [item for item in documents if item["prompt"] not in prompts][:most]
