"""Tables of what students take: memory and speed, distillation. One view per panel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rad.reporting.collect import Results, RunResult
from rad.reporting.describe import CELL_FIELDS, budget_text, cell_record
from rad.reporting.plan import Cell, cells, row_titles, views
from rad.reporting.scores import final_kls, members, training_number, training_speed
from rad.reporting.writers import (
    Column,
    Entry,
    Panel,
    Table,
    count,
    duration,
    plain,
    significant,
    size,
)


def efficiency(results: Results) -> Table:
    """Memory and speed; students of one placement share a row, whatever their teacher."""
    study = results.study
    titles = ("KV bytes/token", "state bytes", "cache at longest context")
    columns = [
        *(Column(name, numeric=False) for name in ("model", "kept", "mixer")),
        *(Column(name) for name in ("attention heads", *titles)),
        *(Column(name) for name in ("decode tokens/s", "parameters", "runs")),
    ]
    panels, records = [], []

    def row(
        view: str, about: tuple[str, str, str], heads: str, group: Sequence[RunResult]
    ) -> tuple[Entry, ...]:
        points = [result.efficiency.points[-1] for result in group if result.efficiency.points]
        speeds = [point.decode_tokens_per_second for point in points]
        known = [speed for speed in speeds if speed is not None]
        sizes = group[0].efficiency
        speed = float(np.mean(known)) if known else None
        record = {
            "view": view,
            **dict(zip(("model", "budget", "mixer"), about, strict=True)),
            "attention_heads": heads,
            "kv_bytes_per_token": sizes.kv_bytes_per_token,
            "state_bytes": sizes.state_bytes,
            "context": points[0].context if points else None,
            "cache_bytes": points[0].cache_bytes if points else None,
            "decode_tokens_per_second": speed,
            "parameters": sizes.parameters,
            "flops_per_token": sizes.flops_per_token,
            "runs": len(group),
        }
        records.append(record)
        cache = f"{size(points[0].cache_bytes)} at {points[0].context:,}" if points else "–"
        texts = (
            *(about[0], budget_text(about[1]) if about[1] else "all", about[2] or "–", heads),
            *(size(sizes.kv_bytes_per_token), size(sizes.state_bytes), cache),
            *(significant(speed), count(sizes.parameters)),
            str(len(group)),
        )
        return tuple(map(Entry, texts))

    for view in views(study):
        shared: dict[tuple[str, ...], list[Cell]] = {}
        for cell in cells(study, view):
            shared.setdefault((cell.base, cell.selector, cell.budget, cell.mixer), []).append(cell)
        rows = []
        for alike in shared.values():
            group = [result for cell in alike for result in members(results, cell)]
            placement = group[0].placement
            assert placement is not None
            heads = f"{len(placement.softmax)} of {placement.layers * placement.heads}"
            # a reference is known by its label; elsewhere the selector is what is compared
            title = row_titles(alike)[alike[0]] if view == "reference" else alike[0].selector
            about = (title, alike[0].budget, alike[0].mixer)
            rows.append(row(view, about, heads, group))
        panels.append(Panel(f"{view} view", tuple(columns), tuple(rows)))
    if results.references:
        rows = [
            row("reference", (name, "", ""), "all", [result])
            for name, result in results.references.items()
        ]
        panels.append(Panel("models as they are", tuple(columns), tuple(rows)))
    return Table(
        "efficiency",
        "Efficiency",
        "Cache of one sequence, measured; decode speed at the longest context, mean over runs.",
        tuple(panels),
        (
            *("view", "model", "budget", "mixer", "attention_heads", "kv_bytes_per_token"),
            *("state_bytes", "context", "cache_bytes", "decode_tokens_per_second"),
            *("parameters", "flops_per_token", "runs"),
        ),
        records,
    )


def heldout(results: Results) -> Table:
    """Where distillation ended, and how fast it went."""
    names = ("selector", "kept", "mixer", "recipe", "teacher")
    columns = [Column(name, numeric=False) for name in names]
    numbers = ("held-out KL, nats/token", "tokens", "tokens/s", "time", "peak memory", "seeds")
    columns += [Column(name) for name in numbers]
    panels, records = [], []
    for view in views(results.study):
        everything = cells(results.study, view)
        finals = {cell: final_kls(members(results, cell)) for cell in everything}
        rows = []
        for cell in everything:
            group = members(results, cell)
            last = finals[cell]
            mean = float(np.mean(last)) if last else None
            sd = float(np.std(last, ddof=1)) if len(last) > 1 else None
            record = {
                **cell_record(cell),
                **{"seeds": len(cell.seeds), "held_out_kl": mean, "held_out_kl_sd": sd},
                "tokens": training_number(group, "tokens"),
                # of whole runs: a curve's own are of the interval before each point
                "tokens_per_second": training_speed(group),
                "seconds": training_number(group, "seconds", "wall_seconds"),
                "peak_memory_mib": training_number(group, "peak_memory_mib"),
            }
            records.append(record)
            memory = record["peak_memory_mib"]
            about = (cell.selector, budget_text(cell.budget), cell.mixer, cell.recipe, cell.teacher)
            rows.append(
                (
                    *map(Entry, about),
                    Entry(plain(mean, 4), spread="" if sd is None else f"sd {plain(sd, 4)}"),
                    *(Entry(count(record["tokens"])), Entry(count(record["tokens_per_second"]))),
                    Entry(duration(record["seconds"])),
                    *(Entry(size(memory and memory * 2**20)), Entry(str(len(cell.seeds)))),
                )
            )
        panels.append(Panel(f"{view} view", tuple(columns), tuple(rows)))
    held_out = results.study.corpora[results.study.corpus].held_out_tokens
    return Table(
        "heldout",
        "Distillation",
        f"Forward KL from the base on the held-out slice ({count(held_out)} tokens) at the end of "
        "the run, whatever the teacher; mean over seeds, and their standard deviation (sd).",
        tuple(panels),
        (
            *("view", *CELL_FIELDS, "seeds", "held_out_kl", "held_out_kl_sd", "tokens"),
            *("tokens_per_second", "seconds", "peak_memory_mib"),
        ),
        records,
    )
