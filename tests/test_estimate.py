"""`rad estimate`: jobs counted once, what fits and what would make it, without torch or network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rad import cli
from rad.commands import estimate as verb
from rad.estimate import table
from rad.estimate.hardware import GPUS
from rad.estimate.jobs import Hardware
from rad.estimate.shapes import Model, Shape, ShapeError, load_shape
from rad.estimate.study import Estimate
from rad.study import Study, load

ROOT = Path(__file__).resolve().parent.parent
EVALUATION = {"tasks": {"gsm8k": {"kind": "gsm8k", "files": ["test.jsonl"], "samples": 100}}}
KL = {"loss": "kl", "tokens": 600_000_000, "batch_size": 32}


def study(**changes: Any) -> dict[str, Any]:
    """An 8B study: two selectors, self and 70B teachers."""
    content: dict[str, Any] = {
        "name": "paper",
        "models": {
            "base": {"source": "meta-llama/Llama-3.1-8B-Instruct", "dtype": "bfloat16"},
            "large": {"source": "meta-llama/Llama-3.1-70B-Instruct", "dtype": "bfloat16"},
        },
        "corpora": {
            "distil": {
                "source": "hub",
                "dataset": "some/text",
                "tokens": 600_000_000,
                "context": 4096,
                "held_out_tokens": 262144,
            }
        },
        "mixers": {"mamba2": {"type": "mamba2"}},
        "alignment": {"tokens": 100_000_000, "context": 512, "batch_size": 96},
        "selectors": {"uniform": {}, "retrieval_aware": {"batch_size": 4}},
        "recipes": {"kl": {"stages": [{**KL, "trainable": "mixers", "accumulate": 16}]}},
        "grid": [
            {
                "view": "controlled",
                "selector": ["uniform", "retrieval_aware"],
                "budget": {"fraction": 0.25},
                "initialisation": "aligned",
                "recipe": "kl",
            }
        ],
        "evaluation": EVALUATION,
    }
    return {**content, **changes}


def found(content: dict[str, Any], gpu: str = "h200", count: int = 1, **options: Any) -> Estimate:
    """The estimate of a study."""
    hardware = Hardware.named(gpu, count, options.get("mfu", 0.4), options.get("price"))
    return Estimate(Study.from_config(content), hardware)


def run(tmp_path: Path, content: dict[str, Any], *options: str) -> subprocess.CompletedProcess[str]:
    """The verb in a process of its own; says at the end whether torch was imported."""
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    code = (
        "import sys; from rad import cli; from rad.commands import estimate; "
        "cli.VERBS.update(estimate.VERBS); code = cli.main(sys.argv[1:]); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "estimate", str(path), *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_the_shipped_study(capsys: pytest.CaptureFixture[str]) -> None:
    nano = load([ROOT / "config" / "nano.yaml"])
    estimate = Estimate(nano, Hardware.named("a100", 1, 0.4, None))
    assert not estimate.refused
    names = [job.name for job in estimate.jobs if job.stage == "distil"]
    assert names == list(nano.run_table)
    scored = [job.name for job in estimate.jobs if job.stage == "evaluate"]
    assert scored == [*nano.run_table, *(f"model-{name}" for name in nano.references)]
    size = {job.name: job.disk for job in estimate.jobs if job.stage == "distil"}
    none = next(name for name in names if "sliding_window" in name)
    whole = Model(load_shape("nano:base")).weight_bytes("float32")
    assert 0.9 * whole < size[none] <= whole  # its weights are the base's own, or fewer
    print(table.text(estimate))
    assert "in all:" in capsys.readouterr().out


def test_jobs_that_runs_share_are_counted_once() -> None:
    grid = study()["grid"][0]
    estimate = found(
        study(
            grid=[{**grid, "seed": [0, 1, 2], "teacher": ["self", "large"]}],
            teacher_outputs={"large": {"kind": "hidden"}},
        )
    )
    stages = [job.stage for job in estimate.jobs]
    assert stages.count("distil") == 12
    assert stages.count("alignment") == stages.count("teacher outputs") == 1
    assert stages.count("selection") == 2
    selection = [job for job in estimate.jobs if job.stage == "selection"]
    assert [len(job.users) for job in selection] == [6, 6]
    teacher = next(job for job in estimate.jobs if job.stage == "teacher outputs")
    assert len(teacher.users) == 6
    # final hidden states in bfloat16, and the head
    tokens = 600_000_000 + 262144
    assert teacher.disk == tokens * 8192 * 2 + 128256 * 8192 * 2


def test_tokens_and_flops_follow_the_recipe() -> None:
    estimate = found(study())
    run_ = next(job for job in estimate.jobs if job.stage == "distil")
    per_step = 32 * 4096
    assert run_.tokens == 600_000_000 // per_step * per_step
    # 8B from itself, mixers only, 4k: 49 GFLOP per token in the performance notes' own sum, less
    # what three quarters of the attention save
    assert 40e9 < run_.flops / run_.tokens < 52e9
    assert run_.gpu_hours == pytest.approx(run_.flops / (989.4e12 * 0.4) / 3600)
    alignment = next(job for job in estimate.jobs if job.stage == "alignment")
    # one pass of the base without its head and all mixers: 21.5 GFLOP there
    assert alignment.flops / alignment.tokens == pytest.approx(21.5e9, rel=0.12)
    twice = found(study(), mfu=0.2)
    assert sum(job.gpu_hours for job in twice.jobs) == pytest.approx(
        2 * sum(job.gpu_hours for job in estimate.jobs)
    )


def test_float32_runs_at_the_float32_rate() -> None:
    models = {"base": {"source": "meta-llama/Llama-3.2-1B", "dtype": "float32"}}
    slow = found(study(models=models))
    recipes = {"kl": {"autocast": True, "stages": [{**KL, "trainable": "mixers"}]}}
    fast = found(study(models=models, recipes=recipes))
    hours = [
        sum(job.gpu_hours for job in each.jobs if job.stage == "distil") for each in (slow, fast)
    ]
    assert hours[0] > 5 * hours[1]


@pytest.mark.parametrize(
    ("changes", "gpu", "count", "remedy"),
    [
        (
            {"stages": [{**KL, "trainable": "mixers", "accumulate": 8}]},
            "h100",
            1,
            "activation_check",
        ),
        (
            {"activation_checkpointing": True, "stages": [{**KL, "trainable": "mixers"}]},
            *("h100", 1, "micro-batches"),
        ),
    ],
)
def test_what_does_not_fit_gets_the_first_remedy(
    changes: dict[str, Any], gpu: str, count: int, remedy: str
) -> None:
    estimate = found(study(recipes={"kl": changes}), gpu, count)
    job = next(job for job in estimate.jobs if job.stage == "distil")
    assert not job.fits
    assert remedy in job.remedy, table.refusals(estimate)


def test_a_live_70b_teacher_is_refused_and_storing_it_is_the_remedy() -> None:
    grid = {**study()["grid"][0], "selector": "uniform", "teacher": "large"}
    live = found(study(grid=[grid]))
    job = next(job for job in live.jobs if job.stage == "distil")
    assert not job.fits and "teacher_outputs: {large: {kind: hidden}}" in job.remedy
    stored = found(study(grid=[grid], teacher_outputs={"large": {"kind": "hidden"}}))
    again = next(job for job in stored.jobs if job.stage == "distil")
    assert again.fits
    assert again.flops < 0.4 * job.flops  # the teacher was most of it


def test_a_remedy_is_verified_by_the_same_model() -> None:
    tight = {"stages": [{**KL, "trainable": "mixers", "accumulate": 8}]}
    refused = found(study(recipes={"kl": tight}), "h100")
    assert any("activation_checkpointing: true" in line for line in table.refusals(refused))
    mended = found(study(recipes={"kl": {**tight, "activation_checkpointing": True}}), "h100")
    assert [job.stage for job in mended.refused if job.stage == "distil"] == []


def test_exit_code_json_and_no_torch(tmp_path: Path) -> None:
    out = tmp_path / "estimate.json"
    done = run(tmp_path, study(), "--gpu", "h200", "--price", "3", "--json", str(out))
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "False"
    content = json.loads(out.read_text())
    assert content["total"]["cost"] == pytest.approx(3 * content["total"]["gpu_hours"])
    assert sum(stage["flops"] for stage in content["stages"].values()) == pytest.approx(
        content["total"]["flops"]
    )
    memory = next(job["memory"] for job in content["jobs"] if job["stage"] == "distil")
    parts = ("weights", "gradients", "optimiser", "activations", "logits", "teacher")
    assert sum(memory[part] for part in parts) == pytest.approx(memory["total"])
    wide = {"kl": {"stages": [{**KL, "trainable": "all"}]}}
    refused = run(tmp_path, study(recipes=wide), "--gpu", "a100")
    assert refused.returncode == 2
    named = [
        line for line in refused.stdout.splitlines() if line.startswith("does not fit: distil")
    ]
    assert len(named) == 2 and all("GiB" in line for line in named)


def test_shapes_of_folders_and_of_unknown_models(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="--configs FOLDER"):
        load_shape("someone/else-7B")
    folder = tmp_path / "someone" / "else-7B"
    folder.mkdir(parents=True)
    config = {
        "model_type": "mistral",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": 100,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shape = load_shape("someone/else-7B", tmp_path)
    assert shape == load_shape(str(folder)) and shape.head_dim == 16
    assert Model(shape).count == 2 * 100 * 64 + 2 * (64 * 64 * 3 + 3 * 64 * 96 + 2 * 64) + 64
    with pytest.raises(ShapeError, match="'gpt2'; known: llama"):
        Shape.of({"model_type": "gpt2"}, "model 'x'")
    with pytest.raises(ShapeError, match="no vocab_size"):
        Shape.of({k: v for k, v in config.items() if k != "vocab_size"})


@pytest.mark.parametrize(
    "options", [{"gpu": "v100"}, {"count": 0}, {"mfu": 0.0}, {"mfu": 1.5}, {"price": -1.0}]
)
def test_hardware_is_checked(options: dict[str, Any]) -> None:
    values = {"gpu": "h100", "count": 1, "mfu": 0.4, "price": None, **options}
    with pytest.raises(ValueError, match="--"):
        Hardware.named(**values)
    assert set(GPUS) == {"h100", "h200", "a100"}


def test_the_verb_is_known() -> None:
    assert set(verb.VERBS) == {"estimate"}
    assert callable(cli.main)
