"""The workflow as a user meets it: dry runs of every shipped study, bad input, nothing to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = sorted((ROOT / "config").glob("*.yaml"))
OVERLAYS = [path for path in CONFIGS if path.read_text(encoding="utf-8").startswith("# Overlay")]
STUDIES = [path for path in CONFIGS if path not in OVERLAYS]


def _snakemake(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "Snakefile")]
    return subprocess.run(
        [*command, "--directory", str(folder), *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )


def _folder_with_shared(tmp_path: Path) -> Path:
    """A working folder from which `../shared` resolves as it does from the project's root."""
    folder = tmp_path / "work"
    folder.mkdir()
    shared = ROOT.parent / "shared"
    if shared.is_dir():
        (tmp_path / "shared").symlink_to(shared)
    return folder


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.stem)
def test_every_shipped_study_plans(study: Path, tmp_path: Path) -> None:
    if "../shared" in study.read_text(encoding="utf-8") and not (ROOT.parent / "shared").is_dir():
        pytest.skip("this study reads ../shared, which is not beside the project")
    folder = _folder_with_shared(tmp_path)
    done = _snakemake("-n", "-q", "--configfile", str(study), folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr


def _laid_on(overlay: Path) -> list[Path]:
    """The study that an overlay's first line names; nothing where it is the default one."""
    named = re.match(r"# Overlay on (\S+\.yaml)", overlay.read_text(encoding="utf-8"))
    return [ROOT / "config" / named[1]] if named and named[1] != "nano.yaml" else []


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_plans_on_its_study(overlay: Path, tmp_path: Path) -> None:
    files = [str(path) for path in (*_laid_on(overlay), overlay)]
    done = _snakemake("-n", "-q", "--configfile", *files, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    blocked = tmp_path / "blocked"
    for name in ("torch", "transformers", "matplotlib", "lm_eval"):
        (blocked / name).mkdir(parents=True)
        (blocked / name / "__init__.py").write_text(f"raise ImportError('{name} was imported')\n")
    environment = {**os.environ, "PYTHONPATH": str(blocked)}
    for command in (
        [
            sys.executable,
            "-m",
            "snakemake",
            "-n",
            "-q",
            "-s",
            str(ROOT / "Snakefile"),
            "--directory",
            str(tmp_path),
        ],
        [sys.executable, "-m", "rad", "--help"],
        [sys.executable, "-m", "rad", "plan", str(ROOT / "config" / "nano.yaml")],
        [sys.executable, "-m", "rad", "check", str(ROOT / "config" / "nano.yaml")],
    ):
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "grid: [{view: controlled, selector: radd, budget: {layers: 2}, recipe: kl}]",
            "unknown selector 'radd'; known: uniform, rad, kl_guided",
        ),
        ("evaluaton: {}", "evaluaton: unknown key; did you mean 'evaluation'"),
        ("models: {base: {source: ./missing}}", "models.base: model './missing': no such folder"),
        (
            "grid: [{view: controlled, selector: rad, budget: {layers: 20}, recipe: kl}]",
            "the base has 8 layers",
        ),
    ],
)
def test_bad_input_ends_with_one_line_before_any_work(
    content: str, message: str, tmp_path: Path
) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(content)
    done = _snakemake("--cores", "1", "--configfile", str(overlay), folder=tmp_path)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert not (tmp_path / "results").exists()
    command = [sys.executable, "-m", "rad", "check", "config/nano.yaml", str(overlay)]
    checked = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert checked.returncode == 2
    assert message in checked.stderr
    assert len(checked.stderr.strip().splitlines()) == 1


def test_a_dropped_in_rule_file_becomes_a_method(tmp_path: Path) -> None:
    """The extension point: one rule file that writes placement.json, one line in the grid."""
    project = tmp_path / "project"
    for name in ("Snakefile", "workflow", "config"):
        project.mkdir(exist_ok=True)
        (project / name).symlink_to(ROOT / name) if name != "workflow" else None
    rules = project / "workflow" / "rules" / "selection"
    rules.mkdir(parents=True)
    for source in (ROOT / "workflow").rglob("*"):
        target = project / "workflow" / source.relative_to(ROOT / "workflow")
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    (rules / "first_layers.smk").write_text(
        """
rule select_first_layers:
    input:
        model="<results>/models/{base}/source.json",
    output:
        "<results>/selection/{base}/{selector}/{budget}/placement.json",
    wildcard_constraints:
        selector=HELPERS.selectors_of("first_layers"),
    shell:
        "echo {wildcards.base} > {output}"
"""
    )
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(
        "selectors: {first_layers: {settings: {note: mine}}}\n"
        "grid: [{view: controlled, selector: [uniform, first_layers], budget: {layers: 2}, "
        "recipe: kl}]\n"
    )
    command = [sys.executable, "-m", "snakemake", "-n", "--configfile", str(overlay)]
    (project / "Snakefile").unlink()
    (project / "Snakefile").write_bytes((ROOT / "Snakefile").read_bytes())
    done = subprocess.run(command, capture_output=True, text=True, cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rule select_first_layers" in done.stdout
    assert "base-first_layers-l2-mamba2-qkvo-kl-self-s0" in done.stdout


@pytest.mark.slow
def test_the_shrunk_default_study_runs_from_nothing_to_the_report(tmp_path: Path) -> None:
    """Every stage and every method; then nothing is left to do."""
    overlay = str(ROOT / "config" / "smoke.yaml")
    done = _snakemake("--cores", "2", "--configfile", overlay, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = tmp_path / "results" / "nano-smoke"
    page = (results / "report.html").read_text(encoding="utf-8")
    for name in ("uniform", "rad", "kl_guided", "retrieval_aware", "large"):
        assert name in page
    assert len(list((results / "runs").glob("*/evaluation.json"))) == 10
    assert not any((tmp_path / "state").rglob("*.safetensors"))
    again = _snakemake("--cores", "2", "--configfile", overlay, folder=tmp_path)
    assert "Nothing to be done" in again.stdout + again.stderr


def test_one_small_study_runs_from_nothing_to_the_report(tmp_path: Path) -> None:
    """The default suite's end-to-end run: two selectors, one teacher, seconds of training."""
    overlay = tmp_path / "tiny.yaml"
    overlay.write_text(
        """
variant: tiny
corpora: {distil: {tokens: 16384, held_out_tokens: 4096}}
recipes:
  kl: {log_points: 2, stages: [{tokens: 16384, batch_size: 16, learning_rate: 2.0e-3}]}
grid:
  - {view: controlled, selector: [uniform, retrieval_aware], budget: {fraction: 0.25}, recipe: kl}
  - {view: controlled, selector: uniform, budget: {fraction: 0.25}, recipe: kl, teacher: medium}
teacher_outputs: {medium: {kind: hidden}}
selectors:
  retrieval_aware: {samples: 8}
references: [base]
evaluation:
  probe_samples: 4
  tasks:
    gsm_nano: {samples: 4}
    gsm_hard: {samples: 4}
    crux_nano: {samples: 4}
    crux_hard: {samples: 4}
    ruler_nano: {samples: 2, lengths: [64]}
  efficiency: {contexts: [64, 96], decode_tokens: 2}
"""
    )
    done = _snakemake("--cores", "2", "--configfile", str(overlay), folder=tmp_path)
    logs = "\n".join(path.read_text() for path in (tmp_path / "logs").rglob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    results = tmp_path / "results" / "nano-tiny"
    assert (results / "report.html").stat().st_size > 20_000
    scores = (results / "tables" / "scores.csv").read_text(encoding="utf-8")
    assert "retrieval_aware" in scores and "uniform" in scores
    from transformers import AutoModelForCausalLM

    import rad  # noqa: F401  (registers the hybrids)

    runs = [path for path in (results / "runs").iterdir() if (path / "model").exists()]
    assert len(runs) == 3
    for run in runs:
        model = AutoModelForCausalLM.from_pretrained(run / "model")
        assert type(model).__name__ == "LlamaHybridForCausalLM"
    again = _snakemake("--cores", "2", "--configfile", str(overlay), folder=tmp_path)
    assert "Nothing to be done" in again.stdout + again.stderr
