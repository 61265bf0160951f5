"""Losses against independent formulas, the data order, exact resume, and runs end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_fixture import MIXERS, base_model, placement, tokens

from rad.data.corpus import Corpus, CorpusError
from rad.distillation import loop, losses
from rad.distillation import state as states
from rad.distillation.batches import Batches
from rad.distillation.measure import HeldOut
from rad.distillation.optimiser import mixer_parameters, rate, set_trainable
from rad.files import write_json
from rad.models.convert import convert
from rad.settings import StageSettings

CONTEXT = 24


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Random rows in the format of the contract."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    generator = np.random.default_rng(0)
    splits = {"train": 40, "held_out": 6}
    for split, rows in splits.items():
        generator.integers(3, 96, (rows, CONTEXT)).astype("<u2").tofile(folder / f"{split}.bin")
        weights = generator.choice([26, 255], (rows, CONTEXT)).astype(np.uint8)
        weights.tofile(folder / f"{split}_weight.bin")
    write_json(
        folder / "manifest.json",
        {
            "context": CONTEXT,
            "dtype": "<u2",
            "settings_sha256": "x",
            "splits": {split: {"rows": rows} for split, rows in splits.items()},
        },
    )
    return Corpus(folder)


def _job(corpus: Corpus, state: Path | None = None, **changes: Any) -> loop.Job:
    base = base_model()
    stages = changes.pop("stages", None) or [
        StageSettings(loss="align", tokens=4 * 4 * CONTEXT, batch_size=4),
        StageSettings(tokens=8 * 4 * CONTEXT, batch_size=4, learning_rate=1e-3),
    ]
    return loop.Job(
        student=convert(base, placement("mixed"), MIXERS["mamba2"], "qkvo"),
        base=base,
        teacher=base,
        corpus=corpus,
        stages=stages,
        seed=3,
        digest="owner",
        state=state,
        measure=HeldOut(corpus, base, rows=4),
        log_points=2,
        **changes,
    )


def test_kl_is_the_textbook_formula() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(losses.token_kl(teacher, student), expected)
    assert losses.token_kl(teacher, teacher).abs().max() < 1e-6
    tau = 2.0
    p, q = (teacher / tau).softmax(-1), (student / tau).softmax(-1)
    expected = tau**2 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(losses.token_kl(teacher, student, tau), expected)


def test_losses_weigh_the_predicted_token() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(1, 4, 7), torch.randint(0, 7, (1, 4))
    weight = torch.tensor([[9.0, 0.0, 1.0, 0.0]])  # only the token at position 2 counts
    expected = -logits.log_softmax(-1)[0, 1, ids[0, 2]]
    torch.testing.assert_close(losses.ce_loss(logits, ids, weight), expected)
    other = torch.randn(1, 4, 7)
    torch.testing.assert_close(
        losses.kl_loss(other, logits, weight), losses.token_kl(other, logits)[0, 1]
    )


def test_alignment_loss_is_the_mean_distance_over_root_width() -> None:
    target, output = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    output[0, 0, 0], output[0, 1, 1] = 3.0, 5.0
    value = losses.alignment_loss(target, output, torch.ones(1, 2))
    assert value.item() == pytest.approx((3 + 5) / 2 / 2, rel=1e-5)


def test_batches_depend_on_seed_and_step_alone_and_cover_an_epoch(corpus: Corpus) -> None:
    one, two = Batches(corpus, 8, seed=1), Batches(corpus, 8, seed=1)
    for step in (6, 0, 3):
        assert torch.equal(one(step)[0], two(step)[0])
    seen = torch.cat([one(step)[0] for step in range(5)])
    rows = torch.from_numpy(corpus.rows("train").astype(np.int64))
    assert sorted(seen.tolist()) == sorted(rows.tolist())
    assert not torch.equal(Batches(corpus, 8, seed=2)(0)[0], one(0)[0])


def test_a_truncated_corpus_is_named(corpus: Corpus) -> None:
    (corpus.folder / "train.bin").write_bytes(b"12")
    with pytest.raises(CorpusError, match=r"train\.bin: expected 1920 bytes, found 2"):
        corpus.rows("train")


@pytest.mark.parametrize("schedule", ["cosine", "constant", "wsd"])
def test_schedules_warm_up_and_end_where_asked(schedule: Any) -> None:
    stage = StageSettings(tokens=1, schedule=schedule, warmup_fraction=0.1, final_fraction=0.2)
    rates = [rate(stage, step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.2, abs=0.01)


def test_only_the_mixers_train_when_asked() -> None:
    student = convert(base_model(), placement("mixed"), MIXERS["mamba2"], "qkvo")
    chosen = set_trainable(student, StageSettings(tokens=1, trainable="mixers"))
    assert set(chosen) == mixer_parameters(student)
    assert all(".self_attn." in name for name in chosen)
    assert not any(".softmax." in name or "layers.0." in name for name in chosen)
    assert any(name.endswith("layers.2.self_attn.o_proj.weight") for name in chosen)


def test_training_lowers_the_held_out_kl_and_frozen_weights_stay(corpus: Corpus) -> None:
    stage = StageSettings(
        tokens=40 * 4 * CONTEXT, batch_size=4, learning_rate=3e-3, trainable="mixers"
    )
    job = _job(corpus, stages=[stage])
    before = job.student.model.embed_tokens.weight.clone()
    records = loop.train(job)
    assert records[-1]["held_out_kl"] < 0.6 * records[0]["held_out_kl"]
    assert torch.equal(job.student.model.embed_tokens.weight, before)


def test_alignment_brings_every_layer_closer(corpus: Corpus) -> None:
    from rad.distillation.align import layer_errors

    stage = StageSettings(loss="align", tokens=40 * 4 * CONTEXT, batch_size=4, learning_rate=1e-2)
    job = _job(
        corpus,
        stages=[stage],
    )
    job.student = convert(job.base, placement("none"), MIXERS["mamba2"], "qkvo")
    before = layer_errors(job.base, job.student, corpus)
    loop.train(job)
    after = layer_errors(job.base, job.student, corpus)
    assert all(b < a for a, b in zip(before, after, strict=True))


def _weights(job: loop.Job) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in job.student.state_dict().items()}


@pytest.mark.parametrize("stop_at", [2, 4, 7])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    corpus: Corpus, tmp_path: Path, stop_at: int
) -> None:
    whole = _job(corpus)
    records = loop.train(whole)

    state = tmp_path / "state"
    first = _job(corpus, state)
    steps = 0
    original = loop._loss

    def stopping(*args: Any) -> torch.Tensor:
        nonlocal steps
        steps += 1
        if steps == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    loop._loss = stopping  # type: ignore[assignment]
    try:
        with pytest.raises(loop.Interrupted, match="state saved"):
            loop.train(first)
    finally:
        loop._loss = original

    second = _job(corpus, state)
    resumed = loop.train(second)
    assert second.resumed == 1
    for name, value in _weights(whole).items():
        assert torch.equal(value, second.student.state_dict()[name]), name
    for one, two in zip(records, resumed, strict=True):
        for key in ("step", "tokens", "train_loss", "held_out_kl", "held_out_ce"):
            assert one[key] == two[key]


def test_foreign_and_corrupt_states_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    state = tmp_path / "state"
    job = _job(corpus, state)
    saved = states.save(state, job.student, None, [], {"digest": "owner", "stage": 0, "step": 1})
    with pytest.raises(states.StateError, match="another specification"):
        states.latest(state, "somebody else")
    (saved / "tensors.safetensors").write_bytes(b"broken")
    with pytest.raises(states.StateError, match="corrupt state"):
        states.restore(saved, job.student, None, [])
    (saved / "meta.json").write_text("{")
    with pytest.raises(states.StateError, match="unreadable state"):
        states.latest(state, "owner")


def test_only_the_newest_states_are_kept(tmp_path: Path) -> None:
    job_student = convert(base_model(), placement("layer"), MIXERS["mamba2"], "qkvo")
    for step in (1, 2, 30):
        states.save(tmp_path, job_student, None, [], {"digest": "d", "stage": 0, "step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "stage00-step000000002",
        "stage00-step000000030",
    ]


def test_a_loss_that_is_no_number_stops_the_run(corpus: Corpus) -> None:
    job = _job(corpus)
    with torch.no_grad():
        job.student.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite at step"):
        loop.train(loop.Job(**{**job.__dict__, "stages": job.stages[1:], "measure": None}))


def test_aligned_mixers_are_sliced_by_head(tmp_path: Path, corpus: Corpus) -> None:
    """Starting `aligned`, the owned heads compute what the aligned full mixer computed for them."""
    from rad.distillation.run import save_aligned

    base = base_model()
    full = convert(base, placement("none"), MIXERS["mamba2"], "qkvo", seed=1)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_aligned(full, tmp_path)
    kept = placement("heads")
    hybrid = convert(base, kept, MIXERS["mamba2"], "aligned", aligned=tmp_path)
    u = torch.randn(2, 9, 32)
    for layer in range(3):
        mine, theirs = (model.model.layers[layer].self_attn.mixer for model in (hybrid, full))
        expected, _ = theirs(u)
        found, _ = mine(u)
        torch.testing.assert_close(found, expected[:, :, mine.owned])


def test_killed_jobs_leave_a_state_that_a_rerun_picks_up(tmp_path: Path) -> None:
    """`kill -9` in the middle of a real job, then the same command again."""
    from rad.models.sources import describe

    model = describe("base", {"source": "nano:base", "revision": None, "dtype": "float32"})
    write_json(tmp_path / "source.json", model)
    settings = {"source": "nano", "tokens": 32768, "held_out_tokens": 1024, "context": 64}

    def rad(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "rad", "--threads", "1", *arguments]

    subprocess.run(
        rad(
            "corpus",
            "--name",
            "distil",
            "--settings",
            json.dumps(settings),
            "--model",
            str(tmp_path / "source.json"),
            "--output",
            str(tmp_path / "corpus"),
        ),
        check=True,
    )
    spec = {
        "run": "killed",
        "base": {"name": "base", "source": "nano:base", "revision": None, "dtype": "float32"},
        "teacher": {"name": "self", "source": "nano:base", "revision": None, "dtype": "float32"},
        "budget": {"layers": 0},
        "mixer": {"name": "mamba2", **MIXERS["mamba2"]},
        "initialisation": "qkvo",
        "recipe": {
            "name": "kl",
            "save_every_seconds": 0.001,
            "log_points": 1,
            "stages": [{"tokens": 32768, "batch_size": 8}],
        },
        "seed": 0,
    }
    write_json(tmp_path / "spec.json", spec)
    nothing = {"base": "base", "selector": "uniform", "softmax": [], "schema": 1}
    shape = {key: model[key] for key in ("layers", "heads", "kv_heads")}  # type: ignore[index]
    write_json(tmp_path / "placement.json", nothing | shape)
    command = rad(
        "distil",
        "--spec",
        str(tmp_path / "spec.json"),
        "--placement",
        str(tmp_path / "placement.json"),
        "--corpus",
        str(tmp_path / "corpus"),
        "--state",
        str(tmp_path / "state"),
        "--output",
        str(tmp_path / "run"),
    )
    first = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while first.poll() is None and not list((tmp_path / "state").glob("stage*")):
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert list((tmp_path / "state").glob("stage*")), "the job ended before it saved a state"
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "resumed at" in again.stderr
    assert json.loads((tmp_path / "run" / "training.json").read_text())["resumed"] == 1
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert not (tmp_path / "state").exists()


def test_the_step_zero_record_of_a_skip_student_is_the_skip_models_kl(corpus: Corpus) -> None:
    base = base_model()
    held_out = HeldOut(corpus, base, rows=4)
    zero = convert(base, placement("layer"), MIXERS["mamba2"], "zero")
    skip = convert(base, placement("layer"), MIXERS["skip"], "qkvo")
    assert held_out(zero)["held_out_kl"] == pytest.approx(held_out(skip)["held_out_kl"], rel=1e-4)
    assert held_out(base)["held_out_kl"] == pytest.approx(0.0, abs=1e-6)
    assert tokens().shape == (2, 21)
