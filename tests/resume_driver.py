"""Train a small job undisturbed, then again killing it at random moments until it gets through.

    python resume_driver.py CORPUS FOLDER KILLS SEED

Run by test_resume.py. The libraries are loaded once; children are forked before anything ran.
Weights and curve go to FOLDER/whole and FOLDER/killed, the number killed to standard output.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from distillation_fixture import job, untimed, weights
from safetensors.torch import save_file

from rad.data.corpus import Corpus
from rad.distillation import loop


def child(corpus: Path, state: Path, output: Path) -> None:
    """The job, saving after every step."""
    torch.set_num_threads(1)
    trained = job(Corpus(corpus), state, save_every_seconds=0.0)
    records = loop.train(trained)
    tensors = {k: v for k, v in weights(trained).items() if k != "lm_head.weight"}  # tied
    save_file(tensors, str(output / "weights.safetensors"))
    (output / "curve.json").write_text(json.dumps(untimed(records), sort_keys=True))


def run(corpus: Path, folder: Path, kills: int, longest: float, chance: random.Random) -> int:
    """Fork, wait, kill, and again until a child ends by itself; how many were killed."""
    killed = 0
    while True:
        process = os.fork()
        if process == 0:
            child(corpus, folder / "state", folder)
            os._exit(0)
        if killed < kills:
            time.sleep(chance.uniform(0.1, 0.7) * longest)
            os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if not os.WIFSIGNALED(status):
            if os.waitstatus_to_exitcode(status):
                sys.exit(f"a child of {folder} failed")
            return killed
        killed += 1


def main() -> None:
    """Both runs."""
    corpus, folder, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(int(sys.argv[4]))
    start = time.monotonic()
    run(corpus, folder / "whole", 0, 0.0, chance)
    whole = time.monotonic() - start
    killed = 0
    while killed < kills // 2:  # one that got through too soon is repeated, with shorter waits
        shutil.rmtree(folder / "killed", ignore_errors=True)
        killed = run(corpus, folder / "killed", kills, whole, chance)
        whole *= 0.8
    print(killed)


if __name__ == "__main__":
    main()
