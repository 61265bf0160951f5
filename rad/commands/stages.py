"""Verbs of the workflow: one per rule, taking files, and those that look at a study.

Nothing heavy is imported before its verb runs.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rad.commands.options import (
    CONFIG,
    DEVICE,
    JSON,
    OPTIONAL,
    PATH,
    Verb,
    load_study,
    recorded_study,
)
from rad.devices import chosen
from rad.files import read_json, write_json, write_text


def plan(args: argparse.Namespace) -> None:
    """List the runs of a study."""
    study = load_study(args.config)
    for run in study.run_table.values():
        print(f"{run.id}  [{', '.join(run.views)}]")


def check(args: argparse.Namespace) -> None:
    """Check a study before any work: names, budgets, models, files; say where models come from."""
    from rad.models.hub import find
    from rad.models.sources import resolve
    from rad.preflight import check as preflight
    from rad.preflight import repositories
    from rad.study import StudyError
    from rad.workflow import go_offline

    study = load_study(args.config)
    if study.offline or args.offline:
        go_offline()
    faults = []
    try:
        preflight(study)
    except StudyError as error:
        faults.append(str(error))
    for key, kind, source, revision in repositories(study):
        try:
            place = str(resolve(source)) if kind == "model" else source
            found = find(place, revision, kind)
        except ValueError as error:
            faults.append(f"{key}: {error}")
            continue
        licence = found.licence or "not stated"
        commit = found.commit or "no revision known"
        gated = ", gated" if found.gated else ""
        print(f"{key}: {source} ({found.where}, {commit}), licence: {licence}{gated}")
    if faults:
        # one line each: every fault has a command of its own that mends it
        *others, last = dict.fromkeys(faults)
        for fault in others:
            print(fault, file=sys.stderr)
        raise StudyError(last)
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
    from rad.evaluation import cost
    from rad.evaluation.build import build_tasks
    from rad.models.sources import tokenizer_folder
    from rad.settings import EvaluationSettings

    record = read_json(args.model)
    tokenizer = tokenizer_folder(record["source"], revision=record["revision"])
    settings = EvaluationSettings.model_validate(args.settings)
    print(cost.text(build_tasks(settings, tokenizer, args.output, ruler=args.ruler)))


def align(args: argparse.Namespace) -> None:
    """Stage-1 alignment of all layers' mixers."""
    from rad.distillation import parallel
    from rad.distillation.align import align as run
    from rad.settings import AlignmentSettings

    parallel.alone("align")
    run(
        read_json(args.model),
        args.mixer,
        AlignmentSettings.model_validate(args.settings),
        corpus=args.corpus,
        state=args.state,
        output=args.output,
        device=chosen(args.device),
    )


def distil(args: argparse.Namespace) -> None:
    """Convert the base under a placement and distil it."""
    from rad.distillation import parallel
    from rad.distillation.run import distil as run
    from rad.placement import Placement

    placement = Placement.load(args.placement)
    probe = None
    if args.tasks is not None:
        from rad.evaluation.probe import probe_of

        probe = probe_of(args.tasks, args.probe_samples)
    with parallel.processes(args.device) as device:
        run(
            read_json(args.spec),
            placement,
            corpus=args.corpus,
            state=args.state,
            output=args.output,
            aligned=args.aligned,
            probe=probe,
            teacher_outputs=args.teacher_outputs,
            teacher_wait=args.teacher_wait,
            teacher_sha256=read_json(args.teacher_model)["weights_sha256"]
            if args.teacher_model
            else None,
            device=device,
        )


def evaluate(args: argparse.Namespace) -> None:
    """Score a model on every task of the suite and measure its cache and decode speed."""
    from rad.distillation import parallel
    from rad.evaluation.efficiency import measure
    from rad.evaluation.harness import evaluate as run
    from rad.models import sources
    from rad.settings import EvaluationSettings

    spec = read_json(args.spec)
    settings = EvaluationSettings.model_validate(args.settings)
    where = spec["model"] if "reference" in spec else {"source": str(args.output / "model")}
    with parallel.processes(args.device) as device:
        dtype = settings.dtype or where.get("dtype", "float32")
        loaded = sources.load(where["source"], revision=where.get("revision"), dtype=dtype)
        loaded.to(device)
        run(
            loaded,
            sources.load_tokenizer(where["source"], revision=where.get("revision")),
            args.tasks,
            run=spec["run"],
            batch_size=settings.batch_size,
            batch_tokens=settings.batch_tokens,
            max_length=settings.max_length,
            output=args.output,
        )
        first = parallel.first()
    if not first:
        return
    # not within the block, where the other processes would wait for it
    probe = measure(loaded, run=spec["run"], **settings.efficiency.model_dump())
    write_json(args.output / "efficiency.json", probe)


def report(args: argparse.Namespace) -> None:
    """Build tables, figures and report.html from the results of a study."""
    from rad.reporting import build_report

    build_report(recorded_study(args.study), args.root)


def teacher_outputs(args: argparse.Namespace) -> None:
    """Run a teacher over a corpus once and store what students need of it."""
    from rad.distillation.teacher_outputs import SHARD_BYTES, Writer, merge
    from rad.models import sources

    if args.step == "merge":
        _say_outputs(merge(args.output))
        return
    record = read_json(args.model)
    teacher = sources.load(
        record["source"],
        revision=record["revision"],
        dtype=record["dtype"],
        device_map=args.device_map,
    )
    if args.device_map is None:
        teacher = teacher.to(chosen(args.device))
    writer = Writer(
        teacher,
        args.corpus,
        args.output,
        args.kind,
        args.k,
        args.dtype,
        teacher_sha256=record["weights_sha256"],
        tokenizer_sha256=record["tokenizer_sha256"],
        temperature=args.temperature,
        seed=args.seed,
        batch_size=args.batch_size,
        vocabulary=args.vocabulary,
        shard_bytes=int(args.shard_mb * 2**20) if args.shard_mb else SHARD_BYTES,
        order_seed=args.order_seed,
    )
    if args.step != "part":
        writer.start()
    if args.step != "start":
        writer.part(args.part, args.parts)
    if args.step == "all":
        _say_outputs(merge(args.output))


def _say_outputs(manifest: dict[str, Any]) -> None:
    print(json.dumps({key: manifest[key] for key in ("bytes_per_token", "loss")}, indent=2))


VERBS: dict[str, Verb] = {
    "plan": (plan, [CONFIG]),
    "check": (
        check,
        [CONFIG, ("--offline", {"action": "store_true", "help": "do not ask the hub"})],
    ),
    "schema": (schema, [("--schema", PATH), ("--table", PATH)]),
    "model": (model, [("--name", {"required": True}), ("--settings", JSON), ("--output", PATH)]),
    "pretrain": (
        pretrain,
        [
            ("--size", {"required": True}),
            ("--output", PATH),
            ("--seed", {"type": int, "default": 0}),
        ],
    ),
    "corpus": (
        corpus,
        [
            ("--name", {"required": True}),
            ("--settings", JSON),
            ("--model", PATH),
            ("--output", PATH),
        ],
    ),
    "tasks": (
        tasks,
        [
            ("--settings", JSON),
            ("--model", PATH),
            ("--output", PATH),
            ("--ruler", {**OPTIONAL, "help": "folder with documents of `rad ruler`, per task"}),
        ],
    ),
    "align": (
        align,
        [
            ("--model", PATH),
            ("--mixer", JSON),
            ("--settings", JSON),
            ("--corpus", PATH),
            ("--state", PATH),
            ("--output", PATH),
            DEVICE,
        ],
    ),
    "distil": (
        distil,
        [
            ("--spec", PATH),
            ("--placement", PATH),
            ("--corpus", PATH),
            ("--tasks", OPTIONAL),
            ("--probe-samples", {"type": int, "default": 0}),
            ("--aligned", OPTIONAL),
            ("--teacher-outputs", {**OPTIONAL, "help": "folder of `rad teacher-outputs`"}),
            (
                "--teacher-wait",
                {"type": float, "default": None, "help": "minutes to wait for shards to come"},
            ),
            ("--teacher-model", {**OPTIONAL, "help": "description of that teacher"}),
            DEVICE,
            ("--state", PATH),
            ("--output", PATH),
        ],
    ),
    "evaluate": (
        evaluate,
        [("--spec", PATH), ("--tasks", PATH), ("--settings", JSON), ("--output", PATH), DEVICE],
    ),
    "report": (report, [("--study", PATH), ("--root", PATH)]),
    "teacher-outputs": (
        teacher_outputs,
        [
            ("--model", {**PATH, "help": "description of the teacher (source.json)"}),
            ("--corpus", PATH),
            ("--output", {**PATH, "help": "folder; an interrupted one is completed"}),
            ("--kind", {"choices": ["hidden", "top_k", "sampled"], "default": "hidden"}),
            ("--k", {"type": int, "default": None, "help": "entries of top_k, draws of sampled"}),
            ("--dtype", {"default": None, "help": "of what is stored; default: see docs"}),
            ("--temperature", {"type": float, "default": 1.0}),
            ("--seed", {"type": int, "default": 0}),
            ("--batch-size", {"type": int, "default": 8}),
            ("--vocabulary", {"type": int, "default": None, "help": "rows of the head that count"}),
            (
                "--step",
                {
                    "choices": ["all", "start", "part", "merge"],
                    "default": "all",
                    "help": "all of it, or one step of a corpus shared by several jobs",
                },
            ),
            ("--part", {"type": int, "default": 0, "help": "with --step part, counted from 0"}),
            ("--parts", {"type": int, "default": 1}),
            ("--shard-mb", {"type": float, "default": None, "help": "MiB of a shard (256)"}),
            (
                "--order-seed",
                {"type": int, "default": None, "help": "rows as students of this seed see them"},
            ),
            (
                "--device-map",
                {
                    "choices": ["auto", "balanced", "sequential"],
                    "default": None,
                    "help": "lay the layers over all visible GPUs, instead of --device",
                },
            ),
            DEVICE,
        ],
    ),
}
