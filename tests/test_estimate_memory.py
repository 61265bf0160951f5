"""The memory model against measured peaks of the real loop: within 15 %.

Measured are live tensors by the allocator's records, over whole training jobs with AdamW and the
chunked loss: on the nano base, and on one decoder layer of Llama-3.2-3B's and Llama-3.1-8B's width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from estimate_fixture import both, measured_peak, random_corpus
from transformers import AutoConfig, LlamaForCausalLM

from rad.distillation import loop
from rad.estimate import flops
from rad.estimate.activations import Precision, kept
from rad.estimate.memory import Memory, Step, host, moments, peak
from rad.estimate.shapes import Model, Shape, load_shape, table
from rad.models import sources
from rad.settings import MIXER_SETTINGS, StageSettings

CLOSE = 0.15


def nano() -> Any:
    """The nano base with weights that the allocator knows of, not a mapped file."""
    base = sources.load("nano:base").requires_grad_(False)
    for parameter in base.parameters():
        parameter.data = parameter.data.clone()
    return base


def one_layer(name: str, dtype: torch.dtype) -> Any:
    """One layer of full width with a small vocabulary."""
    values = {k: v for k, v in table()[name].items() if k != "model_type"}
    values |= {"num_hidden_layers": 1, "vocab_size": 4096}
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        base = LlamaForCausalLM(AutoConfig.for_model("llama", **values))
    finally:
        torch.set_default_dtype(before)
    return base.eval().requires_grad_(False)


def compare(
    folder: Path,
    make: Any,
    mixer: str,
    kept_heads: list[tuple[int, int]],
    stage: StageSettings,
    time: int,
    **options: Any,
) -> float:
    """Estimated peak over measured peak of a job of two steps."""
    corpus = random_corpus(folder / "corpus", time, 512)
    settings = MIXER_SETTINGS[mixer]().model_dump()
    found: dict[str, Any] = {}

    def build() -> loop.Job:
        base = make()
        student, found["student"], found["base"] = both(base, settings, kept_heads)
        found["dtype"] = str(base.dtype).removeprefix("torch.")
        return loop.Job(
            student=student,
            base=base,
            teacher=base,
            corpus=corpus,
            stages=[stage],
            seed=0,
            log_points=1,
            **options,
        )

    measured = measured_peak(build, loop.train)
    student: Model = found["student"]
    trained = flops.trainable(student, stage)
    step = Step(
        student,
        found["base"],
        frozenset(trained),
        stage.batch_size // stage.accumulate,
        time,
        Precision(found["dtype"], options.get("autocast", False)),
        loss=stage.loss,
        unit=stage.unit,
        accumulated=stage.accumulate > 1,
        checkpointing=options.get("activation_checkpointing", False),
        first=_first(student, trained) if stage.loss == "kl" else 0,
        measured=False,
        device="cpu",
    )
    best = peak(step)
    print(f"{mixer} {stage.loss} {stage.trainable} {options}: {best.total / measured:.3f}")
    return best.total / measured


def _first(student: Model, trained: set[str]) -> int:
    names = flops.trained_by_layer(trained, len(student.layers))
    if "model.embed_tokens.weight" in trained:
        return 0
    moved = (i for i, n in enumerate(names) if n or student.layers[i].mixer is not None)
    return next(moved, len(names))


NANO: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("mamba2", {"loss": "kl", "trainable": "all"}, {}),
    ("mamba2", {"loss": "kl", "trainable": "all"}, {"activation_checkpointing": True}),
    ("mamba2", {"loss": "kl", "trainable": "mixers"}, {}),
    ("mamba2", {"loss": "kl", "trainable": "all", "accumulate": 2}, {}),
    ("mamba2", {"loss": "align", "trainable": "mixers"}, {}),
    ("mamba2", {"loss": "align", "trainable": "all", "unit": "layer"}, {}),
    ("discrete_mamba2", {"loss": "kl", "trainable": "all"}, {}),
    ("gated_deltanet", {"loss": "kl", "trainable": "mixers"}, {}),
    ("gated_deltanet", {"loss": "align", "trainable": "mixers"}, {}),
    ("gla", {"loss": "kl", "trainable": "all"}, {}),
    ("mamba", {"loss": "kl", "trainable": "mixers"}, {}),
    ("longhorn", {"loss": "kl", "trainable": "all"}, {}),
    ("sliding_window", {"loss": "kl", "trainable": "all"}, {}),
    ("skip", {"loss": "kl", "trainable": "all"}, {}),
]
QUICK = [NANO[0], NANO[2], NANO[5], NANO[12], NANO[13]]


@pytest.mark.parametrize(
    ("mixer", "stage", "options"),
    [
        # the profiler notes every operation of a mixer's loop over chunks or steps
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in NANO
    ],
)
def test_peak_at_nano(
    tmp_path: Path, mixer: str, stage: dict[str, Any], options: dict[str, Any]
) -> None:
    rows, time = 8, 128
    shape = load_shape("nano:base")
    softmax = [(layer, head) for layer in (2, 5) for head in range(shape.heads)]
    settings = StageSettings(tokens=2 * rows * time, batch_size=rows, **stage)
    ratio = compare(tmp_path, nano, mixer, softmax, settings, time, **options)
    assert ratio == pytest.approx(1, abs=CLOSE)


@pytest.mark.skipif(
    not torch.cpu._is_amx_tile_supported(), reason="autocast is on only where bfloat16 is fast"
)
def test_peak_at_nano_with_autocast(tmp_path: Path) -> None:
    settings = StageSettings(tokens=2 * 8 * 128, batch_size=8)
    ratio = compare(tmp_path, nano, "mamba2", [], settings, 128, autocast=True)
    assert ratio == pytest.approx(1, abs=CLOSE)


WIDE = [
    ("meta-llama/Llama-3.2-3B", torch.float32, "mamba2", "kl", "all"),
    ("meta-llama/Llama-3.2-3B", torch.float32, "gated_deltanet", "kl", "mixers"),
    ("meta-llama/Llama-3.2-3B", torch.float32, "mamba2", "align", "mixers"),
    ("meta-llama/Llama-3.1-8B", torch.bfloat16, "mamba2", "kl", "all"),
    ("meta-llama/Llama-3.1-8B", torch.bfloat16, "discrete_mamba2", "kl", "mixers"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype", "mixer", "loss", "trainable"), WIDE)
def test_peak_of_a_full_width_layer(
    tmp_path: Path, name: str, dtype: torch.dtype, mixer: str, loss: Any, trainable: str
) -> None:
    rows, time = 4, 256
    settings = StageSettings(
        loss=loss, trainable=trainable, tokens=2 * rows * time, batch_size=rows
    )
    ratio = compare(tmp_path, lambda: one_layer(name, dtype), mixer, [], settings, time)
    assert ratio == pytest.approx(1, abs=CLOSE)


# --- what the model says of larger jobs -----------------------------------------------------


def step(**changes: Any) -> Step:
    """Mixers of an 8B student, 8k tokens."""
    shape = Shape.of(table()["meta-llama/Llama-3.1-8B"])
    student = Model(shape, ((),) * shape.layers, MIXER_SETTINGS["mamba2"]().model_dump())
    trained = flops.matching(student, changes.pop("trainable", "mixers"))
    values = {"rows": 2, "time": 4096, "precision": Precision("bfloat16"), "measured": False}
    return Step(student, Model(shape), frozenset(trained), **{**values, **changes})


def test_frozen_weights_are_held_once() -> None:
    mixers, everything = peak(step()), peak(step(trainable="all"))
    one = Model(Shape.of(table()["meta-llama/Llama-3.1-8B"])).weight_bytes("bfloat16")
    assert mixers.teacher == one
    assert mixers.weights < 0.3 * one  # the new parameters
    assert everything.weights > one
    assert everything.optimiser == pytest.approx(2 * everything.weights)


def test_every_remedy_saves_memory() -> None:
    plain = peak(step(trainable="all"))
    for change in (
        {"checkpointing": True},
        {"rows": 1},
        {"gpus": 2, "rows": 1},
    ):
        assert peak(step(trainable="all", **change)).total < plain.total, change
    wide = peak(step(trainable="all", precision=Precision("float32")))
    assert plain.total < 0.7 * wide.total


def test_a_live_teacher_costs_its_weights_and_a_stored_one_nothing() -> None:
    large = Model(Shape.of(table()["meta-llama/Llama-3.1-70B"]))
    live = peak(step(teacher=large, teacher_dtype="bfloat16"))
    stored = peak(step())
    assert live.teacher - stored.teacher == large.weight_bytes("bfloat16")


def test_many_gpus_hold_pieces_from_the_start() -> None:
    many = {moment.phase: moment for moment in moments(step(trainable="all", gpus=8, rows=1))}
    alone = {moment.phase: moment for moment in moments(step(trainable="all", rows=1))}
    assert many["loss"].optimiser == alone["loss"].optimiser / 8
    assert "load" in alone and "load" not in many
    assert host(step(trainable="all", gpus=8, rows=1)) == 8 * alone["load"].total


def test_checkpointing_keeps_one_tensor_per_layer() -> None:
    by_phase = {moment.phase: moment for moment in moments(step(checkpointing=True))}
    shape = Shape.of(table()["meta-llama/Llama-3.1-8B"])
    tokens = 2 * 4096
    inputs = tokens * shape.hidden * 2 * (shape.layers - 1)  # nothing reaches the first one's
    norm = tokens * shape.hidden * 4
    assert by_phase["loss"].activations == pytest.approx(inputs + norm, rel=0.05)


def test_what_is_kept_grows_with_what_is_trained() -> None:
    model = step().student
    layer, precision = model.layers[0], Precision("bfloat16")
    names = flops.trained_by_layer(flops.matching(model, "mixers"), 32)[0]
    few, _ = kept(layer, precision, 4096, names.__contains__, True)
    more, _ = kept(layer, precision, 4096, lambda name: True, True)
    nothing, reaches = kept(layer, precision, 4096, lambda name: False, False)
    assert nothing.total == 0 and not reaches
    assert 0 < few.total < more.total
    assert isinstance(peak(step()), Memory)
