"""Verbs for people: convert, look at, export and try out models outside a study.

Nothing heavy is imported before its verb runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rad.commands.options import DEVICE, DTYPE, FOLDER, OPTIONAL, PATH, Verb, as_json
from rad.devices import chosen
from rad.files import read_json


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

    model = sources.load(str(args.folder), dtype=args.dtype).to(chosen(args.device))
    records = kernel_records(model)
    print(json.dumps(records, indent=2))
    require(records)


def select(args: argparse.Namespace) -> None:
    """Choose which attention of a base stays, by any selection method, under a budget."""
    from rad.distillation import parallel
    from rad.models.store import mixer_settings
    from rad.placement import Budget
    from rad.selection import standalone

    parallel.alone("select")
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
        device=args.device,
    )
    placement.save(args.out)
    if args.model is None:
        print(placement.describe())


def speculate(args: argparse.Namespace) -> None:
    """Decode prompts with drafts that skip attention layers, and compare with plain decoding."""
    from rad.models import sources
    from rad.placement import Placement
    from rad.selection.speculation_report import skipped_by
    from rad.selection.speculation_report import speculate as run

    if (args.skip is None) == (args.placement is None):
        raise ValueError("say which attention drafts skip: --skip 1,2,5 or --placement FILE")
    if args.placement is not None:
        skip = skipped_by(Placement.load(args.placement))
    else:
        skip = _layers(args.skip)
    prompts = list(args.prompt)
    if args.prompts is not None:
        prompts += args.prompts.read_text(encoding="utf-8").splitlines()
    source = {"revision": args.revision}
    report = run(
        sources.load(args.base, dtype=args.dtype, **source),
        sources.load_tokenizer(args.base, **source),
        prompts,
        skip,
        new_tokens=args.new_tokens,
        max_draft=args.max_draft,
        exit_threshold=args.exit_threshold,
        adaptive_exit=not args.fixed_exit,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )
    print(json.dumps(report, indent=2, ensure_ascii=False))


def _layers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--skip {text!r}: expected layer numbers, as 1,2,5") from None


VERBS: dict[str, Verb] = {
    "select": (
        select,
        [
            ("name", {"help": "method, or a Python file with select(context)"}),
            ("--base", {"default": None, "help": "folder, hub id or nano:base|medium|large"}),
            ("--model", {**OPTIONAL, "help": "instead of --base: its description (source.json)"}),
            ("--budget", {"required": True, "help": "layers:2, heads:8, fraction:0.25, ..."}),
            ("--out", {**PATH, "help": "placement.json to write"}),
            ("--set", {"action": "append", "default": [], "help": "key=value of the method"}),
            ("--settings", {"type": as_json, "default": None, "help": "the same, as JSON"}),
            ("--text", {"type": Path, "nargs": "+", "default": [], "help": "calibration text"}),
            ("--corpus", {**OPTIONAL, "help": "calibration corpus, prepared by `rad corpus`"}),
            ("--aligned", {**OPTIONAL, "help": "stage-1 alignment, prepared by `rad align`"}),
            ("--mixer", {"type": as_json, "default": None, "help": "mixer of students, as JSON"}),
            ("--revision", {"default": None, "help": "hub revision of the base"}),
            DTYPE,
            ("--state", {**OPTIONAL, "help": "folder for what a long selection can resume"}),
            ("--work", {"type": Path, "default": Path("state/select"), "help": "made inputs"}),
            DEVICE,
        ],
    ),
    "placement": (
        placement,
        [
            ("placement", {"type": Path, "help": "placement.json"}),
            ("--model", {**OPTIONAL, "help": "description of the base (source.json)"}),
            ("--budget", {"default": None, "help": "layers:2, heads:8, fraction:0.25, ..."}),
        ],
    ),
    "convert": (
        convert,
        [
            ("--base", {"required": True, "help": "folder, hub id or nano:base|medium|large"}),
            ("--placement", PATH),
            ("--mixer", {"default": "mamba2", "help": "its name"}),
            (
                "--mixer-settings",
                {"type": as_json, "default": None, "help": "its settings, as JSON"},
            ),
            ("--initialisation", {"default": "qkvo", "help": "how the mixers start"}),
            ("--aligned", {**OPTIONAL, "help": "folder of a stage-1 alignment"}),
            ("--seed", {"type": int, "default": 0}),
            ("--revision", {"default": None, "help": "hub revision of the base"}),
            DTYPE,
            ("--out", {**PATH, "help": "checkpoint folder to write; must not hold anything"}),
        ],
    ),
    "inspect": (inspect, [FOLDER]),
    "export": (export, [FOLDER, DTYPE, ("--out", PATH)]),
    "kernels": (kernels, [FOLDER, DTYPE, DEVICE]),
    "speculate": (
        speculate,
        [
            ("base", {"help": "folder (a hybrid too), hub id or nano:base|medium|large"}),
            ("--skip", {"default": None, "help": "layers whose attention drafts leave out: 1,2,5"}),
            ("--placement", {**OPTIONAL, "help": "or: the layers that this placement replaces"}),
            ("--prompt", {"action": "append", "default": [], "help": "a prompt; may be repeated"}),
            ("--prompts", {**OPTIONAL, "help": "text file with a prompt per line"}),
            ("--new-tokens", {"type": int, "default": 64}),
            ("--max-draft", {"type": int, "default": 8, "help": "longest draft, in tokens"}),
            ("--exit-threshold", {"type": float, "default": 0.6, "help": "end a draft below it"}),
            ("--fixed-exit", {"action": "store_true", "help": "do not adapt the threshold"}),
            ("--temperature", {"type": float, "default": 0.0, "help": "0: greedy"}),
            ("--top-p", {"type": float, "default": 1.0}),
            ("--seed", {"type": int, "default": 0}),
            ("--revision", {"default": None, "help": "hub revision of the base"}),
            DTYPE,
        ],
    ),
}
