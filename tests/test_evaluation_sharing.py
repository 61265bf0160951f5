"""A suite in two processes of torchrun: the bytes of one, and failures that all of them report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sharing_driver as driver
from evaluation_fixture import NANO, handmade_tasks

from rad.evaluation.build import build_tasks
from rad.files import write_json
from rad.settings import EvaluationSettings

TIMES = ("seconds", "processes")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Greedy, sampled, choice and perplexity tasks, more batches than processes."""
    root = tmp_path_factory.mktemp("sharing")
    (root / "text.txt").write_text("Ann has 12 hats and 7 pens. " * 60)
    settings = EvaluationSettings.model_validate(
        {
            "max_length": 200,
            "probe_samples": 0,
            "tasks": {
                "gsm_nano": {"kind": "gsm_nano", "samples": 40, "max_new_tokens": 5},
                "crux_nano": {"kind": "crux_nano", "samples": 7, "max_new_tokens": 8},
                "text": {
                    "kind": "perplexity",
                    "samples": 7,
                    "files": ["text.txt"],
                    "lengths": [48],
                },
            },
        }
    )
    built = build_tasks(settings, str(NANO), root / "tasks", root)
    handmade_tasks(root / "tasks")
    manifest = json.loads((root / "tasks" / "manifest.json").read_text())
    manifest["tasks"] = built["tasks"] + manifest["tasks"]
    write_json(root / "tasks" / "manifest.json", manifest)
    return root / "tasks"


@pytest.fixture(scope="module")
def folder(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have left."""
    folder = tmp_path_factory.mktemp("shared")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, driver.__file__, str(tasks), str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "new tokens" not in done.stderr, "the second process shows no progress"
    return folder


def _untimed(evaluation: dict[str, Any]) -> dict[str, Any]:
    about = {key: value for key, value in evaluation["rad"].items() if key not in TIMES}
    return {**evaluation, "rad": about}


@pytest.mark.parametrize("name", list(driver.MODELS))
def test_two_processes_write_the_bytes_of_one(
    tasks: Path, folder: Path, name: str, tmp_path: Path
) -> None:
    one = driver.scored(name, tasks, tmp_path)
    many = json.loads((folder / "many" / name / "evaluation.json").read_text())
    assert _untimed(many) == _untimed(one)
    assert (many["rad"]["processes"], one["rad"]["processes"]) == (2, 1)
    written = (folder / "many" / name / "samples.jsonl").read_bytes()
    assert written == (tmp_path / "samples.jsonl").read_bytes()
    assert len(written.splitlines()) == 40 + 7 + 7 + 5 + 5
    for number in (0, 1):
        returned = json.loads((folder / f"returned_{name}_{number}.json").read_text())
        assert returned == many


def test_a_failure_is_known_to_all(folder: Path) -> None:
    first, second = (json.loads((folder / f"failed{i}.json").read_text()) for i in (0, 1))
    assert second["generating"] == "RuntimeError: out of memory"
    assert first["generating"] == "PeerError: process 1: RuntimeError('out of memory')"
    assert first["scoring"] == "RuntimeError: out of memory"
    assert second["scoring"] == "PeerError: process 0: RuntimeError('out of memory')"
    assert "nowhere/manifest.json: no such file" in second["tasks"]
    assert first["tasks"] == f"PeerError: process 1: {second['tasks'].split(': ', 1)[1]}"
    assert "differ in documents or batch size" in first["batch"]
    assert "differ in documents or batch size" in second["batch"]
    assert not (folder / "failed" / "evaluation.json").exists()
    assert not (folder / "failed" / "samples.jsonl").exists()


def test_the_processes_can_go_on_after_a_failure(folder: Path) -> None:
    for number in (0, 1):
        assert json.loads((folder / f"failed{number}.json").read_text())["after"] == "no error"
    after = (folder / "after" / "samples.jsonl").read_bytes()
    assert after == (folder / "many" / "llama" / "samples.jsonl").read_bytes()


def test_processes_that_have_not_joined_are_refused(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="have not joined"):
        driver.scored("llama", tasks, tmp_path)
