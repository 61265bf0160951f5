"""The verb that measures speed and memory of a model outside a study.

Nothing heavy is imported before the verb runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from rad.commands.options import DEVICE, DTYPE, OPTIONAL, Verb
from rad.devices import chosen
from rad.files import write_json

PAPERS = ("retrieval_aware",)
FIRST_CONTEXT = 512


def default_contexts(longest: int) -> list[int]:
    """Doublings from 512 up to the model's range; the range itself where that is shorter."""
    found = [min(FIRST_CONTEXT, longest)]
    while 2 * found[-1] <= longest:
        found.append(2 * found[-1])
    return found


def efficiency(args: argparse.Namespace) -> None:
    """Measure speed, memory and cache of a model against context and batch size."""
    if (args.model is None) == (args.paper is None):
        raise ValueError("name a model to measure, or a paper's accounting with --paper")
    if args.paper is not None:
        _paper(args.output)
        return
    from pydantic import ValidationError

    from rad.distillation import parallel
    from rad.efficiency_settings import EfficiencySettings
    from rad.evaluation.efficiency import measure
    from rad.models import sources
    from rad.placement import first_error
    from rad.reporting.efficiency_tables import probe_table
    from rad.reporting.writers import markdown_text

    parallel.alone("efficiency")
    device = chosen(args.device)
    model = sources.load(args.model, revision=args.revision, dtype=args.dtype).to(device)
    asked: dict[str, Any] = {
        "contexts": args.contexts or default_contexts(model.config.max_position_embeddings),
        "batch_sizes": args.batch_sizes,
        "decode_tokens": args.decode_tokens,
        "memory_limit": args.memory_limit,
        "peak_memory": not args.no_peak_memory,
        "compare_base": not args.no_base,
    }
    try:
        settings = EfficiencySettings.model_validate(asked)
    except ValidationError as error:
        raise ValueError(f"efficiency: {first_error(error)}") from error
    base = None
    if args.base is not None:
        base = sources.load(args.base, dtype=args.dtype).to(device)
    record = measure(
        model,
        run=args.model,
        base=base,
        progress=lambda text: print(text, file=sys.stderr, flush=True),
        **settings.model_dump(),
    )
    if args.output is not None:
        write_json(args.output, record)
    folder = Path(args.model)
    name = folder.parent.name if folder.name == "model" else folder.name
    print(markdown_text(probe_table(record, name)))


def _paper(output: Path | None) -> None:
    """Print the accounting of retrieval-aware distillation; write it into a folder if named."""
    from rad.evaluation.memory_accounting import measured_points
    from rad.reporting import memory_tables
    from rad.reporting.writers import markdown_text, write_table

    tables = [
        memory_tables.published(),
        memory_tables.points(),
        memory_tables.measurements(measured_points()),
    ]
    for table in tables:
        print(markdown_text(table))
        if output is not None:
            write_table(table, output)
    if output is not None:
        from rad.reporting.efficiency_figures import memory_accounting
        from rad.reporting.style import save, styled

        with styled():
            save(memory_accounting(), output, "memory_accounting")


VERBS: dict[str, Verb] = {
    "efficiency": (
        efficiency,
        [
            ("model", {"nargs": "?", "help": "checkpoint folder, hub id or nano:NAME"}),
            (
                "--contexts",
                {
                    **{"type": int, "nargs": "+", "default": None},
                    "help": "prompt lengths; default: 512 doubled up to the model's range",
                },
            ),
            ("--batch-sizes", {"type": int, "nargs": "+", "default": [1]}),
            ("--decode-tokens", {"type": int, "default": 16, "help": "steps per speed"}),
            (
                "--memory-limit",
                {"type": float, "default": None, "help": "GiB; points that need more are skipped"},
            ),
            ("--no-peak-memory", {"action": "store_true", "help": "leave the memory meter out"}),
            (
                "--base",
                {"default": None, "help": "the unconverted base; default: its shape alone"},
            ),
            (
                "--no-base",
                {"action": "store_true", "help": "measure the hybrid alone"},
            ),
            ("--revision", {"default": None, "help": "hub revision of the model"}),
            DTYPE,
            DEVICE,
            ("--paper", {"choices": PAPERS, "default": None, "help": "its memory accounting"}),
            ("--output", {**OPTIONAL, "help": "JSON file; with --paper a folder"}),
        ],
    ),
}
