"""The efficiency probe: caches as the formulas say, points that do not fit, the base beside."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models_fixture import MIXERS, base_model, placement, tokens
from pydantic import ValidationError
from reporting_fixture import small_study, write_results
from transformers import MistralConfig, MistralForCausalLM

from rad.commands import efficiency as verb
from rad.efficiency_settings import EfficiencySettings
from rad.evaluation.efficiency import cache_bytes, measure
from rad.evaluation.live_memory import (
    GIB,
    LiveTensors,
    default_limit,
    is_out_of_memory,
    peak_growth,
    weight_bytes,
)
from rad.evaluation.memory import predicted_cache
from rad.evaluation.unconverted import unconverted
from rad.models.convert import convert
from rad.reporting import efficiency_figures, efficiency_tables
from rad.reporting.collect import collect, read_efficiency
from rad.reporting.efficiency_tables import probe_points, probe_table
from rad.reporting.style import styled
from rad.reporting.writers import csv_text, markdown_text


def hybrid(mixer: str, kind: str = "mixed", family: str = "llama", **changes: Any) -> Any:
    base = base_model(family)
    return convert(base, placement(kind), {**MIXERS[mixer], **changes}, "qkvo")


@torch.no_grad()
def cache_after(model: Any, length: int, rows: int = 1, steps: int = 0) -> Any:
    """The cache after a prompt of `length` and `steps` single tokens."""
    output = model(tokens(rows, length), use_cache=True)
    for _ in range(steps):
        output = model(tokens(rows, 1), past_key_values=output.past_key_values, use_cache=True)
    return output.past_key_values


# --- formula and measurement ---------------------------------------------------------------


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("kind", ["none", "layer", "heads", "mixed"])
def test_formula_is_what_the_cache_holds(mixer: str, kind: str) -> None:
    for family in ("llama", "qwen3"):
        model = hybrid(mixer, kind, family)
        # shorter and longer than the convolution, the window and a chunk; with decoding steps
        for length, steps in ((2, 0), (9, 0), (21, 0), (6, 5)):
            held = cache_bytes(cache_after(model, length, steps=steps))
            assert held == predicted_cache(model, length + steps).total
    assert cache_bytes(cache_after(model, 9, rows=3)) == 3 * predicted_cache(model, 9).total


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2", "gated_deltanet", "sliding_window"])
def test_formula_in_bfloat16_and_in_parallel(mixer: str) -> None:
    recurrent = mixer != "sliding_window"
    changes = {"form": "parallel"} if recurrent else {}
    base = base_model().to(torch.bfloat16)
    model = convert(base, placement("heads"), {**MIXERS[mixer], **changes}, "qkvo")
    formula = predicted_cache(model, 12)
    assert cache_bytes(cache_after(model, 12)) == formula.total
    # three kept heads of 8 channels
    assert formula.kv == 2 * 3 * 8 * 2 * 12
    if mixer == "discrete_mamba2":
        # all four heads in every layer: float32 states 8 x 4, three inputs of x, B and C
        assert formula.state == 3 * 4 * 8 * 4 * 4
        assert formula.conv == 3 * 3 * 4 * (8 + 2 * 4) * 2


def test_formula_of_bases() -> None:
    model = base_model("qwen2")
    assert cache_bytes(cache_after(model, 7)) == predicted_cache(model, 7).total
    config = MistralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=6,
    )
    windowed = MistralForCausalLM(config).eval()
    for length in (3, 6, 20):
        assert cache_bytes(cache_after(windowed, length)) == predicted_cache(windowed, length).total


# --- memory meters ---------------------------------------------------------------------------


def test_live_tensors_counts_storages() -> None:
    layer = torch.nn.Linear(8, 8, bias=False)
    with torch.no_grad(), LiveTensors(layer) as live:
        a = torch.ones(1000)  # 4,000 B
        view = a[10:].view(-1)
        assert live.now == 4000
        b = a + 1
        del a
        assert live.now == 8000  # the view still holds a
        del view
        assert live.now == 4000
        _ = layer.weight.t().contiguous()
        c = torch.zeros(500)
        del b, c
    assert (live.now, live.peak) == (256, 8000)


def test_peak_of_a_model_covers_weights_and_cache() -> None:
    model = hybrid("mamba2")
    with peak_growth(model) as peak:
        cache = cache_after(model, 21)
    assert cache_bytes(cache) < peak.bytes < 100 * cache_bytes(cache)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    assert total <= weight_bytes(model) <= total + 1024  # and the rotary frequencies
    assert weight_bytes(model, model) == weight_bytes(model)


def test_limits_and_faults() -> None:
    assert default_limit(torch.device("cpu")) > 2**28
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("CUDA"))
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("shapes differ"))


# --- the probe -------------------------------------------------------------------------------


def test_points_of_every_batch_size() -> None:
    model = hybrid("gated_deltanet")
    found = measure(model, run="r", contexts=[16, 8], decode_tokens=2, batch_sizes=[2, 1])
    assert found["schema"] == 2 and found["batch_size"] == 2 and found["skipped"] == []
    assert [(p["context"], p["batch_size"]) for p in found["points"]] == [(8, 2), (16, 2)]
    assert [(p["context"], p["batch_size"]) for p in found["batch_points"]] == [(8, 1), (16, 1)]
    for point in found["points"] + found["batch_points"]:
        formula = predicted_cache(model, point["context"])
        assert point["cache_bytes"] == point["cache_formula_bytes"] == formula.total
        assert point["kv_formula_bytes"] + point["state_formula_bytes"] == formula.total
        assert point["first_token_seconds"] >= point["prefill_seconds"] > 0
        speed = point["batch_size"] * point["context"] / point["prefill_seconds"]
        assert math.isclose(point["prefill_tokens_per_second"], speed)
        held = found["weight_bytes"] + point["batch_size"] * point["cache_bytes"]
        assert point["peak_memory_bytes"] > held
    assert found["kv_bytes_per_token"] == predicted_cache(model, 1).kv
    assert found["state_bytes"] == predicted_cache(model, 1).state
    assert "base" not in found and found["peak_memory"] == "live tensors"
    assert found["memory_limit_bytes"] == default_limit(torch.device("cpu"))


def test_points_that_do_not_fit_are_recorded() -> None:
    model = base_model()
    weights = weight_bytes(model)
    per_token = predicted_cache(model, 1).kv
    limit = (weights + per_token * 64) / GIB
    found = measure(
        model,
        run="r",
        contexts=[8, 128, 256],
        decode_tokens=1,
        batch_sizes=[1, 2],
        memory_limit=limit,
        peak_memory=False,
    )
    assert [point["context"] for point in found["points"]] == [8]
    assert [point["context"] for point in found["batch_points"]] == [8]
    assert [(s["context"], s["batch_size"]) for s in found["skipped"]] == [
        *((128, 1), (256, 1), (128, 2), (256, 2)),
    ]
    first, second, *_ = found["skipped"]
    assert first["predicted_bytes"] == weights + 128 * per_token
    assert f"{first['predicted_bytes']:,} bytes" in first["reason"]
    assert "128 tokens x 1 did not fit already" in second["reason"]
    assert found["points"][0]["peak_memory_bytes"] is None and found["peak_memory"] is None
    # nothing fits: the sizes are the formula's
    none = measure(model, run="r", contexts=[8], decode_tokens=1, memory_limit=1e-9)
    assert none["points"] == [] and len(none["skipped"]) == 1
    assert (none["kv_bytes_per_token"], none["state_bytes"]) == (per_token, 0)
    assert none["flops_per_token"] is None


def test_memory_that_runs_out_is_recorded() -> None:
    model = base_model()
    plain = model.forward

    def forward(input_ids: torch.Tensor, **options: Any) -> Any:
        if input_ids.shape[1] > 20:
            torch.empty(2**60, dtype=torch.uint8)  # as a large activation would
        return plain(input_ids, **options)

    model.forward = forward
    found = measure(model, run="r", contexts=[8, 32, 64], decode_tokens=1)
    assert [point["context"] for point in found["points"]] == [8]
    assert [point["context"] for point in found["skipped"]] == [32, 64]
    assert found["skipped"][0]["reason"].startswith("out of memory: ")
    assert not any(module.training for module in model.modules())


def test_activations_count_towards_the_limit() -> None:
    model = hybrid("mamba2")
    free = measure(model, run="r", contexts=[16, 512], decode_tokens=1)
    peaks = [point["peak_memory_bytes"] for point in free["points"]]
    # between the cache alone and the cache with its activations
    cache_only = weight_bytes(model) + predicted_cache(model, 512).total
    assert peaks[0] < cache_only < peaks[1]
    tight = measure(
        model, run="r", contexts=[16, 512], decode_tokens=1, memory_limit=1.1 * cache_only / GIB
    )
    assert [point["context"] for point in tight["skipped"]] == [512]


def test_bad_contexts() -> None:
    for contexts in ([], [1, 8]):
        with pytest.raises(ValueError, match="2 tokens or more"):
            measure(base_model(), run="r", contexts=contexts, decode_tokens=1)
        with pytest.raises(ValidationError, match="2 tokens or more"):
            EfficiencySettings(contexts=contexts)
    with pytest.raises(ValidationError, match="1 sequence or more"):
        EfficiencySettings(batch_sizes=[0])
    old = EfficiencySettings(contexts=[64, 96], decode_tokens=2, batch_size=4)
    # every key is an argument of the probe
    found = measure(base_model(), run="r", **{**old.model_dump(), "contexts": [8]})
    assert found["points"][0]["batch_size"] == 4


# --- the base beside a hybrid ------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_base_of_a_hybrid_has_its_shape(family: str) -> None:
    original = base_model(family)
    model = convert(original, placement("mixed"), MIXERS["mamba2"], "qkvo")
    base = unconverted(model)
    assert type(base) is type(original)
    shapes = {name: tensor.shape for name, tensor in original.state_dict().items()}
    assert {name: tensor.shape for name, tensor in base.state_dict().items()} == shapes
    mine, theirs = dict(base.named_parameters()), dict(model.named_parameters())
    mlp = "model.layers.1.mlp.up_proj.weight"
    assert mine[mlp].data_ptr() == theirs[mlp].data_ptr()
    # only the attention that was replaced is new
    added = weight_bytes(model, base) - weight_bytes(model)
    attention = [
        tensor
        for name, tensor in original.state_dict().items()
        if name.split(".")[2:3] in (["1"], ["2"]) and "self_attn" in name and "o_proj" not in name
    ]
    assert added == sum(tensor.numel() * tensor.element_size() for tensor in attention)
    # with the base's attention in place its logits are the base's
    base.load_state_dict(original.state_dict())
    prompt = tokens()
    with torch.no_grad():
        torch.testing.assert_close(base(prompt).logits, original(prompt).logits)
    with pytest.raises(ValueError, match="not a hybrid"):
        unconverted(original)


def test_base_is_measured_in_turn() -> None:
    model = hybrid("gla")
    seen: list[str] = []
    found = measure(
        model,
        run="r",
        contexts=[8, 16],
        decode_tokens=2,
        compare_base=True,
        progress=seen.append,
    )
    assert seen == ["8 tokens x 1", "16 tokens x 1"]
    base = found["base"]
    assert base["kv_bytes_per_token"] == predicted_cache(base_model(), 1).kv
    assert base["parameters"] == sum(p.numel() for p in base_model().parameters())
    assert [point["context"] for point in base["points"]] == [8, 16]
    assert "shape only" in base["source"]
    named = measure(model, run="r", contexts=[8], decode_tokens=1, base=base_model())
    assert named["base"]["source"] == "weights"
    # a model that is no hybrid has no base of its own
    assert "base" not in measure(
        base_model(), run="r", contexts=[8], decode_tokens=1, compare_base=True
    )


# --- reports ---------------------------------------------------------------------------------


def test_a_record_is_readable_by_the_report(tmp_path: Path) -> None:
    found = measure(
        hybrid("mamba2"),
        run="r",
        contexts=[8, 16],
        decode_tokens=2,
        batch_sizes=[1, 2],
        compare_base=True,
    )
    path = tmp_path / "efficiency.json"
    path.write_text(json.dumps(found))
    sizes = read_efficiency(path)
    assert [point.context for point in sizes.points] == [8, 16]
    assert sizes.kv_bytes_per_token == found["kv_bytes_per_token"]
    points = probe_points(json.loads(path.read_text()), path)
    assert [(p.batch_size, p.context) for p in points] == [(1, 8), (1, 16), (2, 8), (2, 16)]
    table = probe_table(found, "hybrid")
    assert [row[0].text for row in table.panels[0].rows] == ["hybrid"] * 4 + ["base"] * 4
    assert all(r["decode_ratio_to_base"] for r in table.records if r["model"] == "hybrid")
    with styled():
        figure = efficiency_figures.probe_figure(found, "hybrid")
    titles = [axes.get_title(loc="left") for axes in _visible(figure)]
    assert titles == [panel[0] for panel in efficiency_figures.PANELS]
    with pytest.raises(ValueError, match="efficiency probe"):
        probe_points({"points": [{"cache_bytes": 1}]}, path)


def _visible(figure: Any) -> list[Any]:
    return [axes for axes in figure.axes if axes.get_visible()]


def _places(axes: Any) -> list[float]:
    """Where points are drawn along the horizontal axis."""
    return sorted({float(x) for line in axes.lines for x in line.get_xdata()})


def _with_batches(root: Path) -> None:
    """Make the fixture's files those of a probe with three batch sizes; one point did not fit."""
    for path in sorted((root / "runs").glob("*/efficiency.json")):
        record = json.loads(path.read_text())
        grown = []
        for batch in (1, 4, 16):
            for point in record["points"]:
                seconds = point["prefill_seconds"] * batch
                grown.append(
                    {
                        **point,
                        **{"batch_size": batch, "prefill_seconds": seconds},
                        **{"first_token_seconds": 1.1 * seconds, "peak_memory_bytes": 9e6 * batch},
                        "cache_formula_bytes": point["cache_bytes"],
                        "prefill_tokens_per_second": batch * point["context"] / seconds,
                        "decode_tokens_per_second": batch * point["decode_tokens_per_second"],
                    }
                )
        last = grown.pop() if path.parent.name == "model-base" else None
        skipped = [] if last is None else [{"context": 256, "batch_size": 16, "reason": "too big"}]
        record["points"] = [point for point in grown if point["batch_size"] == 1]
        others = [point for point in grown if point["batch_size"] > 1]
        path.write_text(json.dumps({**record, "batch_points": others, "skipped": skipped}))


def test_table_of_a_study(tmp_path: Path) -> None:
    study = small_study()
    write_results(study, tmp_path)
    old = efficiency_tables.speed(collect(study, tmp_path))
    # files of the first version: one batch size, prefill speed from its seconds, no peak memory
    first = old.records[0]
    assert (first["context"], first["batch_size"]) == (64, 1)
    assert math.isclose(first["prefill_tokens_per_second"], 5000) and first["runs"] == 2
    assert first["peak_memory_bytes"] is None
    assert len(_visible(efficiency_figures.speed(collect(study, tmp_path)))) == 4

    _with_batches(tmp_path)
    results = collect(study, tmp_path)
    table = efficiency_tables.speed(results)
    assert [panel.title for panel in table.panels][:2] == [
        *("controlled view, 256 tokens, batch 1", "faithful view, 256 tokens, batch 1"),
    ]
    # at batch 16 the base stopped at 64 tokens, so everyone is shown there
    assert table.panels[-1].title == "models as they are, 64 tokens, batch 16"
    base = next(row for row in table.panels[-1].rows if row[0].text == "base")
    assert base[-1].text == "64 of 256"
    skipped = [record for record in table.records if record["skipped"]]
    assert [(r["model"], r["context"], r["batch_size"]) for r in skipped] == [("base", 256, 16)]
    text = csv_text(table.fields, table.records)
    assert "too big" in text and len(text.splitlines()) == 1 + len(table.records)
    assert "| base |" in markdown_text(table)
    controlled = [r for r in table.records if r["view"] == "controlled" and r["context"] == 64]
    assert all(record["decode_ratio_to_base"] > 1 for record in controlled)


def test_figures_of_a_study(tmp_path: Path) -> None:
    study = small_study()
    write_results(study, tmp_path)
    _with_batches(tmp_path)
    results = collect(study, tmp_path)
    figure = efficiency_figures.speed(results)
    assert len(_visible(figure)) == len(efficiency_figures.PANELS)
    assert _places(figure.axes[0]) == [64, 256]
    drawn = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"uniform", "retrieval_aware", "base", "large", "cache by formula"} <= drawn
    batches = efficiency_figures.speed_batches(results)
    assert "64 tokens each" in batches.axes[0].get_xlabel()
    assert _places(batches.axes[0]) == [1, 4, 16]


# --- the verb --------------------------------------------------------------------------------


def test_default_contexts() -> None:
    assert verb.default_contexts(4096) == [512, 1024, 2048, 4096]
    assert verb.default_contexts(5000) == [512, 1024, 2048, 4096]
    assert verb.default_contexts(256) == [256]


def run_verb(*arguments: str) -> None:
    function, options = verb.VERBS["efficiency"]
    parser = argparse.ArgumentParser()
    for flag, keys in options:
        parser.add_argument(flag, **keys)
    function(parser.parse_args(list(arguments)))


def test_verb_on_a_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "base.json"
    run_verb("nano:base", "--contexts", "8", "16", "--decode-tokens", "2", "--output", str(out))
    printed = capsys.readouterr()
    assert "| nano:base | 1 | 16 |" in printed.out
    assert "16 tokens x 1" in printed.err
    assert [point["context"] for point in json.loads(out.read_text())["points"]] == [8, 16]


def test_verb_refuses() -> None:
    with pytest.raises(ValueError, match="name a model"):
        run_verb()
    with pytest.raises(ValueError, match="name a model"):
        run_verb("nano:base", "--paper", "retrieval_aware")
    with pytest.raises(ValueError, match="contexts: at least one context"):
        run_verb("nano:base", "--contexts", "1")
    with pytest.raises(ValueError, match="memory_limit"):
        run_verb("nano:base", "--memory-limit", "0")
