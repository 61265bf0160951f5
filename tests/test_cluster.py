"""The profiles of cluster and machine: read with the default study, names that exist."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROFILES = sorted((ROOT / "workflow" / "profiles").glob("*/profile.yaml"))
PLUGINS = {
    "slurm": ["snakemake_executor_plugin_slurm"],
    "kubernetes": ["snakemake_executor_plugin_kubernetes", "snakemake_storage_plugin_fs"],
}
RULE = re.compile(r"^(?:use rule \w+ as |rule )(?P<name>\w+)(?: with)?:$", re.MULTILINE)


def _profile(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def _rules() -> dict[str, str]:
    """Text of every rule by its name."""
    found = {}
    for path in (ROOT / "workflow" / "rules").rglob("*.smk"):
        text = path.read_text(encoding="utf-8")
        for match in RULE.finditer(text):
            following = RULE.search(text, match.end())
            found[match["name"]] = text[match.start() : following and following.start()]
    return found


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.parent.name)
def test_every_profile_plans_the_default_study(profile: Path, tmp_path: Path) -> None:
    name = profile.parent.name
    missing = [each for each in PLUGINS.get(name, []) if importlib.util.find_spec(each) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)} (docs/cluster.md)")
    command = [sys.executable, "-m", "snakemake", "-n", "-s", str(ROOT / "Snakefile")]
    command += ["--workflow-profile", str(profile.parent), "--directory", str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"workflow specific profile {profile.parent}" in done.stdout + done.stderr
    distil = done.stdout[done.stdout.index("rule distil:") :]
    assert "gpu=1" in distil[: distil.index("\n\n") if "\n\n" in distil else None]


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.parent.name)
def test_profiles_speak_of_rules_that_exist(profile: Path) -> None:
    """Snakemake says nothing about a resource for a rule that is not there."""
    rules = _rules()
    content = _profile(profile)
    named = {*content.get("set-resources", {}), *content.get("set-threads", {})}
    assert named and named <= set(rules)
    for name, resources in content["set-resources"].items():
        if "gpu" in resources:
            rule = "select" if name.startswith("select_") else name  # they inherit it
            assert "--gpus {resources.gpu}" in rules[rule], f"{name} would not use its GPU"
        # the executor makes tasks per GPU of it: as many whole jobs, all writing the same files
        assert "tasks" not in resources


def test_the_shell_of_a_resumable_job_does_not_outrun_it() -> None:
    """Slurm signals every process of a job. A shell would die at once, the job with it, while
    training still writes its state; `exec` leaves no shell."""
    appending = {name: text for name, text in _rules().items() if ">> {log}" in text}
    assert {"distil", "align", "select", "teacher_outputs"} <= set(appending)
    for name, text in appending.items():
        first = text[text.index("    shell:") :].splitlines()[1]
        assert first.strip().startswith('"exec rad '), name


def test_profiles_keep_what_the_default_one_says() -> None:
    """Another workflow profile is read instead of profiles/default, not on top of it."""
    default = _profile(ROOT / "profiles" / "default" / "profile.yaml")
    for path in PROFILES:
        content = _profile(path)
        lost = [key for key, value in default.items() if content.get(key) != value]
        assert lost == [], path
    assert {path.parent.name for path in PROFILES} == {"slurm", "gpu", "kubernetes"}


def test_the_executor_is_pinned_and_its_traps_are_set() -> None:
    slurm = _profile(ROOT / "workflow" / "profiles" / "slurm" / "profile.yaml")
    assert slurm["slurm-status-command"] == "squeue"
    # with a limit on jobs, 2.8.0 forgets those of an array that it could not submit at once
    assert "slurm-array-jobs" not in slurm
    pins = (ROOT / "envs" / "slurm.txt").read_text(encoding="utf-8").splitlines()
    assert "snakemake-executor-plugin-slurm==2.8.0" in pins
