"""The embedded nano families, made by their generators."""

from __future__ import annotations

from typing import Any

from rad.evaluation.documents.grid import grid, interleave, spread, without
from rad.evaluation.request import Concrete, Request
from rad.evaluation.sources import Document, TaskError

SUBTASKS: tuple[str, ...] = ("single", "multikey", "vt", "cwe")
# The probe must not see test documents: another seed, far from any that a study would choose.
PROBE_SEED_OFFSET = 1_000_003


def documents(request: Request, samples: int, seed: int, **options: Any) -> list[Document]:
    """`samples` documents of a nano family, for instance with `task="vt", tokens=96`."""
    from rad.data.nano import generate

    settings = request.settings
    try:
        examples = generate(settings.kind, settings.split, seed, samples, **options)
    except ValueError as error:
        raise TaskError(f"evaluation.tasks.{request.task}: {error}") from error
    made = []
    for index, example in enumerate(examples):
        document: Document = {
            "id": str(index),
            "prompt": example.prompt,
            "target": example.answer,
        }
        if settings.kind == "ruler_nano":
            document["references"] = [example.answer.strip()]
        made.append(document)
    return made


def build(request: Request) -> list[Concrete]:
    """Word problems or output prediction: one concrete task."""
    settings, samples = request.settings, request.samples or request.settings.samples
    made = documents(request, samples, settings.seed)
    probe: list[Document] = []
    if request.probes:
        # Short functions repeat between seeds, so ask for more than needed.
        others = documents(request, 2 * request.probes, settings.seed + PROBE_SEED_OFFSET)
        probe = without(others, made, request.probes)
    return request.whole(made, probe)


def build_ruler(request: Request) -> list[Concrete]:
    """One concrete task per sub-task and length."""
    settings, samples = request.settings, request.samples or request.settings.samples
    pairs = grid(request, SUBTASKS)
    built, probes = [], []
    for (subtask, length), share in zip(pairs, spread(request.probes, len(pairs)), strict=True):
        options = {"task": subtask, "tokens": length}
        made = documents(request, samples, settings.seed, **options)
        name = f"{request.task}_{subtask}_{length}"
        built.append(Concrete(name, request.task, settings, made, [], subtask, length))
        if share:
            seed = settings.seed + PROBE_SEED_OFFSET
            probes.append(without(documents(request, share + 2, seed, **options), made, share))
    built[0].probe = interleave(probes)
    return built
