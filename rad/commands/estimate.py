"""The verb that says what a study will cost before it is run. Imports no torch."""

from __future__ import annotations

import argparse
import sys

from rad.commands.options import CONFIG, OPTIONAL, Verb, load_study
from rad.files import write_json


class DoesNotFit(ValueError):
    """Some jobs of the study need more memory than the GPU has; the message says how many."""


def estimate(args: argparse.Namespace) -> None:
    """Tokens, FLOPs, memory, disk, GPU-hours and cost of a study, and what would not fit."""
    from rad.estimate import table
    from rad.estimate.jobs import Hardware
    from rad.estimate.study import Estimate

    hardware = Hardware.named(args.gpu, args.count, args.mfu, args.price)
    found = Estimate(load_study(args.config), hardware, args.configs)
    print(table.text(found))
    if args.json is not None:
        write_json(args.json, table.as_dict(found))
    if found.refused:
        sys.stdout.flush()
        raise DoesNotFit(
            f"{len(found.refused)} of {len(found.jobs)} jobs do not fit on {hardware.count} x "
            f"{hardware.gpu.title}; each is named above with the setting that would help"
        )


VERBS: dict[str, Verb] = {
    "estimate": (
        estimate,
        [
            CONFIG,
            ("--gpu", {"default": "h100", "help": "h100, h200 or a100"}),
            ("--count", {"type": int, "default": 1, "help": "GPUs that a distillation may have"}),
            ("--mfu", {"type": float, "default": 0.4, "help": "share of the peak rate reached"}),
            ("--price", {"type": float, "default": None, "help": "USD per GPU-hour"}),
            ("--configs", {**OPTIONAL, "help": "folder with config.json files of hub models"}),
            ("--json", {**OPTIONAL, "help": "write the estimate as JSON too"}),
        ],
    ),
}
