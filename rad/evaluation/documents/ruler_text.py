"""RULER in small: four of its tasks at contexts that tiny models have."""

from __future__ import annotations

from rad.evaluation import ruler_text, sources
from rad.evaluation.documents.grid import grid, interleave, spread, without
from rad.evaluation.documents.nano import PROBE_SEED_OFFSET
from rad.evaluation.request import Concrete, Request
from rad.evaluation.sources import Document


def build(request: Request) -> list[Concrete]:
    """One concrete task per sub-task and length."""
    settings, samples = request.settings, request.samples or request.settings.samples
    pairs = grid(request, ruler_text.SUBTASKS)
    hay = ruler_text.Haystack(sources.read_texts(request.task, settings.files, request.root))
    hay.check(request.task)

    def make(subtask: str, length: int, count: int, seed: int) -> list[Document]:
        return ruler_text.documents(
            request.task,
            subtask,
            length,
            count,
            hay=hay,
            seed=seed,
            new_tokens=settings.max_new_tokens,
            count=request.count,
        )

    built, probes = [], []
    for (subtask, length), share in zip(pairs, spread(request.probes, len(pairs)), strict=True):
        made = make(subtask, length, samples, settings.seed)
        name = f"{request.task}_{subtask}_{length}"
        built.append(Concrete(name, request.task, settings, made, [], subtask, length))
        if share:
            others = make(subtask, length, share + 2, settings.seed + PROBE_SEED_OFFSET)
            probes.append(without(others, made, share))
    built[0].probe = interleave(probes)
    return built
