"""Which runs are compared with which, and the files a report consists of. No torch, no matplotlib.

The workflow calls `outputs(study)` while it builds its graph, so everything here follows from the
study alone, never from what is on disk.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rad.settings import NEEDS
from rad.study import Run, Study

# everything but the selector, the teacher and the seed: what a controlled comparison holds fixed
FIXED = ("base", "budget", "mixer", "initialisation", "recipe")
FIGURE_FORMATS = ("svg", "pdf")
TABLE_FORMATS = ("csv", "md", "tex")


@dataclass(frozen=True)
class Cell:
    """Runs that differ by seed only: one row, or one entry of a row, in every table."""

    view: str
    base: str
    selector: str
    budget: str
    mixer: str
    initialisation: str
    recipe: str
    teacher: str
    label: str | None
    runs: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def fixed(self) -> tuple[str, ...]:
        """Values of `FIXED`."""
        return tuple(str(getattr(self, name)) for name in FIXED)


@dataclass(frozen=True)
class Block:
    """Cells that may be compared with each other: only selector and teacher differ."""

    base: str
    budget: str
    mixer: str
    initialisation: str
    recipe: str
    suffix: str  # tells this block's files from those of the study's other blocks, may be empty
    cells: tuple[Cell, ...]

    @property
    def selectors(self) -> list[str]:
        """Selectors in grid order."""
        return list(dict.fromkeys(cell.selector for cell in self.cells))

    @property
    def teachers(self) -> list[str]:
        """Teachers in grid order."""
        return list(dict.fromkeys(cell.teacher for cell in self.cells))

    def cell(self, selector: str, teacher: str) -> Cell | None:
        """The cell of a selector and a teacher, if the grid has it."""
        for cell in self.cells:
            if (cell.selector, cell.teacher) == (selector, teacher):
                return cell
        return None


def by_cell(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that differ by seed only, together; in the order of the first of them."""
    gathered: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        key = (run.base, run.selector, run.budget.slug, run.mixer, run.initialisation)
        gathered.setdefault((*key, run.recipe, run.teacher), []).append(run)
    return list(gathered.values())


def cells(study: Study, view: str) -> list[Cell]:
    """The view's runs with seeds gathered, in grid order."""
    return [
        Cell(
            view=view,
            base=runs[0].base,
            selector=runs[0].selector,
            budget=runs[0].budget.slug,
            mixer=runs[0].mixer,
            initialisation=runs[0].initialisation,
            recipe=runs[0].recipe,
            teacher=runs[0].teacher,
            label=runs[0].label,
            runs=tuple(run.id for run in runs),
            seeds=tuple(run.seed for run in runs),
        )
        for runs in by_cell(run for run in study.run_table.values() if view in run.views)
    ]


def blocks(study: Study, view: str = "controlled") -> list[Block]:
    """The view's cells, split so that inside a block only selector and teacher differ."""
    grouped: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells(study, view):
        grouped.setdefault(cell.fixed, []).append(cell)
    varying = [index for index in range(len(FIXED)) if len({fixed[index] for fixed in grouped}) > 1]
    return [
        Block(
            base=members[0].base,
            budget=members[0].budget,
            mixer=members[0].mixer,
            initialisation=members[0].initialisation,
            recipe=members[0].recipe,
            suffix="".join(f"-{fixed[index]}" for index in varying),
            cells=tuple(members),
        )
        for fixed, members in grouped.items()
    ]


def views(study: Study) -> list[str]:
    """Views that the study has runs in."""
    present = {view for run in study.run_table.values() for view in run.views}
    return [view for view in ("controlled", "faithful", "reference") if view in present]


def trained(study: Study, members: Iterable[Cell]) -> list[Cell]:
    """Cells whose recipe has stages, so that a curve exists."""
    return [cell for cell in members if study.recipes[cell.recipe].stages]


def reference_name(study: Study) -> str:
    """What differences are taken to: a selector, or a method, of the study; default `uniform`."""
    return study.report.reference


def reference_selectors(study: Study) -> list[str]:
    """Selectors that are the reference by name, then those that are by method."""
    wanted = reference_name(study)
    by_method = [
        name
        for name, settings in study.selector_settings.items()
        if getattr(settings, "method", None) == wanted and name != wanted
    ]
    return [name for name in study.selector_settings if name == wanted] + by_method


def baseline(study: Study, block: Block, teacher: str) -> Cell | None:
    """The block's reference cell with this teacher: what the others are compared to."""
    for name in reference_selectors(study):
        cell = block.cell(name, teacher)
        if cell is not None:
            return cell
    return None


@dataclass(frozen=True)
class Race:
    """Trained cells of a block and a teacher, `baseline` among them: who gets there with less."""

    block: Block
    teacher: str
    baseline: Cell
    cells: tuple[Cell, ...]


def races(study: Study) -> list[Race]:
    """Blocks and teachers with a trained reference and another trained selector."""
    found = []
    for block in blocks(study):
        for teacher in block.teachers:
            first = baseline(study, block, teacher)
            members = [cell for cell in trained(study, block.cells) if cell.teacher == teacher]
            if first in members and len(members) > 1:
                assert first is not None
                found.append(Race(block, teacher, first, tuple(members)))
    return found


@dataclass(frozen=True)
class LengthTask:
    """A RULER task of the study that was built at several lengths in tokens."""

    name: str
    lengths: tuple[int, ...]


def length_tasks(study: Study) -> list[LengthTask]:
    """RULER tasks with several lengths, so that there is a score per length to show."""
    found = []
    for name, task in study.evaluation.tasks.items():
        lengths = tuple(sorted(set(getattr(task, "lengths", ()))))
        if task.kind.startswith("ruler") and len(lengths) > 1:
            found.append(LengthTask(name, lengths))
    return found


def model_based(study: Study) -> set[str]:
    """Selectors that run a model to choose; a method of the user's own counts as one."""
    return {
        name
        for name, settings in study.selector_settings.items()
        if "model" in NEEDS.get(str(getattr(settings, "method", name)), ("model",))
    }


@dataclass(frozen=True)
class CostGroup:
    """Cells of one teacher that differ by selector and budget: what choosing well may cost."""

    suffix: str  # as of `Block`, without the budget
    teacher: str
    cells: tuple[Cell, ...]

    @property
    def selectors(self) -> list[str]:
        """Selectors in grid order."""
        return list(dict.fromkeys(cell.selector for cell in self.cells))

    @property
    def budgets(self) -> list[str]:
        """Budgets in grid order."""
        return list(dict.fromkeys(cell.budget for cell in self.cells))


def cost_groups(study: Study) -> list[CostGroup]:
    """Controlled cells to hold against what their selection cost.

    Self-distilled where the grid has it, else of the first teacher. Groups in which fewer than two
    selectors run a model have nothing to compare, nor have those without curves and scores.
    """
    kept = [name for name in FIXED if name != "budget"]
    grouped: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells(study, "controlled"):
        grouped.setdefault(tuple(str(getattr(cell, name)) for name in kept), []).append(cell)
    varying = [index for index in range(len(kept)) if len({fixed[index] for fixed in grouped}) > 1]
    scored = any(task.kind != "perplexity" for task in study.evaluation.tasks.values())
    costly, groups = model_based(study), []
    for fixed, members in grouped.items():
        teachers = list(dict.fromkeys(cell.teacher for cell in members))
        teacher = "self" if "self" in teachers else teachers[0]
        chosen = tuple(cell for cell in members if cell.teacher == teacher)
        several = len({cell.selector for cell in chosen} & costly) > 1
        if several and (scored or trained(study, chosen)):
            suffix = "".join(f"-{fixed[index]}" for index in varying)
            groups.append(CostGroup(suffix, teacher, chosen))
    return groups


def shared_budgets(study: Study) -> dict[tuple[str, str], list[str]]:
    """(base, budget) -> the selectors used there in any view, where there are several.

    Empty when no budget has two selectors that run a model: uniform alone agrees with nobody.
    """
    gathered: dict[tuple[str, str], dict[str, None]] = {}
    for run in study.run_table.values():
        gathered.setdefault((run.base, run.budget.slug), {})[run.selector] = None
    costly = model_based(study)
    if not any(len(names.keys() & costly) > 1 for names in gathered.values()):
        return {}
    order = list(dict.fromkeys(run.selector for run in study.run_table.values()))
    return {
        key: sorted(names, key=order.index) for key, names in gathered.items() if len(names) > 1
    }


def row_titles(members: Iterable[Cell]) -> dict[Cell, str]:
    """A title per cell: its label, or what tells it apart when the label does not."""
    members = list(members)
    titles = {cell: cell.label or f"{cell.selector}, teacher {cell.teacher}" for cell in members}
    for distinguishing in (("selector", "teacher"), FIXED):
        counts: dict[str, int] = {}
        for title in titles.values():
            counts[title] = counts.get(title, 0) + 1
        for cell, title in titles.items():
            if counts[title] > 1:
                extra = [str(getattr(cell, name)) for name in distinguishing]
                titles[cell] = f"{title} ({', '.join(extra)})"
    return titles


def table_names(study: Study) -> list[str]:
    """Tables that exist in three formats."""
    present = views(study)
    names = []
    if "controlled" in present:
        names += ["controlled", "tasks", "teachers"]
        if races(study):
            names.append("convergence")
    if "faithful" in present:
        names.append("faithful")
    if "reference" in present or study.references:
        names.append("references")
    if present or study.references:
        names.append("controls")
        if length_tasks(study):
            names.append("ruler")
    if study.run_table:
        names.append("selection")
        if cost_groups(study):
            names.append("selection_cost")
        if shared_budgets(study):
            names.append("agreement")
        names.append("heldout")
    return [*names, "efficiency", "speed"]


def figure_names(study: Study) -> list[str]:
    """Figures, without extension; one per block where blocks cannot share axes."""
    names = []
    for block in blocks(study):
        if trained(study, block.cells):
            names.append(f"convergence_kl{block.suffix}")
            if study.evaluation.probe_samples:
                names.append(f"convergence_probe{block.suffix}")
        names.append(f"scores{block.suffix}")
        if length_tasks(study):
            names.append(f"ruler{block.suffix}")
    present = views(study)
    if "controlled" in present:
        names.append("placements")
        names += [f"selection_cost{group.suffix}" for group in cost_groups(study)]
    if shared_budgets(study):
        names.append("agreement")
    if "controlled" in present:
        names.append("score_vs_kv")
    if "faithful" in present:
        if trained(study, cells(study, "faithful")):
            names.append("convergence_faithful")
        names.append("placements_faithful")
    names.append("speed")
    if len(set(study.evaluation.efficiency.batch_sizes)) > 1:
        names.append("speed_batches")
    return names


def outputs(study: Study) -> dict[str, list[str]]:
    """Files of a report by kind, relative to `results/<study>/`, in the order of the report."""
    tables = ["tables/scores.csv", "tables/families.csv"]
    tables += [f"tables/{name}.{form}" for name in table_names(study) for form in TABLE_FORMATS]
    figures = [f"figures/{name}.{form}" for name in figure_names(study) for form in FIGURE_FORMATS]
    return {"tables": tables, "figures": figures, "report": ["report.html"]}
