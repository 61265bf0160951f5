"""A random corpus in the format of the contract, and small distillation jobs on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from models_fixture import MIXERS, base_model, placement

from rad.data.corpus import Corpus
from rad.distillation import loop
from rad.distillation.measure import HeldOut
from rad.files import write_json
from rad.models.convert import convert
from rad.settings import StageSettings

CONTEXT = 24
ROWS = {"train": 40, "held_out": 6}


def random_corpus(folder: Path, packing: str = "whole") -> Corpus:
    """Random rows of `CONTEXT` tokens with weights; with `isolate`, two documents in each."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, rows in ROWS.items():
        shape = (rows, CONTEXT)
        generator.integers(3, 96, shape).astype("<u2").tofile(folder / f"{split}.bin")
        weights = generator.choice([26, 255], shape).astype(np.uint8)
        boundaries = np.zeros(shape, dtype=np.uint8)
        boundaries[:, 0] = 1
        if packing == "isolate":
            second = generator.integers(6, CONTEXT - 6, rows)
            boundaries[np.arange(rows), second] = 1
            weights[boundaries == 1] = 0
        weights.tofile(folder / f"{split}_weight.bin")
        boundaries.tofile(folder / f"{split}_boundary.bin")
    write_json(
        folder / "manifest.json",
        {
            "context": CONTEXT,
            "dtype": "<u2",
            "packing": packing,
            "settings_sha256": "x",
            "splits": {split: {"rows": rows} for split, rows in ROWS.items()},
        },
    )
    return Corpus(folder)


def tokens_of(steps: int, batch_size: int = 4) -> int:
    """Tokens that so many steps are."""
    return steps * batch_size * CONTEXT


def two_stages() -> list[StageSettings]:
    """Four steps of alignment and eight of forward KL."""
    return [
        StageSettings(loss="align", tokens=tokens_of(4), batch_size=4),
        StageSettings(tokens=tokens_of(8), batch_size=4, learning_rate=1e-3),
    ]


def job(corpus: Corpus, state: Path | None = None, kind: str = "mixed", **changes: Any) -> loop.Job:
    """A job on a small base; `kind` is a placement, `mixer` a mixer's name."""
    base = base_model()
    base.requires_grad_(False)
    mixer = MIXERS[changes.pop("mixer", "mamba2")]
    settings: dict[str, Any] = {
        "student": convert(base, placement(kind), mixer, "qkvo"),
        "base": base,
        "teacher": base,
        "stages": two_stages(),
        "measure": HeldOut(corpus, base, rows=4),
        "log_points": 2,
        "digest": "owner",
    }
    return loop.Job(corpus=corpus, seed=3, state=state, **{**settings, **changes})


def weights(trained: loop.Job) -> dict[str, torch.Tensor]:
    """A copy of the student's weights."""
    return {name: value.clone() for name, value in trained.student.state_dict().items()}


# a record of the curve but for what the clock and the machine say
TIMED = ("seconds", "tokens_per_second", "model_flops_per_second", "peak_memory_mib")


def untimed(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The curve without wall time, speed and memory."""
    return [{k: v for k, v in record.items() if k not in TIMED} for record in records]
