"""docs/add-a-selector.md, followed to the letter: its code blocks become files and are run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "add-a-selector.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
CONFIGS = ["config/nano.yaml", "config/smoke.yaml"]


def blocks(heading: str) -> dict[str, str]:
    """The code blocks of one section, by language."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return {match["kind"]: match["text"] for match in BLOCK.finditer(section)}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the workflow, as a user would have it."""
    for name in ("workflow", "config", "profiles"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "Snakefile", tmp_path)
    return tmp_path


def snakemake(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", *arguments, "--cores", "1"]
    command += ["--configfile", *CONFIGS, "mine.yaml"]
    return subprocess.run(command, cwd=project, capture_output=True, text=True)


def select(project: Path, name: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    target = f"results/nano-smoke/selection/base/{name}/l2/placement.json"
    return snakemake(project, target), project / target


def install(project: Path, heading: str, method: str, code: str | None) -> int:
    """Write the section's files; returns the lines a user had to write."""
    parts = blocks(heading)
    (project / "mine.yaml").write_text(parts["yaml"])
    lines = parts["yaml"].count("\n")
    if code is not None:
        language = "python" if code.endswith(".py") else "sh"
        (project / code).write_text(parts[language])
        rules = project / "workflow" / "rules" / "selection" / f"{method}.smk"
        rules.write_text(parts["snakemake"])
        lines += parts[language].count("\n") + parts["snakemake"].count("\n")
    return lines


@pytest.mark.parametrize(
    ("heading", "method", "code", "kept"),
    [
        ("In Python", "o_norm", "o_norm.py", None),
        ("In any other language", "first_layers", "first_layers.sh", [0, 1]),
        ("A published list", "their_table_3", None, [0, 5]),
    ],
)
def test_the_page_works(
    heading: str, method: str, code: str | None, kept: list[int] | None, project: Path
) -> None:
    lines = install(project, heading, method, code)
    assert method != "o_norm" or lines <= 25
    done, path = select(project, method)
    assert done.returncode == 0, done.stdout + done.stderr
    placement = json.loads(path.read_text())
    layers = sorted({layer for layer, _ in placement["softmax"]})
    assert len(layers) == 2 and (kept is None or layers == kept)
    planned = snakemake(project, "-n")
    assert planned.returncode == 0
    run = f"base-{method}-l2-mamba2-qkvo-kl-self-s0"
    for rule in ("distil", "evaluate", "report"):
        assert f"rule {rule}:" in planned.stdout
    assert run in planned.stdout


def test_a_bad_placement_fails_its_own_rule(project: Path) -> None:
    install(project, "In any other language", "first_layers", "first_layers.sh")
    script = project / "first_layers.sh"
    for wrong, message in (
        (
            script.read_text().replace("kept * heads", "heads"),
            "keeps 4 heads, budget l2 asks for 8",
        ),
        (script.read_text().replace('value["name:"]', '"another"'), "is for base 'another'"),
        ("echo no", "not JSON"),
    ):
        good = script.read_text()
        script.write_text(wrong)
        done, path = select(project, "first_layers")
        script.write_text(good)
        assert done.returncode != 0
        assert "select_first_layers" in done.stdout + done.stderr
        assert message in done.stdout + done.stderr
        assert not path.exists()  # snakemake removes what a failed rule wrote
