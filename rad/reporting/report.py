"""Build a study's report: tables, figures, and one `report.html` that needs nothing else.

Try it: `rad report config/nano.yaml`, then open `results/nano/report.html`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from rad.files import write_text
from rad.reporting import (
    convergence_figures,
    efficiency_figures,
    figures,
    placement_map,
    ruler_figures,
    selection_figures,
)
from rad.reporting.collect import Results, collect
from rad.reporting.describe import block_title, missing_note, seeds_note
from rad.reporting.facts import facts
from rad.reporting.plan import (
    Block,
    blocks,
    cells,
    cost_groups,
    figure_names,
    reference_name,
    views,
)
from rad.reporting.scores import documents_of, families
from rad.reporting.style import marks, save, styled
from rad.reporting.tables import write_tables
from rad.reporting.writers import Table, count, duration
from rad.study import Study

_ALT = {
    "speed": "Prefill and decoding speed, time to first token, peak memory and cache "
    "against context length",
    "speed_batches": "Prefill and decoding speed, time to first token, peak memory and cache "
    "against batch size",
    "convergence_kl": "Held-out KL and agreement against distillation tokens, per teacher",
    "convergence_probe": "Probe score against distillation tokens, per task and teacher",
    "convergence_faithful": "Held-out KL of the faithful runs against distillation tokens",
    "scores": "Scores with 95 % intervals per family, teacher and selector",
    "ruler": "RULER score against context length with 95 % intervals, per teacher and selector",
    "score_vs_kv": "Score against KV cache bytes per token, per family and teacher",
    "selection_cost": "Held-out KL and mean score against what the selection cost",
    "agreement": "Overlap of kept heads and rank correlation of scores, selector by selector",
    "placements": "Which layers and heads each selector kept",
    "placements_faithful": "Which layers and heads the faithful runs kept",
}

BLOCK_FIGURES: dict[str, Callable[[Results, Block], Figure]] = {
    "convergence_kl": convergence_figures.convergence_kl,
    "convergence_probe": convergence_figures.convergence_probe,
    "scores": figures.scores,
    "ruler": ruler_figures.ruler,
}


def figure_makers(results: Results) -> dict[str, Callable[[], Figure]]:
    """Figure name -> how to draw it, in the order of `figure_names`."""
    makers: dict[str, Callable[[], Figure]] = {
        "placements": partial(placement_map.placement_map, results, "controlled"),
        "placements_faithful": partial(placement_map.placement_map, results, "faithful"),
        "score_vs_kv": partial(figures.score_vs_kv, results),
        "agreement": partial(selection_figures.agreement, results),
        "convergence_faithful": partial(convergence_figures.convergence_faithful, results),
        "speed": partial(efficiency_figures.speed, results),
        "speed_batches": partial(efficiency_figures.speed_batches, results),
    }
    for block in blocks(results.study):
        for name, maker in BLOCK_FIGURES.items():
            makers[f"{name}{block.suffix}"] = partial(maker, results, block)
    for group in cost_groups(results.study):
        makers[f"selection_cost{group.suffix}"] = partial(
            selection_figures.selection_cost, results, group
        )
    return {name: makers[name] for name in figure_names(results.study)}


def inline_svg(text: str, name: str) -> Markup:
    """An SVG file as an element of a page: no prolog, no metadata, ids of its own.

    Ids are prefixed with `name`, because two figures of one page may use the same.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:)?href="#', f'href="#{name}-', text)
    text = text.replace("url(#", f"url(#{name}-")
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text)
    label = next((alt for stem, alt in _alternatives() if name.startswith(stem)), name)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip())


def _alternatives() -> list[tuple[str, str]]:
    """Alternative texts, longest stem first so that the most specific one is found."""
    return sorted(_ALT.items(), key=lambda item: -len(item[0]))


def svg_width(text: str) -> int:
    """Natural width of an SVG in CSS pixels (4/3 of its points)."""
    match = re.search(r'<svg[^>]*\bwidth="([\d.]+)pt"', text)
    return round(float(match.group(1)) * 4 / 3) if match else 900


def _pictures(names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    pictures = {}
    for name in names:
        text = (folder / f"{name}.svg").read_text(encoding="utf-8")
        pictures[name] = {"svg": inline_svg(text, name), "width": svg_width(text)}
    return pictures


def _run_list(results: Results) -> list[dict[str, str]]:
    rows = []
    for result in results.runs.values():
        assert result.run is not None
        training = result.training
        seconds = training.get("seconds", training.get("wall_seconds"))
        rows.append(
            {
                "id": result.id,
                "views": ", ".join(result.run.views),
                "tokens": count(training.get("tokens")),
                "time": duration(seconds),
                "resumed": str(training.get("resumed", training.get("resumed_count", "–"))),
                "digest": results.study.spec_digest(result.id)[:12],
            }
        )
    return rows


def _tiles(results: Results) -> list[tuple[str, str]]:
    """The study in a few numbers: value and what it counts."""
    study = results.study
    documents = sum(documents_of(results, family) for family in families(results))
    teachers = {run.teacher for run in study.run_table.values()}
    tokens = sum(
        sum(stage.tokens for stage in study.recipes[run.recipe].stages)
        for run in study.run_table.values()
    )
    tiles = [
        (str(len(study.run_table)), "distilled students"),
        (str(len({run.selector for run in study.run_table.values()})), "selectors"),
        (str(len(teachers)), "teachers"),
        (count(tokens), "distillation tokens in all"),
        (f"{documents:,}", "documents scored per model"),
    ]
    if results.stages:
        work = sum(stage.seconds for stage in results.stages)
        tiles.append((duration(work), "job time in all stages"))
    return tiles


def render(results: Results, tables: dict[str, Table], folder: Path) -> str:
    """The page; `folder` holds the figures' SVG files."""
    template = resources.files("rad.reporting").joinpath("template.html.j2")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["duration"] = duration
    study = results.study
    names = figure_names(study)
    longest = max((stage.seconds for stage in results.stages), default=1.0)
    return environment.from_string(template.read_text(encoding="utf-8")).render(
        title=study.title or study.folder,
        study=study,
        blocks=[(block.suffix, block_title(block)) for block in blocks(study)],
        costs=[group.suffix for group in cost_groups(study)],
        views=views(study),
        # with one teacher this section would repeat the controlled table
        several_teachers=any(len(block.teachers) > 1 for block in blocks(study)),
        tiles=_tiles(results),
        facts=facts(results),
        stages=results.stages,
        longest=longest or 1.0,
        reference=reference_name(study),
        seeds_note=seeds_note(
            len(cell.seeds) for view in views(study) for cell in cells(study, view)
        ),
        missing=missing_note(results).strip(),
        tables=tables,
        pictures=_pictures(names, folder),
        marks=marks(study),
        runs=_run_list(results),
    )


def build(study: Study, root: Path, output: Path) -> None:
    """Read the results under `root`; write tables, figures and the page under `output`."""
    results = collect(study, root)
    tables = write_tables(results, output / "tables")
    with styled():
        for name, maker in figure_makers(results).items():
            save(maker(), output / "figures", name)
    write_text(output / "report.html", render(results, tables, output / "figures"))
