"""The command line: one thin verb per rule of the workflow.

Nothing heavy is imported before its verb runs, so `rad --help` and `rad plan` need no torch.
Exit codes: 0 done, 1 a bug (with a traceback), 2 bad input (one line), 75 stopped by a signal with
the state saved.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rad.files import read_json, write_json, write_text

STOPPED = 75


def _external_selectors() -> list[str]:
    from rad.settings import SELECTOR_SETTINGS

    rules = Path("workflow/rules/selection").glob("*.smk")
    return sorted({rule.stem for rule in rules} - set(SELECTOR_SETTINGS))


def _study(files: Sequence[Path]) -> Any:
    from rad.study import load

    return load(files, _external_selectors())


def plan(args: argparse.Namespace) -> None:
    """List the runs of a study."""
    study = _study(args.config)
    for run in study.run_table.values():
        print(f"{run.id}  [{', '.join(run.views)}]")


def check(args: argparse.Namespace) -> None:
    """Check a study before any work: names, budgets, models, files."""
    from rad.preflight import check as preflight

    study = _study(args.config)
    preflight(study)
    print(f"{study.folder}: {len(study.run_table)} runs, no fault found")


def schema(args: argparse.Namespace) -> None:
    """Write the JSON schema and the key table of the configuration."""
    from rad.schema import json_schema, key_table

    write_text(args.schema, json.dumps(json_schema(), indent=2, sort_keys=True) + "\n")
    write_text(args.table, key_table())


def model(args: argparse.Namespace) -> None:
    """Describe a model of the study."""
    from rad.models.sources import describe

    write_json(args.output, describe(args.name, args.settings))


def pretrain(args: argparse.Namespace) -> None:
    """Train a nano model from nothing, score it and write its card."""
    from rad.pretraining.card import describe
    from rad.pretraining.loop import pretrain as run

    run(args.size, args.output, seed=args.seed, threads=args.threads or 1)
    describe(args.output, args.size)


def corpus(args: argparse.Namespace) -> None:
    """Tokenise and pack a corpus."""
    from rad.data.corpus import build
    from rad.models.sources import load_tokenizer
    from rad.settings import CorpusSettings

    record = read_json(args.model)
    build(
        args.name,
        CorpusSettings.model_validate(args.settings),
        load_tokenizer(record["source"], revision=record["revision"]),
        args.output,
        tokenizer_sha256=record["tokenizer_sha256"],
    )


def tasks(args: argparse.Namespace) -> None:
    """Build the evaluation documents of a suite."""
    from rad.evaluation.build import build_tasks
    from rad.settings import EvaluationSettings

    record = read_json(args.model)
    build_tasks(EvaluationSettings.model_validate(args.settings), record["path"], args.output)


def align(args: argparse.Namespace) -> None:
    """Stage-1 alignment of all layers' mixers."""
    from rad.distillation.align import align as run
    from rad.settings import AlignmentSettings

    run(
        read_json(args.model),
        args.mixer,
        AlignmentSettings.model_validate(args.settings),
        corpus=args.corpus,
        state=args.state,
        output=args.output,
    )


def select(args: argparse.Namespace) -> None:
    """Choose which attention of a base stays, by any selection method, under a budget."""
    from rad.models.store import mixer_settings
    from rad.placement import Budget
    from rad.selection import standalone

    if (args.base is None) == (args.model is None):
        raise ValueError("name the base with --base (folder, hub id, nano:NAME) or --model FILE")
    values = {**(args.settings or {}), **standalone.assignments(args.set)}
    settings = standalone.settings_of(args.name, values)
    mixer = args.mixer
    if mixer is None:
        mixer = mixer_settings(str(getattr(settings, "mixer", None) or "mamba2"))
    corpus, aligned, state = args.corpus, args.aligned, args.state
    if args.model is not None:
        record = read_json(args.model)
    else:
        record, corpus, found = standalone.prepare(
            args.name,
            settings,
            args.base,
            revision=args.revision,
            dtype=args.dtype,
            corpus=corpus,
            texts=args.text,
            mixer=mixer,
            work=args.work,
        )
        aligned, state = aligned or found, state or args.work / "state"
    placement = standalone.run(
        args.name,
        settings,
        record,
        Budget.parse(args.budget),
        corpus=corpus,
        aligned=aligned,
        mixer=mixer,
        state=state,
    )
    placement.save(args.out)
    if args.model is None:
        print(placement.describe())


def placement(args: argparse.Namespace) -> None:
    """Check a placement, against a base and a budget if named, and show what it keeps."""
    from rad.placement import Budget, Placement

    found = Placement.load(args.placement)
    try:
        if args.model is not None:
            record = read_json(args.model)
            found.check_base(record["name"], *(record[key] for key in Placement.SHAPE))
        if args.budget is not None:
            found.check_budget(Budget.parse(args.budget))
    except ValueError as error:
        raise ValueError(f"{args.placement}: {error}") from error
    print(found.describe())


def convert(args: argparse.Namespace) -> None:
    """Convert a base under a placement, without training."""
    from rad.models.store import convert_to_folder

    print(
        convert_to_folder(
            args.base,
            args.placement,
            args.out,
            mixer=args.mixer,
            initialisation=args.initialisation,
            settings=args.mixer_settings,
            seed=args.seed,
            aligned=args.aligned,
            revision=args.revision,
            dtype=args.dtype,
        )
    )


def inspect(args: argparse.Namespace) -> None:
    """Show what every layer of a checkpoint is, and check its tensors."""
    from rad.models.store import inspect as look

    print(look(args.folder))


def export(args: argparse.Namespace) -> None:
    """Write a layer-wise mamba2 hybrid as GraniteMoeHybrid, for other engines."""
    from rad.models import sources
    from rad.models.export import export as run

    hybrid = sources.load(str(args.folder), dtype=args.dtype)
    tokenizer = sources.load_tokenizer(str(args.folder))
    print(json.dumps(run(hybrid, args.out, tokenizer), indent=2))


def kernels(args: argparse.Namespace) -> None:
    """Compare the kernels that a checkpoint would use here with the plain recurrence."""
    from rad.kernels.selftest import require
    from rad.models import sources
    from rad.models.kernel_check import kernel_records

    model = sources.load(str(args.folder), dtype=args.dtype).to(args.device)
    records = kernel_records(model)
    print(json.dumps(records, indent=2))
    require(records)


def distil(args: argparse.Namespace) -> None:
    """Convert the base under a placement and distil it."""
    from rad.distillation.run import distil as run
    from rad.placement import Placement

    placement = Placement.load(args.placement)
    probe = None
    if args.tasks is not None:
        from rad.evaluation.probe import probe_of

        probe = probe_of(args.tasks, args.probe_samples)
    run(
        read_json(args.spec),
        placement,
        corpus=args.corpus,
        state=args.state,
        output=args.output,
        aligned=args.aligned,
        probe=probe,
    )


def evaluate(args: argparse.Namespace) -> None:
    """Score a model on every task of the suite and measure its cache and decode speed."""
    from rad.evaluation.efficiency import measure
    from rad.evaluation.harness import evaluate as run
    from rad.models import sources
    from rad.settings import EvaluationSettings

    spec = read_json(args.spec)
    settings = EvaluationSettings.model_validate(args.settings)
    where = spec["model"] if "reference" in spec else {"source": str(args.output / "model")}
    loaded = sources.load(
        where["source"], revision=where.get("revision"), dtype=where.get("dtype", "float32")
    )
    tokenizer = sources.load_tokenizer(where["source"], revision=where.get("revision"))
    run(
        loaded,
        tokenizer,
        args.tasks,
        run=spec["run"],
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        output=args.output,
    )
    efficiency = settings.efficiency
    write_json(
        args.output / "efficiency.json",
        measure(
            loaded,
            run=spec["run"],
            contexts=efficiency.contexts,
            decode_tokens=efficiency.decode_tokens,
            batch_size=efficiency.batch_size,
        ),
    )


def report(args: argparse.Namespace) -> None:
    """Build tables, figures and report.html from the results of a study."""
    from rad.reporting import build_report
    from rad.study import Study

    raw = read_json(args.study)
    build_report(Study.from_config(raw, raw.pop("external_selectors", ())), args.root)


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from error


Argument = tuple[str, dict[str, Any]]
_PATH: dict[str, Any] = {"type": Path, "required": True}
_OPTIONAL: dict[str, Any] = {"type": Path, "default": None}
_JSON: dict[str, Any] = {"type": _json, "required": True}
_CONFIG: Argument = ("config", {"type": Path, "nargs": "+", "help": "YAML files, merged in order"})

_FOLDER: Argument = ("folder", {"type": Path, "help": "checkpoint folder"})
_DTYPE: Argument = (
    "--dtype",
    {"choices": ["float32", "bfloat16"], "default": "float32", "help": "of the weights"},
)

VERBS: dict[str, tuple[Callable[[argparse.Namespace], None], list[Argument]]] = {
    "plan": (plan, [_CONFIG]),
    "check": (check, [_CONFIG]),
    "schema": (schema, [("--schema", _PATH), ("--table", _PATH)]),
    "model": (model, [("--name", {"required": True}), ("--settings", _JSON), ("--output", _PATH)]),
    "pretrain": (
        pretrain,
        [
            ("--size", {"required": True}),
            ("--output", _PATH),
            ("--seed", {"type": int, "default": 0}),
        ],
    ),
    "corpus": (
        corpus,
        [
            ("--name", {"required": True}),
            ("--settings", _JSON),
            ("--model", _PATH),
            ("--output", _PATH),
        ],
    ),
    "tasks": (tasks, [("--settings", _JSON), ("--model", _PATH), ("--output", _PATH)]),
    "align": (
        align,
        [
            ("--model", _PATH),
            ("--mixer", _JSON),
            ("--settings", _JSON),
            ("--corpus", _PATH),
            ("--state", _PATH),
            ("--output", _PATH),
        ],
    ),
    "select": (
        select,
        [
            ("name", {"help": "method, or a Python file with select(context)"}),
            ("--base", {"default": None, "help": "folder, hub id or nano:base|medium|large"}),
            ("--model", {**_OPTIONAL, "help": "instead of --base: its description (source.json)"}),
            ("--budget", {"required": True, "help": "layers:2, heads:8, fraction:0.25, ..."}),
            ("--out", {**_PATH, "help": "placement.json to write"}),
            ("--set", {"action": "append", "default": [], "help": "key=value of the method"}),
            ("--settings", {"type": _json, "default": None, "help": "the same, as JSON"}),
            ("--text", {"type": Path, "nargs": "+", "default": [], "help": "calibration text"}),
            ("--corpus", {**_OPTIONAL, "help": "calibration corpus, prepared by `rad corpus`"}),
            ("--aligned", {**_OPTIONAL, "help": "stage-1 alignment, prepared by `rad align`"}),
            ("--mixer", {"type": _json, "default": None, "help": "mixer of students, as JSON"}),
            ("--revision", {"default": None, "help": "hub revision of the base"}),
            _DTYPE,
            ("--state", {**_OPTIONAL, "help": "folder for what a long selection can resume"}),
            ("--work", {"type": Path, "default": Path("state/select"), "help": "made inputs"}),
        ],
    ),
    "placement": (
        placement,
        [
            ("placement", {"type": Path, "help": "placement.json"}),
            ("--model", {**_OPTIONAL, "help": "description of the base (source.json)"}),
            ("--budget", {"default": None, "help": "layers:2, heads:8, fraction:0.25, ..."}),
        ],
    ),
    "convert": (
        convert,
        [
            ("--base", {"required": True, "help": "folder, hub id or nano:base|medium|large"}),
            ("--placement", _PATH),
            ("--mixer", {"default": "mamba2", "help": "its name"}),
            ("--mixer-settings", {"type": _json, "default": None, "help": "its settings, as JSON"}),
            ("--initialisation", {"default": "qkvo", "help": "how the mixers start"}),
            ("--aligned", {**_OPTIONAL, "help": "folder of a stage-1 alignment"}),
            ("--seed", {"type": int, "default": 0}),
            ("--revision", {"default": None, "help": "hub revision of the base"}),
            _DTYPE,
            ("--out", {**_PATH, "help": "checkpoint folder to write; must not hold anything"}),
        ],
    ),
    "inspect": (inspect, [_FOLDER]),
    "export": (export, [_FOLDER, _DTYPE, ("--out", _PATH)]),
    "kernels": (kernels, [_FOLDER, _DTYPE, ("--device", {"default": "cpu"})]),
    "distil": (
        distil,
        [
            ("--spec", _PATH),
            ("--placement", _PATH),
            ("--corpus", _PATH),
            ("--tasks", _OPTIONAL),
            ("--probe-samples", {"type": int, "default": 0}),
            ("--aligned", _OPTIONAL),
            ("--state", _PATH),
            ("--output", _PATH),
        ],
    ),
    "evaluate": (
        evaluate,
        [("--spec", _PATH), ("--tasks", _PATH), ("--settings", _JSON), ("--output", _PATH)],
    ),
    "report": (report, [("--study", _PATH), ("--root", _PATH)]),
}


def parser() -> argparse.ArgumentParser:
    """The argument parser, with one sub-parser per verb."""
    root = argparse.ArgumentParser(
        prog="rad", description="Turn a pretrained Transformer into a Transformer-SSM hybrid."
    )
    root.add_argument("--threads", type=int, default=None, help="CPU threads (default: all)")
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    args = parser().parse_args(arguments)
    _limit_threads(args.threads)
    try:
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
