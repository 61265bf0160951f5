"""What a study left behind so far: runs that are finished, half-finished or missing, as cells.

The report needs every run; a comparison with the papers is also wanted while most are missing. So a
run that was trained but not scored has its curve here, and one that was not trained has nothing.
A file that is there is checked as the report checks it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rad.placement import Placement
from rad.reporting.collect import (
    CurvePoint,
    Efficiency,
    check_spec,
    read_curve,
    read_efficiency,
    read_scored,
)
from rad.reporting.plan import by_cell
from rad.reporting.records import json_object
from rad.reporting.samples import Samples, Task
from rad.reporting.seeds import Run as Scores
from rad.study import Run, Study

SELF = "self"


@dataclass(frozen=True)
class Evidence:
    """The files of a run, or of a model that is scored as it is; None where there is none yet."""

    id: str
    seed: int | None
    samples: Samples | None
    curve: tuple[CurvePoint, ...]
    efficiency: Efficiency | None
    placement: Placement | None

    @property
    def members(self) -> tuple[Evidence, ...]:
        """Itself: asked for models, it is like a `Cell` of one."""
        return (self,)


@dataclass(frozen=True)
class Cell:
    """Runs of a study that differ by seed only, whatever view they are in."""

    run: Run  # the first of them
    views: tuple[str, ...]
    members: tuple[Evidence, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds, in the order of the members."""
        return tuple(member.seed for member in self.members if member.seed is not None)


Side = Cell | Evidence  # students that differ by seed, or an untouched model


@dataclass(frozen=True)
class Findings:
    """All cells and reference models of a study."""

    study: Study
    cells: tuple[Cell, ...]
    references: Mapping[str, Evidence]
    shapes: Mapping[str, Mapping[str, object]]  # model name -> source.json


def gather(study: Study, root: Path) -> Findings:
    """Read what is under `root` (`results/<study>/`), which need not exist.

    Raises `ValueError` for a file that is there but broken, or of another configuration.
    """
    cells = [
        Cell(
            runs[0],
            tuple(dict.fromkeys(view for run in runs for view in run.views)),
            tuple(_run(study, root / "runs" / run.id, run) for run in runs),
        )
        for runs in by_cell(study.run_table.values())
    ]
    models = {name: root / "models" / name / "source.json" for name in study.models}
    references = {name: _files(root / "runs" / f"model-{name}", None) for name in study.references}
    _same_documents(
        [*(each for cell in cells for each in cell.members), *references.values()], root
    )
    return Findings(
        study,
        tuple(cells),
        references,
        {name: json_object(path) for name, path in models.items() if path.is_file()},
    )


def _same_documents(members: Sequence[Evidence], root: Path) -> None:
    """Raise unless whoever was scored on a task answered the same documents of it."""
    seen: dict[str, tuple[str, Collection[int]]] = {}
    for member in members:
        scores = member.samples.scores if member.samples is not None else {}
        for task, documents in scores.items():
            first, wanted = seen.setdefault(task, (member.id, documents.keys()))
            if documents.keys() != wanted:
                path = root / "runs" / member.id / "samples.jsonl"
                raise ValueError(f"{path}: documents of {task} differ from those of {first}")


def _run(study: Study, folder: Path, run: Run) -> Evidence:
    spec = folder / "spec.json"
    # the spec is written before training: without it there is nothing else
    if spec.is_file():
        check_spec(study, spec, run)
    return _files(folder, run.seed)


def _files(folder: Path, seed: int | None) -> Evidence:
    evaluation, curve = folder / "evaluation.json", folder / "curve.jsonl"
    samples = None
    if evaluation.is_file():
        samples = read_scored(folder).samples
    # a curve grows while the run trains; training.json says that it is whole
    trained = (folder / "training.json").is_file() and curve.is_file()
    efficiency, placement = folder / "efficiency.json", folder / "placement.json"
    return Evidence(
        folder.name,
        seed,
        samples,
        read_curve(curve) if trained else (),
        read_efficiency(efficiency) if efficiency.is_file() else None,
        Placement.load(placement) if placement.is_file() else None,
    )


# --- what is asked of cells -----------------------------------------------------------------


def kept_share(findings: Findings, cell: Cell) -> float | None:
    """Share of (layer, head) pairs that stay; None where neither budget nor files tell."""
    for member in cell.members:
        if member.placement is not None:
            found = member.placement
            return len(found.softmax) / (found.layers * found.heads)
    budget = cell.run.budget
    if budget.fraction is not None:
        return budget.fraction
    if budget.layers == 0 or budget.heads == 0:
        return 0.0
    shape = findings.shapes.get(cell.run.base, {})
    layers, heads = shape.get("layers"), shape.get("heads")
    if isinstance(layers, int) and isinstance(heads, int):
        if budget.layers is not None:
            return budget.layers / layers
        if budget.heads is not None:
            return budget.heads / (layers * heads)
    return None


def state_size(findings: Findings, cell: Cell) -> float | None:
    """State dim of the cell's mixer; None where it has none, or follows from an unknown base."""
    mixer = findings.study.mixers[cell.run.mixer]
    if not hasattr(mixer, "state_size"):
        return None
    if mixer.state_size is not None:
        return float(mixer.state_size)
    width = findings.shapes.get(cell.run.base, {}).get("head_dim")
    return float(width) if isinstance(width, int) else None


def teacher_size(findings: Findings, cell: Cell) -> float | None:
    """A number that grows with the teacher: its parameters, or what its shape gives for them."""
    name = cell.run.base if cell.run.teacher == SELF else cell.run.teacher
    reference = findings.references.get(name)
    if reference is not None and reference.efficiency is not None:
        return float(reference.efficiency.parameters)
    shape = findings.shapes.get(name, {})
    layers, width = shape.get("layers"), shape.get("hidden_size")
    if isinstance(layers, int) and isinstance(width, int):
        return 12.0 * layers * width**2
    return None


def cache_bytes(side: Side, context: int) -> float | None:
    """Measured cache bytes of one sequence at a context, the same for every seed."""
    member = side.members[0]
    if member.efficiency is None:
        return None
    for point in member.efficiency.points:
        if point.context == context:
            return point.cache_bytes
    return None


def contexts(members: Sequence[Evidence]) -> list[int]:
    """Contexts that the cache of all of them was measured at, ascending."""
    found = [
        {point.context for point in member.efficiency.points}
        for member in members
        if member.efficiency is not None
    ]
    return sorted(set.intersection(*found)) if len(found) == len(members) and found else []


def tasks_of(member: Evidence, family: str) -> tuple[Task, ...]:
    """The scored tasks of a family, in the order of the evaluation."""
    if member.samples is None:
        return ()
    return tuple(task for task in member.samples.tasks.values() if task.family == family)


def scores_of(member: Evidence, tasks: Sequence[Task], metric: str | None = None) -> Scores:
    """Documents' scores by task, documents in one order.

    `metric`: another than the headline. Raises `ValueError` where the run lacks a task or metric.
    """
    assert member.samples is not None
    arrays = []
    for task in tasks:
        table = member.samples.scores.get(task.name)
        if metric is not None and metric != task.metric:
            table = member.samples.metrics.get(task.name, {}).get(metric)
        if table is None:
            raise ValueError(f"{member.id}: no {metric or 'scores'} of task {task.name}")
        arrays.append(np.array([table[key] for key in sorted(table)], dtype=np.float64))
    return arrays


def same_students(first: Cell, second: Cell) -> bool:
    """Whether two cells are the same models: they differ in the selector's name alone."""
    keys = ("base", "mixer", "initialisation", "recipe", "teacher")
    if any(getattr(first.run, key) != getattr(second.run, key) for key in keys):
        return False
    order = {member.seed: member for member in second.members}
    if sorted(order, key=str) != sorted((m.seed for m in first.members), key=str):
        return False
    for member in first.members:
        mine, theirs = member.placement, order[member.seed].placement
        if mine is None or theirs is None or sorted(mine.softmax) != sorted(theirs.softmax):
            return False
    return True
