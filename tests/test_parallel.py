"""Many processes: two of torchrun on a CPU learn what one learns, and finish each other's jobs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import parallel_driver as driver
import pytest
import torch
from distillation_fixture import random_corpus, untimed, weights
from models_fixture import MIXERS
from safetensors.torch import load_file

from rad import cli
from rad.data.isolation import unfold
from rad.distillation import loop
from rad.distillation.batches import Batches
from rad.files import write_json
from rad.placement import Placement

TOLERANCE = 1e-5


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    """The command in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launch, *command], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the driver's processes have left."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "many").mkdir()
    random_corpus(folder / "whole")
    driver.uneven_corpus(folder / "isolate")
    driver.store(folder)
    driver.interrupt(folder, folder / "one")
    done = torchrun(driver.__file__, str(folder))
    assert done.returncode == 0, done.stderr
    return folder


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for key in sorted(value) for number in _numbers(value[key])]
    if isinstance(value, list):
        return [number for entry in value for number in _numbers(entry)]
    return [float(value)] if isinstance(value, int | float) else []


def _assert_equal(folder: Path, name: str, one: loop.Job) -> None:
    """Every figure of every record, and the weights that came of them."""
    many = json.loads((folder / "many" / f"{name}.json").read_text())
    mine = untimed(one.records)
    assert len(mine) == len(many)
    for expected, found in zip(mine, many, strict=True):
        assert _numbers(found) == pytest.approx(_numbers(expected), abs=TOLERANCE)
    expected = weights(one)
    for key, value in load_file(folder / "many" / f"{name}.safetensors").items():
        torch.testing.assert_close(value, expected[key], atol=5e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def whole(folder: Path) -> loop.Job:
    """Both stages, undisturbed, in one process."""
    trained = driver.both(folder)
    loop.train(trained)
    return trained


@pytest.mark.parametrize("name", [name for name in driver.JOBS if name != "best"])
def test_two_processes_reproduce_one(folder: Path, name: str) -> None:
    one = driver.JOBS[name](folder)
    loop.train(one)
    _assert_equal(folder, name, one)


def test_documents_make_different_work_for_the_two_processes(folder: Path) -> None:
    """Otherwise the jobs on isolated documents above would not show that they wait rightly."""
    job = driver.JOBS["isolated"](folder)
    batches = Batches(job.corpus, 6, job.seed)
    uneven = 0
    for step in range(3):
        for part in batches.batch(step).split(2):
            mine = [part.dealt(number, 2) for number in (0, 1)]
            first, second = (len(unfold(rows.tokens, rows.boundaries)) for rows in mine)
            uneven += first != second
    assert uneven


def test_a_job_of_one_process_is_finished_by_two(folder: Path, whole: loop.Job) -> None:
    _assert_equal(folder, "resumed", whole)


def test_a_job_of_two_processes_is_finished_by_one(folder: Path, whole: loop.Job) -> None:
    (saved,) = (folder / "two").iterdir()
    assert saved.name == "stage01-step000000003"
    second = driver.both(folder, folder / "two")
    loop.train(second)
    assert second.resumed == 1
    expected = weights(whole)
    for mine, theirs in zip(untimed(whole.records), untimed(second.records), strict=True):
        assert _numbers(theirs) == pytest.approx(_numbers(mine), abs=TOLERANCE)
    for key, value in weights(second).items():
        torch.testing.assert_close(value, expected[key], atol=5e-5, rtol=1e-5)


def test_the_best_weights_are_those_of_one_process(folder: Path) -> None:
    one = driver.JOBS["best"](folder)
    loop.train(one)
    files = [load_file(folder / f"best{count}" / loop.BEST) for count in (1, 2)]
    assert files[0].keys() == files[1].keys()
    for name, value in files[0].items():
        torch.testing.assert_close(files[1][name], value, atol=5e-5, rtol=1e-5)


def test_each_process_holds_a_piece_of_every_model(folder: Path) -> None:
    held = [json.loads((folder / "many" / f"pieces{i}.json").read_text()) for i in (0, 1)]
    for name in ("student", "base", "teacher"):
        shares = [each[name] for each in held]
        assert sum(shares) == pytest.approx(1.0)
        assert max(shares) < 0.6


def test_what_cannot_be_shared_is_refused_in_every_process(folder: Path) -> None:
    for number in (0, 1):
        said = json.loads((folder / "many" / f"refused{number}.json").read_text())
        assert said["rows"].startswith("stage kl: micro-batches of 1 rows cannot be dealt out to 2")
        assert said["compile"].startswith("`compile: true` is for one process")
        assert "not finite at step 2 of stage kl" in said["loss"]
    assert (folder / "broken" / "bad_batch.safetensors").exists()


def test_a_verb_for_one_process_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    paths = [f"--{name}={tmp_path}" for name in ("model", "corpus", "state", "output")]
    assert cli.main(["align", "--mixer={}", "--settings={}", *paths]) == 2
    assert "`rad align` runs in one process" in capsys.readouterr().err


def test_the_command_runs_under_torchrun(tmp_path: Path) -> None:
    from rad.data.corpus import build
    from rad.models import sources
    from rad.settings import CorpusSettings

    settings = {"source": "nano", "tokens": 4096, "held_out_tokens": 512, "context": 64}
    tokenizer = sources.load_tokenizer("nano:base")
    build("distil", CorpusSettings.model_validate(settings), tokenizer, tmp_path / "corpus")
    base = {"name": "base", "source": "nano:base", "revision": None, "dtype": "float32"}
    recipe = {"use": "controlled", "tokens": 3 * 4 * 64, "log_points": 1, "keep": "both"}
    spec = {
        "run": "small",
        "base": base,
        "teacher": {**base, "name": "self"},
        "budget": {"layers": 2},
        "mixer": {"name": "mamba2", **MIXERS["mamba2"]},
        "initialisation": "qkvo",
        "recipe": {"name": "kl", "override": {"all": {"batch_size": 4}}, **recipe},
        "seed": 0,
    }
    write_json(tmp_path / "spec.json", spec)
    kept = [1, 5]
    placement = Placement.from_layers(
        kept, layers=8, heads=4, kv_heads=2, base="base", selector="uniform"
    )
    placement.save(tmp_path / "placement.json")
    inputs = ["distil", f"--spec={tmp_path / 'spec.json'}", f"--corpus={tmp_path / 'corpus'}"]
    inputs.append(f"--placement={tmp_path / 'placement.json'}")
    curves = []
    for name in ("one", "two"):
        run = [*inputs, f"--state={tmp_path / name / 'state'}", f"--output={tmp_path / name}"]
        if name == "one":
            assert cli.main(run) == 0
        else:
            done = torchrun("-m", "rad", *run)
            assert done.returncode == 0, done.stderr
        lines = (tmp_path / name / "curve.jsonl").read_text().splitlines()
        curves.append(untimed([json.loads(line) for line in lines]))
        assert not (tmp_path / name / "state").exists()
    for mine, theirs in zip(*curves, strict=True):
        assert _numbers(theirs) == pytest.approx(_numbers(mine), abs=TOLERANCE)
    for which in ("model", "best"):
        one, two = (sources.load(str(tmp_path / name / which)) for name in ("one", "two"))
        assert type(one) is type(two)
        expected = one.state_dict()
        for key, value in two.state_dict().items():
            torch.testing.assert_close(value, expected[key], atol=5e-5, rtol=1e-5)
