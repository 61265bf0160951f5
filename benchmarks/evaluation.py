"""Evaluation: start-up of a suite against stock lm-eval, batches of 32 against single prompts.

    python -m benchmarks.evaluation [--part startup|batches]

Start-up is what stands between a fresh process and tasks that are ready to be asked, without a
model: 1,319 word problems from a local file, through lm-eval's own `gsm8k` with the data source
changed on one side, through a folder of `rad tasks` on the other. Processes take turns; the figures
are medians, CPU time beside wall time because the machine may be shared.

Batches: a hybrid of the embedded base model (mamba2, whole layers kept) answers nano documents;
rounds take turns, texts are compared. lm-eval's own `HFLM` answers the same as a peer.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROUNDS = 5
ROWS = 1319
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}

STOCK = """
from lm_eval import evaluate
from lm_eval.tasks import TaskManager, get_task_dict
tasks = get_task_dict(["local_gsm8k"], TaskManager(include_path="{folder}/override"))
assert len(tasks["local_gsm8k"].eval_docs) == {rows}
"""
OURS = """
from pathlib import Path
from lm_eval import evaluate
from rad.evaluation.harness import evaluate
from rad.evaluation.loading import load_manifest, load_tasks
folder = Path("{folder}/tasks")
tasks = load_tasks(folder, load_manifest(folder))["tasks"]
assert len(tasks["gsm8k"].eval_docs) == {rows}
"""


def prepare(folder: Path) -> None:
    """The same word problems as an override of lm-eval's task, and as built tasks."""
    import lm_eval

    from rad.evaluation.build import build_tasks
    from rad.settings import EvaluationSettings

    rows = [
        {"question": f"Ann has {n} hats and buys {n % 7}. How many?", "answer": f"#### {n + n % 7}"}
        for n in range(ROWS)
    ]
    data = folder / "gsm8k.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stock = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    override = {
        "include": str(stock),
        "task": "local_gsm8k",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"train": str(data), "test": str(data)}},
    }
    (folder / "override").mkdir()
    (folder / "override" / "local.yaml").write_text(json.dumps(override))
    task = {"kind": "gsm8k", "files": [data.name], "shot_files": [data.name], "shots": 5}
    settings = EvaluationSettings.model_validate(
        {"max_length": 10**6, "probe_samples": 0, "tasks": {"gsm8k": task}}
    )
    nano = resources.files("rad") / "assets" / "nano" / "base"
    build_tasks(settings, str(nano), folder / "tasks", folder)


def fresh(code: str, folder: Path) -> tuple[float, float]:
    """(wall, CPU) seconds of a new Python process."""
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(folder / "home")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code.format(folder=folder, rows=ROWS)],
        env=environment,
        capture_output=True,
        text=True,
    )
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(done.stderr)
    user, system = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    return wall, user + system


def startup_part() -> None:
    """Both start-ups in turn, after one of each that fills caches."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        codes = {"stock lm-eval": STOCK, "rad": OURS}
        times: dict[str, list[tuple[float, float]]] = {who: [] for who in codes}
        for turn in range(ROUNDS + 1):
            for who, code in codes.items():
                spent = fresh(code, folder)
                if turn:
                    times[who].append(spent)
    print(f"\nstart-up: {ROWS} documents ready in a fresh process, median of {ROUNDS}")
    print(f"{'':>14} {'wall s':>8} {'CPU s':>8} {'ratio':>6}")
    reference = statistics.median(cpu for _, cpu in times["stock lm-eval"])
    for who, spent in times.items():
        wall, cpu = (statistics.median(column) for column in zip(*spent, strict=True))
        print(f"{who:>14} {wall:8.2f} {cpu:8.2f} {cpu / reference:6.2f}")


def requests(documents: int) -> list[Any]:
    """Nano word problems and programs, as lm-eval would ask them."""
    from rad.data.nano import generate

    options = {"until": [], "max_gen_toks": 48, "do_sample": False}
    return [
        SimpleNamespace(args=(example.prompt, options), task_name=kind, doc_id=index, doc={})
        for kind in ("gsm_nano", "crux_nano")
        for index, example in enumerate(generate(kind, "test", 1234, documents // 2))
    ]


def batches_part(documents: int = 128) -> None:
    """A hybrid at batch 1 and 32, and lm-eval's own class at 32."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from benchmarks.decode import placements
    from rad.evaluation.bridge import HarnessModel
    from rad.models import sources
    from rad.models.convert import convert
    from rad.models.store import mixer_settings
    from rad.placement import Placement

    torch.set_num_threads(1)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    base, tokenizer = sources.load("nano:base"), sources.load_tokenizer("nano:base")
    config = base.config
    placement = Placement(
        base="nano:base",
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        softmax=placements(config)["whole layers"],
        selector="whole layers",
    )
    model = convert(base, placement, mixer_settings("mamba2"), "qkvo")
    asked = requests(documents)
    answer: dict[str, Callable[[], list[str]]] = {
        "batch 1": lambda: HarnessModel(model, tokenizer, 1).generate_until(asked),
        "batch 32": lambda: HarnessModel(model, tokenizer, 32).generate_until(asked),
        "HFLM, batch 32": lambda: HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=32, max_length=512
        ).generate_until(asked, disable_tqdm=True),
    }
    seconds: dict[str, list[float]] = {who: [] for who in answer}
    texts: dict[str, list[str]] = {}
    for _ in range(3):
        for who, act in answer.items():
            start = time.process_time()
            texts[who] = act()
            seconds[who].append(time.process_time() - start)
    print(f"\nbatches: {documents} documents, a hybrid of nano:base, CPU seconds, median of 3")
    print(f"{'':>16} {'seconds':>8} {'speed-up':>9}  texts as at batch 1")
    for who, spent in seconds.items():
        middle = statistics.median(spent)
        same = sum(map(str.__eq__, texts[who], texts["batch 1"]))
        faster = statistics.median(seconds["batch 1"]) / middle
        print(f"{who:>16} {middle:8.2f} {faster:9.1f}  {same}/{len(asked)}")


PARTS: dict[str, Callable[[], None]] = {"startup": startup_part, "batches": batches_part}


def main() -> None:
    """Run the parts asked for, all by default."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all of them")
    for name in parser.parse_args().part or list(PARTS):
        PARTS[name]()


if __name__ == "__main__":
    main()
