"""The verb that gives any command devices of its own."""

from __future__ import annotations

import argparse

from rad.commands.options import OPTIONAL, Verb


def gpu_run(args: argparse.Namespace) -> None:
    """Run a command on GPUs that no other job of this node uses."""
    from rad import gpu

    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise ValueError("name the command: rad gpu-run --gpus 1 -- COMMAND ...")
    gpu.become(command, args.count, args.locks)


VERBS: dict[str, Verb] = {
    "gpu-run": (
        gpu_run,
        [
            # `args.gpus` is the option of `rad` itself, for its own verbs
            ("--gpus", {"dest": "count", "type": int, "required": True, "help": "0: just run it"}),
            ("--locks", {**OPTIONAL, "help": "folder of the lock files"}),
            ("command", {"nargs": argparse.REMAINDER, "help": "what to run, after --"}),
        ],
    ),
}
