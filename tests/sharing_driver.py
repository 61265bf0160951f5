"""Evaluate in the processes of torchrun, as test_evaluation_sharing.py evaluates in one.

    torchrun --nproc-per-node 2 sharing_driver.py TASKS FOLDER

Writes FOLDER/many/NAME/ for every model of `MODELS`, and FOLDER/failedN.json: what process N said
to evaluations in which one of them fails.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from evaluation_fixture import nano_tokenizer, small_hybrid, small_model

from rad.distillation import parallel
from rad.evaluation import bridge, harness
from rad.evaluation.harness import evaluate
from rad.files import write_json

MODELS: dict[str, Callable[[], Any]] = {
    "llama": small_model,
    "hybrid": lambda: small_hybrid("mamba2"),
    "bfloat16": lambda: small_hybrid("gated_deltanet").to(torch.bfloat16),
}


def scored(name: str, tasks: Path, output: Path, batch_size: int = 3) -> dict[str, Any]:
    """One model of `MODELS` on the tasks."""
    torch.set_num_threads(1)  # sums of another number of threads differ in the last bits
    return evaluate(
        MODELS[name](),
        nano_tokenizer(),
        tasks,
        run=name,
        batch_size=batch_size,
        max_length=None,
        output=output,
        progress=parallel.rank() == 1,  # nobody but the first shows any
    )


def _words(act: Callable[[], Any]) -> str:
    try:
        act()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def failures(tasks: Path, folder: Path) -> dict[str, str]:
    """What this process says when one of them fails, and to the evaluation after that."""
    answers = bridge.answers
    samples = harness._sample

    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    found = {}
    if parallel.rank() == 1:
        calls = iter([answers, out_of_memory])
        bridge.answers = lambda *values, **options: next(calls)(*values, **options)
    found["generating"] = _words(lambda: scored("llama", tasks, folder / "failed"))
    bridge.answers = answers
    if parallel.first():
        harness._sample = out_of_memory
    found["scoring"] = _words(lambda: scored("llama", tasks, folder / "failed"))
    harness._sample = samples
    where = tasks if parallel.first() else folder / "nowhere"
    found["tasks"] = _words(lambda: scored("llama", where, folder / "failed"))
    size = 3 + parallel.rank()
    found["batch"] = _words(lambda: scored("llama", tasks, folder / "failed", size))
    found["after"] = _words(lambda: scored("llama", tasks, folder / "after"))
    return copy.deepcopy(found)


def main() -> None:
    """Evaluate what the tests look at."""
    tasks, folder = map(Path, sys.argv[1:])
    with parallel.processes("cpu"):
        for name in MODELS:
            returned = scored(name, tasks, folder / "many" / name)
            write_json(folder / f"returned_{name}_{parallel.rank()}.json", returned)
        write_json(folder / f"failed{parallel.rank()}.json", failures(tasks, folder))


if __name__ == "__main__":
    main()
