"""Train small jobs in the processes of torchrun, as test_parallel.py trains them in one.

    torchrun --nproc-per-node 2 parallel_driver.py FOLDER

FOLDER holds the corpora `whole` and `isolate`, stored `outputs` of a teacher, and `one`, a state
that a single process has left.
The first process writes FOLDER/many/NAME.json and NAME.safetensors for every job of `JOBS`; `two`
is a state that several processes have left, `refusedN.json` what process N said to impossible jobs,
`piecesN.json` the share of every model's weights that it held.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distillation_fixture import job, random_corpus, tokens_of, untimed, weights
from models_fixture import base_model
from safetensors.torch import save_file

from rad.data import isolation
from rad.data.corpus import Corpus
from rad.distillation import loop, parallel
from rad.distillation.measure import HeldOut
from rad.distillation.stages import Stage
from rad.distillation.teacher_outputs import write_outputs
from rad.distillation.teachers import StoredTeacher
from rad.settings import StageSettings

isolation._NARROWEST = 2  # so that short documents make a part of their own
STEPS, STOP_AT = 10, 13  # of a stage; of both stages together, where a job is asked to stop


def uneven_corpus(folder: Path) -> None:
    """Rows of two documents; in every third row the first is short."""
    corpus = random_corpus(folder, "isolate")
    boundaries, weights = np.array(corpus.boundaries("train")), np.array(corpus.weights("train"))
    boundaries[::3, 1:] = 0
    boundaries[::3, 3] = 1
    weights[boundaries == 1] = 0
    boundaries.tofile(folder / "train_boundary.bin")
    weights.tofile(folder / "train_weight.bin")


def store(folder: Path) -> None:
    """The teacher's final hidden states on the corpus `whole`."""
    write_outputs(teacher(), folder / "whole", folder / "outputs", "hidden", teacher_sha256="t")


def stage(loss: str = "kl", steps: int = 3, **settings: Any) -> StageSettings:
    """So many steps of 5 rows: one process of two has more of them."""
    settings = {"batch_size": 5, "learning_rate": 1e-3, **settings}
    rows = settings["batch_size"]
    return StageSettings.model_validate(
        {"loss": loss, "tokens": tokens_of(steps, rows), **settings}
    )


def both(folder: Path, state: Path | None = None, **changes: Any) -> loop.Job:
    """Ten steps of alignment and ten of forward KL, each with a record."""
    stages = [stage("align", STEPS), stage("kl", STEPS)]
    corpus = Corpus(folder / "whole")
    return job(corpus, state, stages=stages, log_points=STEPS, save_every_seconds=3600.0, **changes)


def _few(folder: Path, one: StageSettings, packing: str = "whole", **changes: Any) -> loop.Job:
    return job(Corpus(folder / packing), stages=[one], log_points=3, **changes)


def teacher() -> Any:
    """Another model than the base."""
    return base_model(seed=5).requires_grad_(False)


def _taught(folder: Path) -> loop.Job:
    """A live teacher, which the held-out figures are of too."""
    taught = _few(folder, stage(divergence="jsd"), teacher=teacher())
    taught.measure = HeldOut(taught.corpus, taught.base, taught.teacher, rows=4)
    return taught


def _stored(folder: Path) -> loop.Job:
    stored = StoredTeacher(folder / "outputs", Corpus(folder / "whole"), vocab_size=96)
    return _few(folder, stage(), teacher=stored, vocabulary=stored.vocabulary)


JOBS: dict[str, Callable[[Path], loop.Job]] = {
    "both": both,
    "orientation": lambda folder: _few(folder, stage("orientation")),
    "layers": lambda folder: _few(folder, stage("align", unit="layer"), "isolate"),
    "isolated": lambda folder: _few(folder, stage(batch_size=6, accumulate=2), "isolate"),
    "mixers": lambda folder: _few(folder, stage(trainable="mixers", ce_weight=0.5)),
    "recomputed": lambda folder: _few(folder, stage(), activation_checkpointing=True),
    "teacher": _taught,
    "labels": lambda folder: _few(folder, stage("ce"), kind="heads", mixer="mamba"),
    "stored": _stored,
    "best": lambda folder: _few(
        folder, stage(), state=folder / f"best{parallel.count()}", keep_best=True
    ),
}
REFUSED: dict[str, Callable[[Path], loop.Job]] = {
    "rows": lambda folder: _few(folder, stage(batch_size=4, accumulate=4)),
    "compile": lambda folder: _few(folder, stage(), compile=True),
    "loss": lambda folder: _few(folder, stage(learning_rate=1e30), state=folder / "broken"),
}


def interrupt(folder: Path, state: Path) -> None:
    """Leave a state behind: the last process alone is asked to stop."""
    original, steps = Stage.backward, 0

    def backward(self: Stage, batch: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == STOP_AT and parallel.rank() == parallel.count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    Stage.backward = backward  # type: ignore[method-assign]
    try:
        loop.train(both(folder, state))
    except loop.Interrupted:
        return
    finally:
        Stage.backward = original  # type: ignore[method-assign]
    raise AssertionError("the job was not interrupted")


def _keep(folder: Path, name: str, trained: loop.Job) -> None:
    if parallel.first():
        tensors = {k: v for k, v in weights(trained).items() if k != "lm_head.weight"}  # tied
        save_file(tensors, str(folder / "many" / f"{name}.safetensors"))
        text = json.dumps(untimed(trained.records))
        (folder / "many" / f"{name}.json").write_text(text)


def _pieces(folder: Path) -> dict[str, float]:
    """Share of the weights of each model that this process holds."""
    shared = JOBS["teacher"](folder)
    held = {}
    with parallel.sharded(shared):
        for name in ("student", "base", "teacher"):
            weights = list(getattr(shared, name).parameters())
            mine = sum(weight.to_local().numel() for weight in weights)
            held[name] = mine / sum(weight.numel() for weight in weights)
    return held


def main() -> None:
    """All jobs, in the processes of torchrun."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    with parallel.processes("cpu"):
        for name, make in JOBS.items():
            trained = make(folder)
            loop.train(trained)
            _keep(folder, name, trained)
        interrupt(folder, folder / "two")
        trained = both(folder, folder / "one")
        loop.train(trained)
        assert trained.resumed == 1
        _keep(folder, "resumed", trained)
        name = f"pieces{parallel.rank()}.json"
        (folder / "many" / name).write_text(json.dumps(_pieces(folder)))
        said = {}
        for name, make in REFUSED.items():
            try:
                loop.train(make(folder))
            except (ValueError, FloatingPointError) as error:
                said[name] = str(error)
        (folder / "many" / f"refused{parallel.rank()}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main()
