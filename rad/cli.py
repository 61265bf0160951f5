"""The command line: one thin verb per rule of the workflow.

Nothing heavy is imported before its verb runs, so `rad --help` and `rad plan` need no torch.
Exit codes: 0 done, 1 a bug (with a traceback), 2 bad input (one line), 75 stopped by a signal with
the state saved.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rad.commands import bench, efficiency, estimate, gpu, papers, ruler, scoring, stages, tools
from rad.commands.options import Verb
from rad.devices import VARIABLE
from rad.gpu import launch, launched

STOPPED = 75

VERBS: dict[str, Verb] = {
    **stages.VERBS,
    **tools.VERBS,
    **bench.VERBS,
    **scoring.VERBS,
    **ruler.VERBS,
    **efficiency.VERBS,
    **gpu.VERBS,
    **estimate.VERBS,
    **papers.VERBS,
}


def parser() -> argparse.ArgumentParser:
    """The argument parser, with one sub-parser per verb."""
    root = argparse.ArgumentParser(
        prog="rad", description="Turn a pretrained Transformer into a Transformer-SSM hybrid."
    )
    root.add_argument("--threads", type=int, default=None, help="CPU threads (default: all)")
    root.add_argument("--gpus", type=int, default=None, help="GPUs of its own; 0: the CPU")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="verb")
    for name, (function, arguments) in VERBS.items():
        verb = verbs.add_parser(name, help=(function.__doc__ or "").rstrip("."))
        for flag, options in arguments:
            verb.add_argument(flag, **options)
        verb.set_defaults(function=function)
    return root


def _ours(error: BaseException) -> bool:
    """Whether the error was raised by this package's own checks, not by a library under it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(Path(__file__).parent)


def _limit_threads(threads: int | None) -> None:
    # must happen before torch starts its thread pool; two pools on two cores are 14 times slower
    if threads:
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            os.environ[name] = str(threads)


def _to_gpus(args: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Start again on as many GPUs of its own as `--gpus` says, unless already there."""
    if args.gpus is None:
        return
    one_process = hasattr(args, "device_map")
    if args.gpus and not one_process and not hasattr(args, "device"):
        raise ValueError("this verb computes on the CPU: call it without --gpus")
    # no GPU that was not asked for, and no CPU while a GPU waits
    os.environ.setdefault(VARIABLE, "cuda" if args.gpus else "cpu")
    if not args.gpus and one_process:  # a model laid over devices asks for none by name
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if args.gpus and not launched():
        launch(arguments, args.gpus, one_process)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    _limit_threads(args.threads)
    try:
        _to_gpus(args, arguments)
        args.function(args)
    except (ValueError, FloatingPointError) as error:
        if not _ours(error) or os.environ.get("RAD_TRACEBACK"):
            traceback.print_exc()
            return 1
        print(f"rad {args.verb}: error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        if type(error).__name__ == "Interrupted":
            print(f"rad {args.verb}: {error}", file=sys.stderr)
            return STOPPED
        raise
    return 0
