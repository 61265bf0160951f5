"""`rad convert`, `rad inspect`, `rad export`: files to files, and every way to be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models_fixture import HEADS, KV_HEADS, LAYERS, MIXERS, base_model, placement, tokens
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import rad
from rad.cli import main
from rad.models.cache import HybridCache
from rad.models.convert import convert
from rad.models.kernel_check import kernel_records
from rad.models.store import mixer_settings
from rad.models.summary import summarise
from rad.placement import Placement


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small base as a checkpoint folder."""
    folder = tmp_path_factory.mktemp("base")
    base_model("qwen2").save_pretrained(folder)
    words = {f"w{index}": index for index in range(96)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0")))
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "placement.json"
    placement("mixed").save(path)
    return path


def run(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != "placement.json")


def test_command_writes_a_model_that_loads(
    base: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "hybrid"
    assert (
        run("convert", "--base", base, "--placement", kept, "--mixer", "mamba2", "--out", out) == 0
    )
    text = capsys.readouterr().out
    assert "layer 1  mamba2: heads 0-2 | softmax: head 3 (1 kv)" in text
    hybrid = AutoModelForCausalLM.from_pretrained(out)
    assert summarise(hybrid) == json.loads((out / "conversion.json").read_text())["summary"]
    assert f"parameters: {base_parameters(base):,} -> {count(hybrid):,}" in text
    assert f"KV bytes per token: {LAYERS * KV_HEADS * 8 * 8:,} -> {3 * 8 * 8:,}" in text
    same = rad.convert(str(base), kept, mixer="mamba2", initialisation="qkvo")
    assert torch.equal(same(tokens()).logits, hybrid(tokens()).logits)
    assert Placement.load(out / "placement.json") == Placement.load(kept)
    assert run("inspect", out) == 0
    assert "layer 1  mamba2: heads 0-2 | softmax: head 3 (1 kv)" in capsys.readouterr().out
    assert leftovers(out.parent) == ["hybrid"]


def count(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def base_parameters(folder: Path) -> int:
    return count(AutoModelForCausalLM.from_pretrained(folder))


def test_settings_of_the_mixer_are_checked_and_kept(base: Path, kept: Path, tmp_path: Path) -> None:
    out = tmp_path / "hybrid"
    changes = '{"state_size": 4, "form": "parallel"}'
    assert (
        run(
            *("convert", "--base", base, "--placement", kept, "--mixer", "discrete_mamba2"),
            *("--mixer-settings", changes, "--initialisation", "random", "--out", out),
        )
        == 0
    )
    hybrid = AutoModelForCausalLM.from_pretrained(out)
    assert hybrid.config.rad_mixer["state_size"] == 4
    assert hybrid.model.layers[1].self_attn.parallel


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _edit(change: Any) -> Any:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return apply


NORM = "model.norm.weight"
SPOILT = {
    "is corrupt or cut off": _truncate,
    f"missing tensors: {NORM}": _edit(lambda tensors: tensors.pop(NORM)),
    "unexpected tensors: model.extra": _edit(
        lambda tensors: tensors.update({"model.extra": torch.ones(1)})
    ),
    f"mismatched tensors: {NORM}": _edit(lambda tensors: tensors.update({NORM: torch.ones(3)})),
    "has no \\*.safetensors": lambda folder: (folder / "model.safetensors").unlink(),
    "no config.json": lambda folder: (folder / "config.json").unlink(),
}


@pytest.mark.parametrize("message", list(SPOILT))
def test_spoilt_checkpoints_are_refused(
    message: str, base: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re
    import shutil

    bad = tmp_path / "bad"
    shutil.copytree(base, bad)
    SPOILT[message](bad)
    out = tmp_path / "hybrid"
    assert run("convert", "--base", bad, "--placement", kept, "--out", out) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rad convert: error:") and re.search(message, error)
    assert leftovers(tmp_path) == ["bad"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": 9}, "the placement is for 9 layers x 4 heads"),
        ({"heads": 8, "softmax": []}, "the placement is for 3 layers x 8 heads"),
        ({"softmax": [[0, 4]]}, "4"),
        ({"softmax": [[7, 0]]}, "7"),
        ({"kv_heads": 3}, "cannot share"),
    ],
)
def test_placements_of_another_base_are_refused(
    change: dict[str, Any],
    message: str,
    base: Path,
    kept: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept.write_text(json.dumps({**json.loads(kept.read_text()), **change}))
    out = tmp_path / "hybrid"
    assert run("convert", "--base", base, "--placement", kept, "--out", out) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rad convert: error:") and message in error
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mixer", "mamba9"], "unknown mixer 'mamba9'; known: mamba2"),
        (["--mixer-settings", '{"chunks": 3}'], "mixer mamba2: chunks"),
        (["--mixer", "mamba", "--mixer-settings", '{"state_size": 3}'], "does not divide"),
        (["--mixer", "gla", "--initialisation", "zero"], "gla cannot start from 'zero'"),
        (["--initialisation", "copied"], "cannot start from 'copied'"),
        (["--initialisation", "aligned"], "needs the folder of a stage-1 alignment"),
        (["--base", "nano:tiny"], "nano has base, medium, large"),
        (["--placement", "nowhere.json"], "nowhere.json"),
    ],
)
def test_wrong_requests_are_one_line(
    options: list[str],
    message: str,
    base: Path,
    kept: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "hybrid"
    code = run("convert", "--base", base, "--placement", kept, "--out", out, *options)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2 and error.startswith("rad convert: error:") and message in error
    assert leftovers(tmp_path) == []


def test_a_folder_with_another_model_is_left_alone(
    base: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    assert run("convert", "--base", base, "--placement", kept, "--out", base) == 2
    assert "holds a model already" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_inspect_finds_weights_that_do_not_fit(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    bad = tmp_path / "bad"
    shutil.copytree(base, bad)
    _edit(lambda tensors: tensors.pop(NORM))(bad)
    assert run("inspect", bad) == 2
    assert f"missing tensors: {NORM}" in capsys.readouterr().err


def test_export_command(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "placement.json"
    placement("layer").save(kept)
    hybrid, out = tmp_path / "hybrid", tmp_path / "granite"
    assert run("convert", "--base", base, "--placement", kept, "--out", hybrid) == 0
    assert run("export", hybrid, "--out", out) == 0
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (hybrid, out))
    assert theirs.config.model_type == "granitemoehybrid"
    torch.testing.assert_close(theirs(tokens()).logits, ours(tokens()).logits, rtol=0, atol=1e-4)
    assert run("export", hybrid, "--out", out) == 2
    assert "holds a model already" in capsys.readouterr().err


def test_kernels_command_reports_the_self_test(
    base: Path, kept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "hybrid"
    assert run("convert", "--base", base, "--placement", kept, "--mixer", "gla", "--out", out) == 0
    capsys.readouterr()
    assert run("kernels", out) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["op"] for record in records] == ["gla"]
    assert records[0]["passed"] and records[0]["state_size"] == 8


def test_every_recurrent_mixer_names_its_kernel() -> None:
    seen = {}
    for name, chosen in MIXERS.items():
        hybrid = convert(base_model(), placement("heads"), chosen, "qkvo")
        records = kernel_records(hybrid)
        seen[name] = [record["op"] for record in records]
        assert all(record["passed"] for record in records)
    assert seen == {
        "mamba2": ["ssd"],
        "discrete_mamba2": ["ssd"],
        "gated_deltanet": ["gated_delta"],
        "gla": ["gla"],
        "mamba": ["selective_scan"],
        "longhorn": ["selective_scan"],
        "sliding_window": [],
        "skip": [],
    }


PAIRS = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kept=st.sets(st.sampled_from(PAIRS)),
    mixer=st.sampled_from(sorted(MIXERS)),
    form=st.sampled_from(["slots", "parallel"]),
    family=st.sampled_from(["llama", "qwen2", "qwen3"]),
)
def test_any_placement_gives_a_working_hybrid(
    kept: set[tuple[int, int]], mixer: str, form: str, family: str
) -> None:
    """Cached decoding equals one forward, the cache costs what the summary says, any placement."""
    chosen = {**MIXERS[mixer], **({"form": form} if "form" in MIXERS[mixer] else {})}
    where = Placement(
        base="b", layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, softmax=sorted(kept), selector="t"
    )
    hybrid = convert(base_model(family), where, chosen, "qkvo")
    ids = tokens(rows=1, length=12)
    cache = HybridCache(hybrid.config)
    parts = [
        hybrid(part, past_key_values=cache, use_cache=True).logits
        for part in (ids[:, :7], ids[:, 7:11], ids[:, 11:])
    ]
    torch.testing.assert_close(torch.cat(parts, 1), hybrid(ids).logits, rtol=1e-3, atol=1e-3)
    facts = summarise(hybrid)
    assert facts["kv_bytes_per_token"] == where.cached_kv_heads() * 2 * 8 * 4
    assert [layer["softmax_heads"] for layer in facts["layers"]] == [
        where.kept_heads(layer) for layer in range(LAYERS)
    ]


def test_unknown_settings_name_the_key() -> None:
    with pytest.raises(ValueError, match="mixer gla: gate_rank"):
        mixer_settings("gla", {"gate_rank": 0})
