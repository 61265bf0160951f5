"""Score one model on the tasks of a study through lm-eval, in lm-eval's own result format."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rad.evaluation import cost
from rad.evaluation.loading import load_manifest, load_tasks
from rad.files import write_json, write_text
from rad.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rad.evaluation.bridge import HarnessModel

SCHEMA = 2
# Closed-form standard errors only: lm-eval would start processes to bootstrap anything else.
_STANDARD_ERRORS = 2


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """No network, none of lm-eval's bars, of the chatter only errors."""
    wanted = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    # transformers warns when a prompt runs past the trained context, which is a setting here
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    from lm_eval.api import task as task_module

    bar = task_module.tqdm

    def hidden(*values: Any, **options: Any) -> Any:
        return bar(*values, **{**options, "disable": True})

    # lm-eval makes a bar per task for building requests, which takes milliseconds here.
    task_module.tqdm = hidden
    try:
        yield
    finally:
        task_module.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _answer(loaded: Mapping[str, Any], lm: HarnessModel) -> None:
    """What lm-eval's `evaluate` asks of a model, and no more: for processes that do not score.

    Scoring stays with one process: it takes others' CPU time otherwise, on which the verdict about
    a program that runs too long depends.
    """
    requests: dict[str, list[Any]] = defaultdict(list)
    for task in loaded["tasks"].values():
        task.build_all_requests(rank=0, world_size=1)
        for instance in task.instances:
            requests[instance.request_type] += [instance] * instance.repeats
    for kind, several in requests.items():
        getattr(lm, kind)(several)


def _run(loaded: Mapping[str, Any], lm: HarnessModel) -> dict[str, Any]:
    """lm-eval's `evaluate`; tables without rows where no task has data."""
    if not loaded["tasks"]:
        tables = ("results", "configs", "versions", "n-shot", "n-samples", "higher_is_better")
        return {name: {} for name in (*tables, "samples")}
    from lm_eval import evaluate as run_tasks

    # `simple_evaluate` is this call plus several seconds of asking pip and git about the machine;
    # what it would add and is of use is added by our caller.
    results: dict[str, Any] = run_tasks(
        lm=lm, task_dict=loaded, bootstrap_iters=_STANDARD_ERRORS, log_samples=True
    )
    return results


def _numbers(logged: Mapping[str, Any]) -> dict[str, float]:
    """Every metric of a document that is a number, not parts of one for the whole task."""
    found = {name: logged[name] for name in logged["metrics"]}
    return {name: float(v) for name, v in found.items() if isinstance(v, bool | int | float)}


def _sample(entry: dict[str, Any], logged: dict[str, Any], lm: HarnessModel) -> dict[str, Any]:
    """One record of `samples.jsonl` from lm-eval's log of a document."""
    document = logged["doc"]
    record = {
        "task": entry["name"],
        "family": entry["family"],
        "doc_id": logged["doc_id"],
        "id": str(document.get("id", logged["doc_id"])),
        "metric": entry["metric"],
        "score": float(logged[entry["metric"]]),
        "metrics": _numbers(logged),
        "prompt": document.get("prompt", ""),
        "target": document.get("target", document.get("text", "")),
        "response": "",
        "subtask": entry["subtask"],
        "length": entry["length"],
    }
    if entry["output_type"] == "generate_until":
        (responses,) = logged["resps"]
        record["response"] = responses[0]
        if len(responses) > 1:
            record["responses"] = responses
    elif entry["output_type"] == "loglikelihood_rolling":
        record["tokens"] = document["tokens"]  # the weight of this document in the perplexity
    else:
        record["loglikelihoods"] = [value for ((value, _greedy),) in logged["resps"]]
    if entry["output_type"] == "multiple_choice":
        options = document.get("contexts") or document["choices"]
        values = record["loglikelihoods"][: len(options)]
        record["target"] = options[document["gold"]]
        record["response"] = options[values.index(max(values))]
    if answers := lm.answers.get((entry["name"], logged["doc_id"])):
        record["new_tokens"] = sum(answer.new_tokens for answer in answers)
        record["truncated"] = any(answer.truncated for answer in answers)
    return record


def _described(entry: dict[str, Any], lm: HarnessModel) -> dict[str, Any]:
    """What `evaluation.json` says about a task beside its scores."""
    kept = ("metric", "metrics", "higher_is_better", "family", "task", "subtask", "length")
    found = {key: entry[key] for key in kept}
    # what the documents are not: real, or the published set
    labels = ("synthetic", "stand_in")
    found |= {key: entry["facts"][key] for key in labels if key in entry.get("facts", {})}
    if entry["status"] == "missing":
        return found | {"n": 0}
    found["n"] = entry["samples"]
    if entry["repeats"] > 1:
        found["repeats"] = entry["repeats"]
    answers = [
        each for (task, _), few in lm.answers.items() if task == entry["name"] for each in few
    ]
    if answers:
        found["truncation_rate"] = sum(answer.truncated for answer in answers) / len(answers)
    return found


def _tidy(results: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's dictionary without samples, functions and this machine's paths."""
    kept = {key: value for key, value in results.items() if key != "samples"}
    for name, configuration in kept["configs"].items():
        configuration.pop("custom_dataset", None)
        configuration["dataset_path"] = "json"
        configuration["dataset_kwargs"] = {"data_files": {"test": f"data/{name}.jsonl"}}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Path,
    *,
    run: str,
    batch_size: int,
    max_length: int | None,
    output: Path,
    progress: bool = True,
    batch_tokens: int | None = None,
) -> dict[str, Any]:
    """Score `model` on every task below `tasks`; write and return the evaluation.

    Writes `evaluation.json` and `samples.jsonl` into the folder `output`. The documents, their
    order and the batches depend on the tasks, the tokenizer, `batch_size` and `batch_tokens` (most
    tokens of a batch, so that long prompts meet fewer others) alone. `max_length` is the longest
    prompt plus answer in tokens (default: that of the tasks). In several processes
    (torch.distributed, each with the model) they share the work, the first writes, and what it
    writes is what one process would write. Raises `TruncationError` when a prompt does not fit;
    nothing is ever cut.
    """
    from rad.evaluation import sharing

    with sharing.together():
        with _offline():
            batch = (batch_size, batch_tokens)
            found = _evaluate(model, tokenizer, tasks, run, batch, max_length, progress)
        if found is not None:
            evaluation, samples = found
            lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
            # never the evaluation of one run beside the samples of another
            (output / "evaluation.json").unlink(missing_ok=True)
            write_text(output / "samples.jsonl", lines)
            write_json(output / "evaluation.json", evaluation)
        shared: dict[str, Any] = sharing.exchange(found and found[0])[0]
    return shared


def _evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Path,
    run: str,
    batch: tuple[int, int | None],
    max_length: int | None,
    progress: bool,
) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """(evaluation, samples) in the first process, None in the others."""
    started = time.monotonic()
    manifest = load_manifest(tasks)
    loaded = load_tasks(tasks, manifest)
    limit = max_length or manifest["max_length"]
    rows, total = cost.summary(manifest)

    import torch

    from rad.evaluation import sharing
    from rad.evaluation.bridge import HarnessModel

    was_training = model.training
    try:
        with contextlib.ExitStack() as stack:
            report = None
            if progress and sharing.first():
                print(cost.text(manifest), file=sys.stderr, flush=True)
                bar = stack.enter_context(Progress("evaluation", total.prompts, unit="prompt"))
                report = cost.Tracker(rows, bar).report
            batch_size, batch_tokens = batch
            lm = HarnessModel(model, tokenizer, batch_size, limit, report, batch_tokens)
            if not sharing.first():
                _answer(loaded, lm)
                return None
            results = _run(loaded, lm)
    finally:
        model.train(was_training)
    logs = results["samples"]
    ready = [entry for entry in manifest["tasks"] if entry["status"] == "ready"]
    samples = [
        _sample(entry, logged, lm)
        for entry in ready
        for logged in sorted(logs[entry["name"]], key=lambda item: int(item["doc_id"]))
    ]
    evaluation = _tidy(results)
    evaluation["config"] = {"model": type(model).__name__, "batch_size": batch_size, "limit": None}
    for package in ("lm_eval", "transformers", "torch"):
        evaluation[f"{package}_version"] = metadata.version(package)
    evaluation["rad"] = {
        "schema": SCHEMA,
        "run": run,
        "seconds": round(time.monotonic() - started, 3),
        "batch_size": batch_size,
        "batch_tokens": batch_tokens,
        "max_length": limit,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "processes": sharing.count(),
        "cost": {key: value for key, value in total._asdict().items() if key != "task"},
        "tasks": {entry["name"]: _described(entry, lm) for entry in manifest["tasks"]},
        "missing": {
            entry["name"]: entry["reason"]
            for entry in manifest["tasks"]
            if entry["status"] == "missing"
        },
    }
    return evaluation, samples
