"""A made-up results tree in the contract's formats, for tests of the report.

The numbers follow from a few formulas and a seed; nothing here was measured.
Try it: `python tests/reporting_fixture.py <folder>` writes a tree and its report.
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from rad.files import write_json, write_text
from rad.placement import Footprint, Placement
from rad.study import Run, Study, load

CONFIG = Path(__file__).parents[1] / "config" / "nano.yaml"
LAYERS, HEADS, KV_HEADS, HEAD_DIM = 8, 4, 2, 32
HEAD_BYTES = 2 * 4 * HEAD_DIM  # keys and values in float32
WEIGHTS = 790_000
SUBTASKS = ("single", "multikey", "vt", "cwe")
SKILL = {"uniform": 0.62, "rad": 0.55, "kl_guided": 0.86, "retrieval_aware": 0.9}
TEACHER = {"self": 0.0, "medium": 0.03, "large": 0.05}
KEPT_LAYERS = {
    "uniform": [1, 5, 3, 7, 0, 2, 4, 6],
    "rad": [0, 7, 1, 6, 5, 4, 3, 2],
    "kl_guided": [3, 4, 2, 5, 6, 1, 0, 7],
}


def nano_study(**changes: Any) -> Study:
    """The nano study with other top-level keys where `changes` says so."""
    config = load([CONFIG]).model_dump(mode="json", exclude_none=True)
    # lists of budgets and settings go back in as they came out
    return Study.from_config({**config, **changes})


def small_study() -> Study:
    """Few documents, every view, a selector of the user's own, two teachers."""
    config = nano_study().model_dump(mode="json", exclude_none=True)
    grid = [dict(entry) for entry in config["grid"]]
    grid[0]["selector"] = ["uniform", "retrieval_aware", "kl_guided", "every_third"]
    grid[0]["teacher"] = ["self", "large"]
    selectors = {**config["selectors"], "every_third": {"method": "uniform", "offset": 1}}
    tasks = {
        "gsm_nano": {"kind": "gsm_nano", "samples": 30},
        "ruler_nano": {"kind": "ruler_nano", "samples": 10, "lengths": [64]},
    }
    return nano_study(
        evaluation={"tasks": tasks, "efficiency": {"contexts": [64, 256]}},
        grid=grid,
        selectors=selectors,
        title="A <small> study & more",
    )


def _generator(*names: object) -> np.random.Generator:
    # crc32, not hash(): the latter differs between processes
    return np.random.default_rng(zlib.crc32("/".join(map(str, names)).encode()))


def _kept_heads(run: Run) -> int:
    """Query heads that the budget keeps; a budget in bytes keeps the whole layers that fit."""
    whole = KV_HEADS * HEAD_BYTES
    if run.budget.kv_bytes_per_token is not None:
        return HEADS * run.budget.layer_count(LAYERS, HEADS, whole)
    return run.budget.head_count(LAYERS, HEADS)


def _placement(run: Run) -> Placement:
    kept = _kept_heads(run)
    shape = {"layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS}
    generator = _generator("placement", run.selector)
    cost: dict[str, Any] = {"tokens": 0, "seconds": 0.01, "forward_passes": 0}
    scores: dict[str, Any] | None = None
    if run.selector == "retrieval_aware":
        values = np.round(generator.exponential(0.02, (LAYERS, HEADS)), 4)
        values[3, 1], values[4, 0], values[2, 2] = 0.9, 0.6, 0.4  # a few heads stand out
        order = np.argsort(-values, axis=None)[:kept]
        pairs = [(int(index) // HEADS, int(index) % HEADS) for index in order]
        scores = {"kind": "head", "name": "margin drop (nats)", "values": values.tolist()}
        cost = {"tokens": 393216, "seconds": 6.4, "forward_passes": 66}
        if run.budget.kv_bytes_per_token is not None:
            # a kept head of a mixed layer caches keys and values of its own
            pairs = pairs[: run.budget.kv_bytes_per_token // HEAD_BYTES]
    else:
        layers = KEPT_LAYERS.get(run.selector, list(range(LAYERS)))[: kept // HEADS]
        pairs = [(layer, head) for layer in layers for head in range(HEADS)]
        if run.selector == "kl_guided":
            values = [
                round(0.4 - 0.25 * math.exp(-((layer - 3.4) ** 2)), 4) for layer in range(LAYERS)
            ]
            name = "held-out KL after restoring the layer (nats/token)"
            scores = {"kind": "layer", "name": name, "values": values, "higher_is_kept": False}
            cost = {"tokens": 480000, "seconds": 81.2, "forward_passes": 470}
            cost["trained_tokens"] = 320000
        if run.selector == "rad":
            cost = {"tokens": 61440, "seconds": 22.5, "forward_passes": 2600}
    cost["flops"] = 2.0 * WEIGHTS * (cost["tokens"] + 2 * cost.get("trained_tokens", 0))
    placement = Placement.model_validate(
        {
            **shape,
            **{"schema": 1, "base": run.base, "softmax": pairs, "selector": run.selector},
            **{"scores": scores, "cost": cost, "provenance": {"note": "made up"}},
        }
    )
    cached = placement.cached_kv_heads()
    placement.footprint = Footprint(
        heads=len(pairs), kv_heads=cached, kv_bytes_per_token=cached * HEAD_BYTES
    )
    return placement


def _skill(run: Run) -> float:
    if run.mixer == "sliding_window":
        return 0.3
    share = _kept_heads(run) / (LAYERS * HEADS)
    if share == 0:
        return 0.35
    return min(0.99, SKILL.get(run.selector, 0.5) + TEACHER[run.teacher] + 0.2 * (share - 0.25))


def _tasks(study: Study) -> dict[str, dict[str, Any]]:
    """Expanded task name -> family, documents, subtask, length."""
    tasks: dict[str, dict[str, Any]] = {}
    for name, task in study.evaluation.tasks.items():
        if task.kind.startswith("ruler"):
            for subtask in task.subtasks or SUBTASKS:
                for length in task.lengths:
                    extra = {"task": name, "subtask": subtask, "length": length}
                    tasks[f"{name}_{subtask}_{length}"] = {
                        **{"family": "ruler", "samples": task.samples},
                        **extra,
                    }
        elif task.kind == "perplexity":
            tasks[name] = {"family": "perplexity", "task": name, "samples": task.samples}
        else:
            family = "gsm" if task.kind.startswith("gsm") else "crux"
            tasks[name] = {"family": family, "task": name, "samples": task.samples}
    return tasks


Missing = dict[str, tuple[str, str]]  # task -> family, reason


def _write_scores(study: Study, folder: Path, skill: float, missing: Missing) -> None:
    lines, described = [], {}
    for task, about in _tasks(study).items():
        family, samples = about["family"], about["samples"]
        is_text = family == "perplexity"
        metric = "token_nll" if is_text else "exact_match"
        described[task] = {"metric": metric, "higher_is_better": not is_text, "family": family}
        described[task] |= {key: about.get(key) for key in ("task", "subtask", "length")}
        # the same documents are hard for everyone: what pairing is for
        difficulty = _generator("documents", task).random(samples)
        noise = _generator("noise", folder.name, task).normal(0, 0.08, samples)
        ease = skill + (0.06 if family == "gsm" else 0.0)
        for document in range(samples):
            if is_text:
                score = 2.0 + difficulty[document] - 0.5 * skill + 0.2 * noise[document]
            else:
                score = float(difficulty[document] + noise[document] < ease)
            record = {"task": task, "family": family, "doc_id": document, "metric": metric}
            texts = {"prompt": "p", "target": "t", "response": "r"}
            extra = {key: about.get(key) for key in ("subtask", "length")}
            if is_text:
                extra["tokens"] = 100 + document
            else:
                # an answer without a result is wrong; every tenth wrong one is right in other words
                lenient = score or float(document % 10 == 0)
                silent = float(not lenient and document % 7 == 0)
                extra["metrics"] = {metric: score, "semantic_match": lenient, "no_answer": silent}
                extra |= {"truncated": bool(silent), "new_tokens": 12 + document % 5}
            record["id"] = f"{task}/{document}"
            lines.append(json.dumps({**record, "score": score, **texts, **extra}))
    write_text(folder / "samples.jsonl", "\n".join(lines) + "\n")
    for task, (family, _) in missing.items():
        described[task] = {"metric": "contains", "higher_is_better": True, "family": family, "n": 0}
        described[task] |= {"task": task, "subtask": None, "length": None}
    rad: dict[str, Any] = {
        "schema": 1,
        "run": folder.name,
        "seconds": 18.1,
        "batch_size": 64,
        "threads": 1,
    }
    rad["missing"] = {task: reason for task, (_, reason) in missing.items()}
    about_lm_eval = {"lm_eval_version": "0.4.13", "transformers_version": "5.23.0"}
    write_json(
        folder / "evaluation.json",
        {"results": {}, **about_lm_eval, "rad": {**rad, "dtype": "float32", "tasks": described}},
    )


def _write_efficiency(study: Study, folder: Path, kv_heads: int, state: int, size: int) -> None:
    per_token = HEAD_BYTES * kv_heads
    points = [
        {
            "context": context,
            "cache_bytes": per_token * context + state,
            "prefill_seconds": round(context * 2e-4, 4),
            "decode_tokens_per_second": round(320 / (1 + kv_heads * context / 20000), 2),
        }
        for context in study.evaluation.efficiency.contexts
    ]
    sizes = {"parameters": size, "trainable_parameters": size, "flops_per_token": 2.0 * size}
    memory = {"kv_bytes_per_token": per_token, "state_bytes": state, "dtype": "float32"}
    how = {"schema": 1, "run": folder.name, "batch_size": 1, "decode_tokens": 16, "threads": 1}
    write_json(folder / "efficiency.json", {**how, **sizes, **memory, "points": points})


def _write_training(study: Study, run: Run, folder: Path, skill: float) -> None:
    recipe = study.recipes[run.recipe]
    total = sum(stage.tokens for stage in recipe.stages)
    points = recipe.log_points if total else 0
    rate = 9100.0 + 10 * (zlib.crc32(run.id.encode()) % 50)
    lines, seconds, before = [], 0.0, 0
    for step in range(points + 1):
        done = step / points if points else 0.0
        wobble = 1 + 0.05 * float(_generator(run.id, step).normal())
        kl = (0.04 + 0.6 * (1 - skill) + 2.4 * math.exp(-6 * done)) * wobble
        reached = skill * (1 - math.exp(-5 * done)) * wobble
        tokens = round(total * done)
        probe = {name: min(1.0, round(reached, 4)) for name in study.evaluation.tasks}
        # the second half of a run is faster: the rate of a point is that of its own interval
        pace = rate * (0.8 if done <= 0.5 else 4 / 3)
        seconds, before = seconds + (tokens - before) / pace, tokens
        loss = round(kl, 5)
        lines.append(
            {
                **{"step": step * 10, "tokens": tokens, "stage": 0, "stage_name": "1: kl"},
                **{"train_loss": loss, "losses": {"kl": loss}, "layer_losses": {}},
                **{"held_out_kl": loss, "held_out_ce": round(1 + kl, 5), "probe": probe},
                "held_out_agreement": round(math.exp(-0.8 * kl), 5),
                **{"learning_rate": 1e-3, "learning_rates": {"all": 1e-3}, "seconds": seconds},
                "tokens_per_second": pace if step else 0.0,
                "model_flops_per_second": 6.0 * WEIGHTS * pace if step else 0.0,
                "peak_memory_mib": 610.0,
            }
        )
    write_text(folder / "curve.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7", "rad": "0.1.0"}
    write_json(
        folder / "training.json",
        {
            **{"schema": 1, "tokens": total, "steps": points * 10, "seconds": seconds},
            **{"tokens_per_second": total / seconds if total else 0.0, "peak_memory_mib": 612.5},
            **{"versions": versions, "threads": 1, "resumed": 0},
        },
    )


def as_first_version(root: Path) -> None:
    """Rewrite evaluations as the first version wrote them: headline scores and nothing else."""
    for path in root.glob("runs/*/samples.jsonl"):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for record in records:
            for key in ("id", "metrics", "truncated", "new_tokens"):
                record.pop(key, None)
        write_text(path, "".join(json.dumps(record) + "\n" for record in records))
        path = path.with_name("evaluation.json")
        content = json.loads(path.read_text(encoding="utf-8"))
        del content["rad"]["missing"]
        write_json(path, content)


def write_results(study: Study, root: Path, missing: Missing | None = None) -> None:
    """Write `results/<study>/` at `root` as if every rule before the report had run.

    `missing` are tasks without data, as if the study had named them too.
    """
    missing = missing or {}
    for run in study.run_table.values():
        folder = root / "runs" / run.id
        write_json(folder / "spec.json", study.spec(run.id))
        placement = _placement(run)
        placement.save(folder / "placement.json")
        skill = _skill(run)
        _write_training(study, run, folder, skill)
        _write_scores(study, folder, skill + 0.01 * run.seed, missing)
        state = 4096 * (LAYERS * HEADS - len(placement.softmax))
        _write_efficiency(study, folder, placement.cached_kv_heads(), state, WEIGHTS)
    for index, name in enumerate(study.references):
        folder = root / "runs" / f"model-{name}"
        write_json(
            folder / "spec.json",
            {"schema": 1, "run": f"model-{name}", "reference": name},
        )
        _write_scores(study, folder, 0.97 + 0.01 * index, missing)
        _write_efficiency(study, folder, LAYERS * KV_HEADS * (1 + index), 0, WEIGHTS * 2**index)
    jobs = {"select": (4, 25.0), "align": (1, 70.0), "distil": (14, 44.0), "evaluate": (17, 19.0)}
    for stage, (number, seconds) in jobs.items():
        for job in range(number):
            record = {"s": seconds + job, "max_rss": 900.0 + job, "cpu_time": seconds}
            text = json.dumps(record) + "\n"
            write_text(root / "benchmarks" / stage / f"{job}.jsonl", text)


if __name__ == "__main__":
    from rad.reporting import build_report

    target = Path(sys.argv[1])
    write_results(nano_study(), target)
    build_report(nano_study(), target)
