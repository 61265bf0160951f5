"""Devices dealt out to jobs, with made-up ids: no GPU is needed, the locks are the real ones."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rad import gpu

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 30.0


@pytest.fixture(autouse=True)
def two_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", gpu.HELD):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(gpu.ALLOWED, "0,1")
    monkeypatch.setenv(gpu.LOCKS, str(tmp_path / "locks"))


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes of a test; none outlives it."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def _command(count: int, *command: str) -> list[str]:
    return [sys.executable, "-m", "rad", "gpu-run", "--gpus", str(count), "--", *command]


def _job(
    started: list[subprocess.Popen[str]], count: int, script: str = "exec sleep 60"
) -> subprocess.Popen[str]:
    """A job that says which devices it sees, then does as the script says."""
    command = _command(count, "sh", "-c", f"echo $CUDA_VISIBLE_DEVICES; {script}")
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    started.append(process)
    return process


def _seen(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    return process.stdout.readline().strip().split(",")


def _waits(process: subprocess.Popen[str]) -> None:
    """Returns once the job has said that it waits."""
    assert process.stderr is not None
    assert "waiting for" in process.stderr.readline()


def test_jobs_side_by_side_get_distinct_devices(started: list[subprocess.Popen[str]]) -> None:
    first, second = _job(started, 1), _job(started, 1)
    assert sorted(_seen(first) + _seen(second)) == ["0", "1"]


def test_a_job_waits_until_a_device_is_free(started: list[subprocess.Popen[str]]) -> None:
    first, second = _job(started, 1), _job(started, 1)
    freed = _seen(first)
    _seen(second)
    third = _job(started, 1)
    _waits(third)
    assert third.poll() is None
    first.send_signal(signal.SIGTERM)
    assert _seen(third) == freed


def test_kill_9_gives_the_devices_back(started: list[subprocess.Popen[str]]) -> None:
    first = _job(started, 2)
    assert _seen(first) == ["0", "1"]
    second = _job(started, 2)
    _waits(second)
    first.kill()
    assert _seen(second) == ["0", "1"]


def test_a_device_stays_taken_while_a_child_of_the_job_uses_it(
    started: list[subprocess.Popen[str]],
) -> None:
    """The shell dies, what it started still computes: the device is not free yet."""
    first = _job(started, 2, "sleep 60 & echo $!; wait")
    _seen(first)
    child = int(_seen(first)[0])
    try:
        second = _job(started, 1)
        _waits(second)
        first.kill()
        first.wait(SECONDS)
        time.sleep(5 * gpu.POLL_SECONDS)
        assert second.poll() is None
    finally:
        os.kill(child, signal.SIGKILL)
    assert _seen(second) == ["0"]


def test_jobs_that_want_all_devices_do_not_block_each_other(
    started: list[subprocess.Popen[str]],
) -> None:
    """Each taking half and waiting for the other half would never end."""
    jobs = [_job(started, 2, "true") for _ in range(6)]
    for job in jobs:
        output, _ = job.communicate(timeout=SECONDS)
        assert (job.returncode, output) == (0, "0,1\n")


def test_a_large_job_is_not_overtaken(started: list[subprocess.Popen[str]]) -> None:
    first = _job(started, 1)
    _seen(first)
    large = _job(started, 2)
    _waits(large)
    small = _job(started, 1)  # one device is free, and the large job is before it
    _waits(small)
    first.kill()
    assert _seen(large) == ["0", "1"]
    large.kill()
    assert _seen(small) == ["0"]


def test_exit_status_and_signals_are_the_commands_own(
    started: list[subprocess.Popen[str]],
) -> None:
    done = subprocess.run(_command(1, "sh", "-c", "exit 75"), cwd=ROOT)
    assert done.returncode == 75
    trap = "trap 'echo saved; exit 3' TERM; echo ready; while :; do sleep 0.1; done"
    job = _job(started, 1, trap)
    assert [_seen(job), _seen(job)] == [["0"], ["ready"]]
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=SECONDS)
    assert (job.returncode, output) == (3, "saved\n")


def test_no_devices_means_nothing_is_touched(tmp_path: Path) -> None:
    script = "echo ${CUDA_VISIBLE_DEVICES-unset}"
    done = subprocess.run(_command(0, "sh", "-c", script), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "unset\n")
    assert not (tmp_path / "locks").exists()


@pytest.mark.parametrize(
    ("count", "environment", "message"),
    [
        (3, {}, "3 devices wanted, 2 to give (0, 1)"),
        (-1, {}, "-1 devices wanted"),
        (1, {"RAD_DEVICES": ""}, "0 to give (none)"),
        (1, {"RAD_DEVICES": "0,1,0"}, "an id occurs twice"),
        (1, {"RAD_DEVICES": "../0"}, "expected ids as 0,1,2"),
        (1, {"CUDA_VISIBLE_DEVICES": "1,2"}, "names 0, which CUDA_VISIBLE_DEVICES=1,2 hides"),
        (1, {"RAD_HELD_DEVICES": "17:0,1"}, "process 17 above already holds devices 0,1"),
    ],
)
def test_impossible_wishes_end_with_one_line(
    count: int, environment: dict[str, str], message: str
) -> None:
    done = subprocess.run(
        _command(count, "true"),
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_command_that_does_not_exist_takes_nothing() -> None:
    done = subprocess.run(_command(1, "no-such-command"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "no-such-command: command not found" in done.stderr


def test_a_job_asks_once(started: list[subprocess.Popen[str]]) -> None:
    again = " ".join(_command(1, "true"))
    holder = _job(started, 2, f"{again}; exec sleep 60")
    assert _seen(holder) == ["0", "1"]
    assert holder.stderr is not None
    assert "already holds devices 0,1: ask once" in holder.stderr.readline()
    other = _job(started, 1)  # of another shell
    _waits(other)
    holder.kill()
    assert _seen(other) == ["0"]


def test_locks_are_for_every_user_of_the_folder(
    started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    before = os.umask(0o077)
    try:
        assert _seen(_job(started, 1)) == ["0"]
    finally:
        os.umask(before)
    for name in ("queue.lock", "0.lock"):
        assert (tmp_path / "locks" / name).stat().st_mode & 0o777 == 0o666


def test_where_ids_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5f3a,1,0")
    assert gpu.known() == ["0", "1"]  # RAD_DEVICES, all of them visible
    monkeypatch.delenv(gpu.ALLOWED)
    assert gpu.known() == ["GPU-5f3a", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpu.known() == []


def test_nvidia_smi_is_asked_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(gpu.ALLOWED)
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 0; echo 1; echo 2\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert gpu.known() == ["0", "1", "2"]
    command.write_text("#!/bin/sh\necho no driver; exit 9\n")
    assert gpu.known() == []


def test_jobs_of_slurm_do_not_wait_for_each_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Slurm may number the devices of every job from 0."""
    monkeypatch.delenv(gpu.LOCKS)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = set()
    for job in ("1", "2"):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        folders.add(gpu.lock_folder())
    assert len(folders) == 2


ARGUMENTS = ["--spec", "x", "--placement", "x", "--corpus", "x", "--state", "x", "--output", "x"]


@pytest.mark.parametrize(
    ("count", "start"),
    [
        (1, [sys.executable, "-m", "rad"]),
        (2, ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rad"]),
    ],
)
def test_rad_starts_again_on_its_devices(
    count: int, start: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from rad import cli

    seen: list[list[str]] = []

    def become(_: str, command: list[str]) -> None:
        seen.append(command)
        raise SystemExit

    monkeypatch.setattr(os, "execvp", become)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    arguments = ["--gpus", str(count), "distil", *ARGUMENTS]
    with pytest.raises(SystemExit):
        cli.main(arguments)
    assert seen[0][-len(arguments) - len(start) :] == [*start, *arguments]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ",".join("01"[:count])
    assert gpu.launched()


def test_a_verb_of_the_cpu_takes_no_device() -> None:
    command = [sys.executable, "-m", "rad", "--gpus", "1", "check", "config/nano.yaml"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "this verb computes on the CPU: call it without --gpus" in done.stderr
