"""`make test-slurm`: the shrunk default study on a real Slurm, disturbed, equals the local run.

1. The study runs locally, in a copy of the project.
2. It runs in another copy through `workflow/profiles/slurm`, on a Slurm of one node that is
   installed (Debian's packages) and started for it, see cluster.py. Three training jobs are hit in
   the middle, once they have saved a state: one by `scancel`, one by `kill -9` of its process,
   one by the warning before its time limit. Each has to go on from its state in the next attempt.
3. Weights, scores, samples, placements and curves of both are compared.
4. GPU jobs: distinct devices, several to one job, torchrun (on CPUs: the devices are no GPUs).

Takes about twenty minutes on two cores. Skipped, saying why, where Slurm cannot be had.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from cluster import Unavailable, cluster, install
from compare import differences

ROOT = Path(__file__).resolve().parents[2]
PROFILE = ROOT / "workflow" / "profiles" / "slurm" / "profile.yaml"
STUDY = ["config/nano.yaml", "config/smoke.yaml", "tests/slurm/saves.yaml"]
COPIED = ["Snakefile", "config", "workflow", "profiles", "tests/slurm"]
RESULTS = "results/nano-smoke"
LIMIT = 1800.0  # seconds for the whole study; hitting it is a failure
BLOWS = ("scancel", "kill -9", "time limit")


def copy(folder: Path) -> Path:
    """The project without its results; `rad` itself comes from the environment."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    return folder


def profile_for_here(folder: Path) -> Path:
    """The shipped profile, for a small machine: one thread, no GPU, two jobs, quick checks."""
    profile = yaml.safe_load(PROFILE.read_text(encoding="utf-8"))
    del profile["set-threads"]  # another number of threads sums in another order
    for resources in profile["set-resources"].values():
        resources.pop("gpu", None)
    profile |= {"jobs": 2, "latency-wait": 5, "slurm-init-seconds-before-status-checks": 5}
    folder.mkdir()
    (folder / "profile.yaml").write_text(yaml.safe_dump(profile, sort_keys=False))
    return folder


def snakemake(*arguments: str) -> list[str]:
    """The command that runs Snakemake in this environment."""
    return [sys.executable, "-m", "snakemake", *arguments]


def say(text: str) -> None:
    """A line with the time."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


class Disturbance:
    """Watches the queue, hits three training jobs, and remembers what became of every job."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        self.jobs: dict[str, tuple[str, str]] = {}  # id: state, rule and wildcards
        self.hit: dict[str, tuple[str, str]] = {}  # run: blow, job id
        self.ends: dict[str, str] = {}  # job id: what Slurm says of a job that was hit

    def look(self) -> None:
        """One round."""
        for line in self.ask("squeue", "-h", "--states=all", "-o", "%i|%T|%k").splitlines():
            job, state, comment = line.split("|", 2)
            if self.jobs.get(job, ("",))[0] != state:
                self.jobs[job] = (state, comment)
                if job in {each for _, each in self.hit.values()} and state != "RUNNING":
                    self.ends[job] = self.facts(job)
            run = comment.removeprefix("rule_distil_wildcards_")
            if state == "RUNNING" and run != comment and len(self.hit) < len(BLOWS):
                saved = any((self.folder / "state" / "nano-smoke" / run).glob("stage*"))
                if saved and run not in self.hit:
                    self.strike(job, run)

    def strike(self, job: str, run: str) -> None:
        """The next blow, on this job."""
        processes = self.processes(run)
        if not processes:  # at its very end
            return
        blow = BLOWS[len(self.hit)]
        self.hit[run] = (blow, job)
        state = sorted(path.name for path in self.state(run))[-1]
        say(f"{blow}: job {job}, {run}, saved: {state}")
        if blow == "scancel":
            self.ask("scancel", job)
        elif blow == "kill -9":
            for process in processes:
                os.kill(process, signal.SIGKILL)
        else:  # no step more until Slurm, with a limit of a minute, warns the job
            for process in processes:
                os.kill(process, signal.SIGSTOP)
            self.ask("scontrol", "update", f"JobId={job}", "TimeLimit=1")

    def state(self, run: str) -> list[Path]:
        return list((self.folder / "state" / "nano-smoke" / run).glob("stage*"))

    def processes(self, run: str) -> list[int]:
        """Ids of the processes that train a run in this folder."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().decode().split("\0")
                    here = (entry / "cwd").readlink() == self.folder
                except OSError:  # gone meanwhile
                    continue
                if here and "distil" in words and f"{RESULTS}/runs/{run}" in words:
                    found.append(int(entry.name))
        return found

    def facts(self, job: str) -> str:
        wanted = ("JobState", "Reason", "ExitCode", "RunTime", "TimeLimit")
        shown = self.ask("scontrol", "show", "job", job)
        return " ".join(part for part in shown.split() if part.split("=")[0] in wanted)

    def ask(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout.strip()


def run_on_slurm(folder: Path, profile: Path, environment: dict[str, str]) -> Disturbance:
    """The study through the executor, hit three times. Raises `AssertionError` when it fails."""
    command = snakemake("--workflow-profile", str(profile), "--configfile", *STUDY)
    watch = Disturbance(folder, environment)
    until = time.monotonic() + LIMIT
    with (folder / "snakemake.out").open("w") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output
        )
        try:
            while process.poll() is None:
                assert time.monotonic() < until, f"not finished after {LIMIT:.0f} s"
                watch.look()
                time.sleep(0.2)
        finally:
            process.kill()
    watch.look()
    text = (folder / "snakemake.out").read_text()
    assert process.returncode == 0, text[-4000:]
    return watch


def check_blows(folder: Path, watch: Disturbance) -> None:
    """Every job that was hit ended as Slurm should say, and the next attempt went on."""
    assert len(watch.hit) == len(BLOWS), f"only {len(watch.hit)} jobs could be hit"
    # the profile has Slurm send SIGTERM before the limit: the job saves, stops and has failed
    ends = {"scancel": "CANCELLED", "kill -9": "FAILED", "time limit": "FAILED"}
    for run, (blow, job) in watch.hit.items():
        log = (folder / "logs" / "nano-smoke" / "distil" / f"{run}.log").read_text()
        resumed = [int(step) for step in re.findall(r"resumed at (\d+)", log)]
        name = f"rule_distil_wildcards_{run}"
        last = [each for each, (_, comment) in watch.jobs.items() if comment == name][-1]
        say(f"{blow}: job {job}: {watch.ends[job]}; then job {last}, resumed at {resumed}")
        assert f"JobState={ends[blow]}" in watch.ends[job]
        # Snakemake removes the log of the attempt before; the state shows in the next one
        assert resumed and min(resumed) > 0, f"{run} started over:\n{log}"
        training = json.loads((folder / RESULTS / "runs" / run / "training.json").read_text())
        assert training["resumed"] > 0


def check_gpus(folder: Path, profile: Path, environment: dict[str, str], run: str) -> None:
    """Two jobs with a device each, one with both, under torchrun."""
    command = snakemake("-s", "tests/slurm/gpus.smk", "--workflow-profile", str(profile))
    done = subprocess.run(
        [*command, "--jobs", "3", "--retries", "0", "--config", f"run={run}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    log = folder / "gpus" / "sharded.log"
    said = log.read_text() if log.exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + said
    given = {(folder / "gpus" / name).read_text().strip() for name in ("first", "second")}
    say(f"two jobs of one GPU each: {sorted(given)}")
    assert given == {"0", "1"}
    curves = [
        [json.loads(line) for line in (path / "curve.jsonl").read_text().splitlines()]
        for path in (folder / "gpus" / "sharded", folder / RESULTS / "runs" / run)
    ]
    pairs = [_divergence(*records) for records in zip(*curves, strict=True)]
    say(f"a job of two GPUs, torchrun: held-out KL within {max(pairs):.1e} of one process")
    assert max(pairs) < 1e-4


def _divergence(first: dict[str, Any], second: dict[str, Any]) -> float:
    return abs(float(first["held_out_kl"]) - float(second["held_out_kl"]))


def test(folder: Path) -> None:
    """Raises `AssertionError` with what is wrong, `Unavailable` where there can be no Slurm."""
    try:
        import snakemake_executor_plugin_slurm  # noqa: F401
    except ImportError:
        raise Unavailable("no executor plugin: pip install -r envs/slurm.txt") from None
    install()
    local, remote = copy(folder / "local"), copy(folder / "slurm")
    profile = profile_for_here(folder / "profile")
    with cluster(folder / "cluster", cpus=8, gpus=2) as environment:
        environment["TMPDIR"] = str(folder / "tmp")  # device locks of jobs stay there
        Path(environment["TMPDIR"]).mkdir()
        start = time.monotonic()
        watch = run_on_slurm(remote, profile, environment)
        states = sorted(state for state, _ in watch.jobs.values())
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        say(f"Slurm: {len(states)} jobs ({counts}) in {time.monotonic() - start:.0f} s")
        check_blows(remote, watch)
        check_gpus(remote, profile, environment, next(iter(watch.hit)))
    start = time.monotonic()
    command = snakemake("--cores", "2", "--configfile", *STUDY)
    with (local / "snakemake.out").open("w") as output:
        done = subprocess.run(command, cwd=local, stdout=output, stderr=output)
    assert done.returncode == 0, (local / "snakemake.out").read_text()[-4000:]
    say(f"local: {time.monotonic() - start:.0f} s")
    count, found = differences(local / RESULTS, remote / RESULTS)
    assert not found, "\n".join(found[:40])
    assert count > 100
    weights = sorted((remote / RESULTS).glob("runs/*/model/model.safetensors"))
    say(f"{count} files compared, {len(weights)} trained models: identical")


def main(arguments: Sequence[str]) -> int:
    """Exit status: 0 passed or skipped, 1 failed. An argument: folder to keep everything in."""
    with tempfile.TemporaryDirectory(prefix="rad-slurm-") as temporary:
        folder = Path(arguments[0] if arguments else temporary).resolve()
        try:
            test(folder)
        except Unavailable as reason:
            print(f"test-slurm skipped: {reason}")
        except AssertionError as error:
            print(f"test-slurm FAILED: {error}", file=sys.stderr)
            return 1
        else:
            print("test-slurm passed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
