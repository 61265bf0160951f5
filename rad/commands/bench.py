"""Verbs that score any checkpoint without a study: `suites` and `bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rad.commands.options import DEVICE, DTYPE, OPTIONAL, Argument, Verb, as_json
from rad.files import read_json, write_json


def suites(args: argparse.Namespace) -> None:
    """List the shipped suites, their tasks and where their data come from."""
    from rad.evaluation.data import DATASETS, NEEDS, standard_file
    from rad.evaluation.kinds import KINDS
    from rad.task_settings import suite, suite_names

    for name in suite_names():
        print(name)
        for task, options in suite(name).items():
            kind = options["kind"]
            places = []
            for dataset in NEEDS.get(kind, ()):
                place = DATASETS[dataset]
                found = standard_file(dataset, Path("."), args.data)
                hub = f"hub {place.hub}" if place.hub else "no hub"
                places.append(f"{found or f'{args.data / place.file} (missing; {hub})'}")
            source = "; ".join(places) or "made here"
            print(f"  {task:22} {KINDS[kind].metrics[0]:14} {source}")


def _settings(args: argparse.Namespace) -> Any:
    from pydantic import ValidationError

    from rad.placement import first_error
    from rad.settings import EvaluationSettings

    values = {
        "suites": args.suite,
        "tasks": args.tasks or {},
        "data": str(args.data),
        "offline": args.offline,
        "samples": args.samples,
        "batch_size": args.batch_size,
        "batch_tokens": args.batch_tokens,
        "max_length": args.max_length,
        "chat_template": str(args.chat_template) if args.chat_template else None,
        "probe_samples": 0,
    }
    try:
        return EvaluationSettings.model_validate(values)
    except ValidationError as error:
        raise ValueError(first_error(error)) from error


def _built(args: argparse.Namespace, settings: Any) -> dict[str, Any]:
    """The manifest of the tasks; what an earlier call built for the same settings is kept."""
    from rad.evaluation.build import build_tasks
    from rad.evaluation.data import input_files
    from rad.evaluation.ruler import plan
    from rad.evaluation.tokenizer import tokenizer_digest
    from rad.files import digest, file_digest
    from rad.models.sources import tokenizer_folder

    tokenizer = tokenizer_folder(args.model, revision=args.revision)
    folder = args.output / "tasks"
    files = {Path(name) for name in input_files(settings)}
    for name in plan.ruler_tasks(settings):
        for subtask, _ in plan.planned(settings, name):
            files.update(map(Path, plan.input_files(settings, name, subtask)))
    # a chat template is in either of these
    beside = (Path(tokenizer) / name for name in ("tokenizer_config.json", "chat_template.jinja"))
    files.update(path for path in beside if path.is_file())
    made_of = {
        "settings": digest(settings.model_dump(mode="json")),
        "tokenizer": tokenizer_digest(tokenizer),
        "files": {str(path): file_digest(path) for path in sorted(files)},
    }
    stamp = folder / "made_of.json"
    if stamp.is_file() and read_json(stamp) == made_of:
        kept = dict(read_json(folder / "manifest.json"))
        # what was missing may be on the hub by now
        if all(entry["status"] == "ready" for entry in kept["tasks"]):
            return kept
    stamp.unlink(missing_ok=True)  # it says that the folder is whole
    manifest = build_tasks(settings, tokenizer, folder)
    write_json(stamp, made_of)
    return manifest


def _table(evaluation: dict[str, Any], samples: Path) -> str:
    """Every metric with its 95 % interval and number of documents, missing data named."""
    import numpy as np

    from rad.reporting.records import records
    from rad.reporting.statistics import mean_estimate

    values: dict[tuple[str, str], list[float]] = {}
    tokens: dict[str, list[float]] = {}
    for _, row in records(samples):
        if "token_nll" in row["metrics"]:
            tokens.setdefault(row["task"], []).append(float(row["tokens"]))
        for metric, value in row["metrics"].items():
            values.setdefault((row["task"], metric), []).append(float(value))
    lines = [f"{'task':<26} {'metric':<16} {'value':>8} {'95 % interval':>19} {'n':>6}"]
    order = {
        name: [entry["metric"], *entry["metrics"]]
        for name, entry in evaluation["rad"]["tasks"].items()
    }
    for task, metric in sorted(
        values, key=lambda key: (list(order).index(key[0]), order[key[0]].index(key[1]))
    ):
        column = values[task, metric]
        found = mean_estimate([column])
        if metric == "token_nll":  # a mean over tokens, shown as its exponential
            metric, found = "perplexity", mean_estimate([column], np.exp, [tokens[task]])
        interval = f"[{found.low:.4f}, {found.high:.4f}]"
        lines.append(f"{task:<26} {metric:<16} {found.value:>8.4f} {interval:>19} {found.n:>6}")
    for task, reason in evaluation["rad"]["missing"].items():
        lines.append(f"{task:<26} missing data   {reason}")
    return "\n".join(lines)


def bench(args: argparse.Namespace) -> None:
    """Score a checkpoint on suites; start it with torchrun to share the work."""
    from rad.distillation import parallel
    from rad.evaluation import cost

    settings = _settings(args)
    if args.dry_run:
        print(cost.text(_built(args, settings)))
        return
    from rad.evaluation.harness import evaluate
    from rad.models import sources

    with parallel.processes(args.device) as device:
        parallel.from_first(lambda: _built(args, settings))
        model = sources.load(args.model, revision=args.revision, dtype=args.dtype).to(device)
        tokenizer = sources.load_tokenizer(args.model, revision=args.revision)
        found = evaluate(
            model,
            tokenizer,
            args.output / "tasks",
            run=args.run or Path(args.model).name,
            batch_size=settings.batch_size,
            batch_tokens=settings.batch_tokens,
            max_length=settings.max_length,
            output=args.output,
        )
        if parallel.first():
            print(_table(found, args.output / "samples.jsonl"))


_DATA: Argument = (
    "--data",
    {"type": Path, "default": Path("data"), "help": "folder with data files (default: data)"},
)
VERBS: dict[str, Verb] = {
    "suites": (suites, [_DATA]),
    "bench": (
        bench,
        [
            ("model", {"help": "checkpoint folder, nano:<size> or hub id"}),
            ("--suite", {"nargs": "*", "default": [], "help": "names of suites (`rad suites`)"}),
            ("--tasks", {"type": as_json, "default": None, "help": "tasks as in a study, JSON"}),
            ("--output", {"type": Path, "required": True, "help": "folder of the results"}),
            _DATA,
            ("--revision", {"default": None, "help": "hub revision of the model"}),
            DTYPE,
            DEVICE,
            ("--samples", {"type": int, "default": None, "help": "at most so many documents each"}),
            ("--batch-size", {"type": int, "default": 32, "help": "prompts per batch"}),
            ("--batch-tokens", {"type": int, "default": None, "help": "most tokens per batch"}),
            ("--max-length", {"type": int, "default": None, "help": "longest prompt + answer"}),
            ("--chat-template", {**OPTIONAL, "help": "file; default: the tokenizer's"}),
            ("--offline", {"action": "store_true", "help": "never ask the hub for data"}),
            ("--run", {"default": None, "help": "name in the results; default: the folder's"}),
            ("--dry-run", {"action": "store_true", "help": "build the tasks, print their cost"}),
        ],
    ),
}
