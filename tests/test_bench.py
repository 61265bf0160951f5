"""`rad bench` and `rad suites` as a user calls them, in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rad.cli import main
from rad.commands.bench import _table

TASKS: dict[str, Any] = {
    "gsm_hard": None,
    "crux_hard": None,
    "ruler_nano": {"lengths": [64], "subtasks": ["single", "vt"]},
    "real": {"kind": "gsm_zeroeval", "missing": "row"},
    "kv_retrieval": {"kind": "kv_retrieval", "pairs": 4, "samples": 3, "max_new_tokens": 4},
}


def command(output: Path) -> list[str]:
    options = ["--suite", "nano", "--tasks", json.dumps(TASKS), "--samples", "9", "--offline"]
    return ["bench", "nano:base", *options, "--batch-size", "4", "--output", str(output)]


def test_two_processes_give_the_bytes_of_one(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAD_DEVICE": "cpu"}
    one, two = tmp_path / "one", tmp_path / "two"
    start = [sys.executable, "-m", "rad"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    several = [*torchrun, "--nproc-per-node", "2", "-m", "rad"]
    said = []
    for launch, output in ((start, one), (several, two)):
        done = subprocess.run(
            [*launch, *command(output)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert (one / "samples.jsonl").read_bytes() == (two / "samples.jsonl").read_bytes()
    assert said[0] == said[1] and said[0].count("missing data") == 1
    # every line has its interval and n
    for line in said[0].splitlines()[1:-1]:
        assert line.split()[-1] in ("9", "3") and "[" in line, line
    results = [json.loads((out / "evaluation.json").read_text()) for out in (one, two)]
    assert results[0]["results"] == results[1]["results"]
    assert [each["rad"]["processes"] for each in results] == [1, 2]


def test_a_dry_run_says_what_it_would_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command(tmp_path), "--dry-run"]) == 0
    table = capsys.readouterr().out
    assert "prompt tokens" in table and "total" in table
    assert not (tmp_path / "evaluation.json").exists()


def test_a_typo_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "nano:base", "--suite", "zeroevl", "--output", str(tmp_path)]
    assert main(arguments) == 2
    assert "did you mean zeroeval" in capsys.readouterr().err


def test_data_that_came_later_are_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def built() -> dict[str, Any]:
        tasks = {"swde": {"kind": "swde", "max_new_tokens": 4}}
        options = ["--tasks", json.dumps(tasks), "--offline", "--data", str(tmp_path / "data")]
        assert main(["bench", "nano:base", *options, "--output", str(tmp_path), "--dry-run"]) == 0
        manifest = json.loads((tmp_path / "tasks" / "manifest.json").read_text())
        return dict(manifest["tasks"][0])

    assert built()["status"] == "missing"
    stamp = tmp_path / "tasks" / "made_of.json"
    file = tmp_path / "data" / "swde" / "validation.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"text": "Name: Ada Born:", "key": "Born", "value": "1815"}) + "\n")
    assert built()["status"] == "ready"
    before = stamp.stat().st_mtime_ns
    assert built()["status"] == "ready" and stamp.stat().st_mtime_ns == before  # kept
    file.write_text(file.read_text() * 2)
    assert built()["samples"] == 2


def test_the_table_reads_any_text(tmp_path: Path) -> None:
    row = {"task": "it", "metrics": {"exact_match": 1.0}, "response": "a\u2028b\u0085c"}
    samples = tmp_path / "samples.jsonl"
    samples.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    tasks = {"it": {"metric": "exact_match", "metrics": ["exact_match"]}}
    table = _table({"rad": {"tasks": tasks, "missing": {}}}, samples)
    assert table.splitlines()[1].split()[:3] == ["it", "exact_match", "1.0000"]


def test_suites_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites", "--data", str(tmp_path)]) == 0
    listed = capsys.readouterr().out
    assert "crux_zeroeval" in listed and "(missing; hub hazyresearch/based-fda)" in listed
