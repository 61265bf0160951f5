"""Write parts of a teacher's outputs slowly, in processes that a test may kill.

    CORPUS OUT KIND PART PARTS SECONDS   a line of standard input: starts a process, answers its id;
                                         so many seconds pass before each shard
    PROCESS                              waits for its end, answers its exit code

Run by test_teacher_parts.py. The libraries are loaded once; children are forked before anything
ran.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from models_fixture import base_model

from rad.distillation.teacher_outputs import Writer

SETTINGS: dict[str, dict[str, Any]] = {
    "hidden": {},
    "top_k": {"k": 5},
    "sampled": {"k": 20},
}


def teacher() -> Any:
    """A model with a head of its own, the same in every process."""
    return base_model(seed=5, tie_word_embeddings=False)


def writer(corpus: Path, out: Path, kind: str = "hidden", **changes: Any) -> Writer:
    """A writer of small shards."""
    settings = {**SETTINGS[kind], "teacher_sha256": "teacher", "batch_size": 2, "shard_bytes": 4000}
    return Writer(teacher(), corpus, out, kind, **(settings | changes))


class Slow(Writer):
    """Waits before each shard."""

    seconds = 0.0

    def _shard(self, start: Mapping[str, Any], split: str, index: int) -> dict[str, Any]:
        time.sleep(self.seconds)
        return super()._shard(start, split, index)


def child(corpus: str, out: str, kind: str, part: str, parts: str, seconds: str) -> None:
    """The part."""
    torch.set_num_threads(1)
    slow = writer(Path(corpus), Path(out), kind)
    slow.__class__ = Slow
    Slow.seconds = float(seconds)
    slow.part(int(part), int(parts))


def main() -> None:
    """Answer line by line."""
    for line in sys.stdin:
        words = line.split()
        if len(words) == 1:
            _, status = os.waitpid(int(words[0]), 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        process = os.fork()
        if process == 0:
            try:
                child(*words)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(process, flush=True)


if __name__ == "__main__":
    main()
