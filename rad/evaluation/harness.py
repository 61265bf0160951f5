"""Score one model on the tasks of a study through lm-eval, in lm-eval's own result format."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rad.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SCHEMA = 1
# Closed-form standard errors only: lm-eval would start processes to bootstrap anything else.
_STANDARD_ERRORS = 2


@contextlib.contextmanager
def _offline(progress: bool) -> Iterator[None]:
    """No network, bars of `HFLM` alone and only when wanted, of the chatter only errors."""
    wanted = {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_EVALUATE_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    # transformers warns when max_length runs past the trained context, which is a setting here
    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    from lm_eval.api import task as task_module
    from lm_eval.models import huggingface as model_module

    bar = task_module.tqdm

    def hidden(*values: Any, **options: Any) -> Any:
        return bar(*values, **{**options, "disable": True})

    # lm-eval makes a bar per task for building requests, which takes milliseconds here.
    quiet = [task_module] if progress else [task_module, model_module]
    for module in quiet:
        module.tqdm = hidden
    try:
        yield
    finally:
        for module in quiet:
            module.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def read_documents(data_files: dict[str, str], **unused: Any) -> dict[str, Any]:
    """lm-eval `custom_dataset`: JSON Lines in memory, split name -> dataset.

    Stands in for `dataset_path: json`, which converts and caches every file below the home folder;
    ten times slower for the small files here, and stale when two studies meet.
    """
    from datasets import Dataset

    result = {}
    for split, path in data_files.items():
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        result[split] = Dataset.from_list([json.loads(line) for line in lines])
    return result


def load_manifest(tasks: Path) -> dict[str, Any]:
    """The manifest of a folder written by `build_tasks`; raises `ValueError` when there is none."""
    manifest: dict[str, Any] = read_json(tasks / "manifest.json")
    return manifest


def task_configuration(tasks: Path, name: str) -> dict[str, Any]:
    """The lm-eval configuration of one built task, its data file resolved against `tasks`."""
    from lm_eval.tasks._yaml_loader import load_yaml

    content: dict[str, Any] = load_yaml(tasks / "yaml" / f"{name}.yaml", resolve_func=True)
    files = content["dataset_kwargs"]["data_files"]
    del content["dataset_path"]
    content["custom_dataset"] = read_documents
    content["dataset_kwargs"] = {
        "data_files": {split: str((tasks / file).resolve()) for split, file in files.items()}
    }
    return content


def _sample(entry: dict[str, Any], logged: dict[str, Any]) -> dict[str, Any]:
    """One record of `samples.jsonl` from lm-eval's log of a document."""
    document = logged["doc"]
    record = {
        "task": entry["name"],
        "family": entry["family"],
        "doc_id": logged["doc_id"],
        "metric": entry["metric"],
        "score": float(logged[entry["metric"]]),
        "prompt": document.get("prompt", ""),
        "target": document.get("target", document.get("text", "")),
        "response": logged["resps"][0][0],
        "subtask": entry["subtask"],
        "length": entry["length"],
    }
    if entry["family"] == "perplexity":
        record["response"] = ""
        record["tokens"] = document["tokens"]  # the weight of this document in the perplexity
    return record


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
) -> dict[str, Any]:
    """Score `model` on every task below `tasks`; write and return the evaluation.

    Writes `evaluation.json` and `samples.jsonl` into the folder `output`. The documents, their
    order and the batches depend on the tasks, the tokenizer and `batch_size` alone. `max_length` is
    the longest prompt plus answer in tokens (default: that of the tasks). Raises `TruncationError`
    when a prompt does not fit; nothing is ever cut.
    """
    started = time.monotonic()
    manifest = load_manifest(tasks)
    limit = max_length or manifest["max_length"]
    with _offline(progress):
        import torch
        from lm_eval import evaluate as run_tasks
        from lm_eval.tasks import TaskManager

        from rad.evaluation.bridge import HarnessModel

        was_training = model.training
        names = [entry["name"] for entry in manifest["tasks"]]
        loaded = TaskManager(include_defaults=False).load(
            [task_configuration(tasks, name) for name in names]
        )
        # `simple_evaluate` is this call plus several seconds of asking pip and git about the
        # machine; what it would add and is of use is added below.
        results = run_tasks(
            lm=HarnessModel(model, tokenizer, batch_size, limit),
            task_dict=loaded,
            bootstrap_iters=_STANDARD_ERRORS,
            log_samples=True,
        )
        model.train(was_training)
    logs = results["samples"]
    samples = [
        _sample(entry, logged)
        for entry in manifest["tasks"]
        for logged in sorted(logs[entry["name"]], key=lambda item: int(item["doc_id"]))
    ]
    kept = ("metric", "higher_is_better", "family", "task", "subtask", "length")
    evaluation = _tidy(results)
    evaluation["config"] = {"model": type(model).__name__, "batch_size": batch_size, "limit": None}
    for package in ("lm_eval", "transformers", "torch"):
        evaluation[f"{package}_version"] = metadata.version(package)
    evaluation["rad"] = {
        "schema": SCHEMA,
        "run": run,
        "seconds": round(time.monotonic() - started, 3),
        "batch_size": batch_size,
        "max_length": limit,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "tasks": {entry["name"]: {key: entry[key] for key in kept} for entry in manifest["tasks"]},
    }
    lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    write_text(output / "samples.jsonl", lines)
    write_json(output / "evaluation.json", evaluation)
    return evaluation
