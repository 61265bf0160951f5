"""Interruption: killed, stopped and crashed jobs go on to the very weights and curve."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_fixture import job, random_corpus, untimed, weights
from models_fixture import MIXERS, base_model, placement

from rad.data.corpus import Corpus
from rad.distillation import loop
from rad.distillation import state as states
from rad.distillation.stages import Stage
from rad.models.convert import convert


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return random_corpus(tmp_path / "corpus")


def _at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Call `act` before the given step of the whole job is computed."""
    original, count = Stage.backward, 0

    def backward(self: Stage, batch: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            act()
        return original(self, batch)

    monkeypatch.setattr(Stage, "backward", backward)


def _assert_same(whole: loop.Job, other: loop.Job) -> None:
    expected, found = weights(whole), weights(other)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    assert untimed(whole.records) == untimed(other.records)


def _interrupted(corpus: Corpus, state: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Leave states behind: one of every step up to `at`, where the job is asked to stop."""
    with monkeypatch.context() as patch:
        _at_step(patch, at, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(loop.Interrupted, match="state saved"):
            loop.train(job(corpus, state, save_every_seconds=0.0))


@pytest.mark.parametrize("stop_at", [2, 4, 7])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    whole = job(corpus)
    loop.train(whole)
    _interrupted(corpus, tmp_path / "state", monkeypatch, stop_at)
    second = job(corpus, tmp_path / "state")
    loop.train(second)
    assert second.resumed == 1
    _assert_same(whole, second)


def test_a_job_killed_at_random_moments_ends_as_if_nothing_had_happened(
    corpus: Corpus, tmp_path: Path
) -> None:
    driver = Path(__file__).with_name("resume_driver.py")
    done = subprocess.run(
        [sys.executable, str(driver), str(corpus.folder), str(tmp_path), "6", "5"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    for name in ("weights.safetensors", "curve.json"):
        one, two = ((tmp_path / kind / name).read_bytes() for kind in ("whole", "killed"))
        assert one == two, name


def test_a_signal_saves_and_goes_on(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    trained = job(corpus, tmp_path / "state", save_every_seconds=3600.0)
    loop.train(trained)
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["stage00-step000000003"]


def _truncate(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def _flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [_truncate, _flip_a_bit, Path.unlink])
@pytest.mark.parametrize("file", ["tensors.safetensors", "meta.json"])
def test_a_damaged_newest_state_is_passed_over_for_the_older_one(
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], None],
    file: str,
) -> None:
    state = tmp_path / "state"
    _interrupted(corpus, state, monkeypatch, 3)
    older, newest = sorted(state.iterdir())
    damage(newest / file)
    found = states.latest(state, "owner")
    assert found is not None
    assert found["path"] == older
    said = capsys.readouterr().err
    assert f"{newest}: unreadable state" in said
    assert f"going on from {older.name}" in said
    damage(older / file)
    with pytest.raises(states.StateError, match=r"unreadable state .* to start anew"):
        states.latest(state, "owner")


def test_a_run_resumed_from_the_older_state_ends_the_same(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = job(corpus)
    loop.train(whole)
    _interrupted(corpus, tmp_path / "state", monkeypatch, 6)
    _truncate(sorted((tmp_path / "state").iterdir())[-1] / "tensors.safetensors")
    second = job(corpus, tmp_path / "state", save_every_seconds=0.0)
    loop.train(second)
    _assert_same(whole, second)


def test_a_foreign_state_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    student = job(corpus).student
    states.save(tmp_path / "s", student, None, [], {"digest": "owner", "stage": 0, "step": 1})
    with pytest.raises(states.StateError, match="another specification"):
        states.latest(tmp_path / "s", "somebody else")


def test_a_state_of_another_student_does_not_fit(corpus: Corpus, tmp_path: Path) -> None:
    student = job(corpus).student
    saved = states.save(tmp_path, student, None, [], {"digest": "d", "stage": 0, "step": 1})
    other = convert(base_model(), placement("none"), MIXERS["mamba2"], "qkvo")
    with pytest.raises(states.StateError, match="corrupt state"):
        states.restore(saved, other, None, [])


def test_only_the_newest_states_are_kept_and_leftovers_go(tmp_path: Path) -> None:
    student = convert(base_model(), placement("layer"), MIXERS["mamba2"], "qkvo")
    (tmp_path / ".saving-of-a-killed-job").mkdir()
    for step in (1, 2, 30):
        states.save(tmp_path, student, None, [], {"digest": "d", "stage": 0, "step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "stage00-step000000002",
        "stage00-step000000030",
    ]


@contextmanager
def _file_size_limit(size: int) -> Iterator[None]:
    """Within the block no file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_breaks_nothing(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = job(corpus)
    loop.train(whole)
    state = tmp_path / "state"
    _interrupted(corpus, state, monkeypatch, 5)
    before = {path: path.stat().st_size for path in state.rglob("*")}
    with _file_size_limit(4096), pytest.raises(states.StateError) as caught:
        loop.train(job(corpus, state, save_every_seconds=0.0))
    assert str(caught.value).startswith(f"{state}: no space left on the disk; free some")
    assert {path: path.stat().st_size for path in state.rglob("*")} == before
    second = job(corpus, state)
    loop.train(second)
    _assert_same(whole, second)


def test_a_full_disk_is_named_when_results_are_written(tmp_path: Path) -> None:
    from rad.files import write_text

    with (
        _file_size_limit(4096),
        pytest.raises(states.StateError, match="no space left on the disk"),
        states.space(tmp_path, "the job goes on"),
    ):
        write_text(tmp_path / "curve.jsonl", "x" * 5000)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError), states.space(tmp_path, "the job goes on"):
        (tmp_path / "absent").read_text()


def test_the_best_weights_survive_an_interruption(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def curve(name: str) -> Any:
        values = iter([9.0, 5.0, 4.0, 3.0, 7.0] if name == "whole" else [9.0, 5.0, 4.0])
        later = iter([3.0, 7.0])

        def measure(_student: Any) -> dict[str, Any]:
            value = next(values, None)
            return {"held_out_kl": next(later) if value is None else value}

        return measure

    whole = job(corpus, tmp_path / "whole", keep_best=True, measure=curve("whole"))
    loop.train(whole)
    assert whole.best["held_out_kl"] == 3.0
    assert (whole.best["stage"], whole.best["step"]) == (1, 4)
    again = job(corpus)
    states.load_weights(tmp_path / "whole" / loop.BEST, again.student)
    measure = curve("interrupted")
    with monkeypatch.context() as patch:
        _at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(loop.Interrupted):
            loop.train(job(corpus, tmp_path / "state", keep_best=True, measure=measure))
    second = job(corpus, tmp_path / "state", keep_best=True, measure=measure)
    loop.train(second)
    assert second.best == whole.best
    found = job(corpus)
    states.load_weights(tmp_path / "state" / loop.BEST, found.student)
    expected = weights(again)
    assert all(torch.equal(value, expected[name]) for name, value in weights(found).items())
    assert not all(torch.equal(value, expected[name]) for name, value in weights(whole).items())
