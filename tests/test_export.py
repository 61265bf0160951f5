"""An exported hybrid is the same function in transformers' own GraniteMoeHybrid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from models_fixture import MIXERS, base_model, tokens
from selection_models import stories
from transformers import AutoModelForCausalLM, AutoTokenizer

from rad.models.convert import convert
from rad.models.export import ExportError, export, to_granite
from rad.placement import Placement

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, a kv head per query head": ("llama", {"num_key_value_heads": 4}),
    "llama, one kv head": ("llama", {"num_key_value_heads": 1}),
    "llama, all biases of attention": ("llama", {"attention_bias": True}),
    "llama, heads twice as wide": ("llama", {"head_dim": 16}),
    "llama, rope of llama 3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "llama, linear rope": ("llama", {"rope_parameters": LINEAR}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, rope base": ("qwen2", {"rope_parameters": LINEAR | {"rope_theta": 1e6}}),
}


def layer_wise(base: Any, kept: tuple[int, ...] = (1,), **mixer: Any) -> Any:
    """A hybrid that keeps whole layers; no parameter of its mixers has a value of its own."""
    config = base.config
    heads = config.num_attention_heads
    hybrid = convert(
        base,
        Placement(
            base="base",
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=config.num_key_value_heads,
            softmax=[(layer, head) for layer in kept for head in range(heads)],
            selector="test",
        ),
        MIXERS["mamba2"] | mixer,
        "qkvo",
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer, block in enumerate(hybrid.model.layers):
            if layer not in kept:
                for parameter in block.self_attn.parameters():
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
                block.self_attn.mixer.dt_bias.add_(2.0)  # so that the state matters beside D
    return hybrid


def _reload(folder: Path) -> Any:
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model.eval()


def _greedy(model: Any, prompt: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    mask = torch.ones_like(prompt) if mask is None else mask
    return model.generate(  # type: ignore[no-any-return]
        prompt, attention_mask=mask, max_new_tokens=16, min_new_tokens=16, do_sample=False
    )


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_same_function_after_reload(name: str, tmp_path: Path) -> None:
    family, changes = MODELS[name]
    hybrid = layer_wise(base_model(family, **changes))
    report = export(hybrid, tmp_path / "granite")
    granite = _reload(tmp_path / "granite")
    assert type(granite).__name__ == "GraniteMoeHybridForCausalLM"
    prompt = tokens(3, 100)  # beyond original_max_position_embeddings and several chunks
    expected = hybrid(prompt).logits
    _close(granite(prompt).logits, expected)
    assert torch.equal(granite(prompt).logits, to_granite(hybrid)(prompt).logits)
    assert torch.equal(_greedy(granite, tokens()), _greedy(hybrid, tokens()))
    assert report["max_logit_difference"] < 1e-4
    assert report["layer_types"] == ["mamba", "attention", "mamba"]


@pytest.mark.parametrize("kept", [(0,), (0, 2), (0, 1, 2)])
@torch.no_grad()
def test_any_layer_may_stay(kept: tuple[int, ...]) -> None:
    hybrid = layer_wise(base_model(), kept)
    _close(to_granite(hybrid)(tokens()).logits, hybrid(tokens()).logits)


@pytest.mark.parametrize("mixer", [{"conv_size": 1}, {"conv_size": 2}, {"conv_size": 6}])
@torch.no_grad()
def test_other_convolution_widths(mixer: dict[str, Any], tmp_path: Path) -> None:
    hybrid = layer_wise(base_model(), **mixer)
    notes = export(hybrid, tmp_path / "granite")["notes"]
    granite = _reload(tmp_path / "granite")
    assert torch.equal(_greedy(granite, tokens()), _greedy(hybrid, tokens()))
    assert any("convolution's width" in note for note in notes) == (mixer["conv_size"] != 2)


@torch.no_grad()
def test_left_padded_batch() -> None:
    hybrid = layer_wise(base_model())
    granite = to_granite(hybrid)
    prompt = tokens(3, 20)
    mask = torch.ones_like(prompt)
    mask[1, :7], mask[2, :13] = 0, 0
    prompt = prompt * mask
    generated = _greedy(granite, prompt, mask)
    assert torch.equal(generated, _greedy(hybrid, prompt, mask))
    assert torch.equal(generated[2:, 13:], _greedy(hybrid, prompt[2:, 13:]))
    real = mask.bool()
    padded = [model(prompt, attention_mask=mask).logits[real] for model in (granite, hybrid)]
    _close(padded[0], padded[1])


@torch.no_grad()
def test_trained_model(tmp_path: Path) -> None:
    base, tokenizer = stories()
    hybrid = layer_wise(base, (1, 3))
    export(hybrid, tmp_path / "granite", tokenizer)
    granite = _reload(tmp_path / "granite")
    prompt = AutoTokenizer.from_pretrained(tmp_path / "granite")(
        "Once upon a time", return_tensors="pt"
    )
    ids = prompt["input_ids"]
    assert torch.equal(ids, tokenizer("Once upon a time", return_tensors="pt")["input_ids"])
    _close(granite(ids).logits, hybrid(ids).logits)
    assert torch.equal(_greedy(granite, ids), _greedy(hybrid, ids))
    # with every layer kept, it is the trained model itself
    whole = to_granite(layer_wise(base, tuple(range(base.config.num_hidden_layers))))
    assert torch.equal(_greedy(whole, ids), _greedy(base, ids))


def test_half_precision_keeps_its_dtype(tmp_path: Path) -> None:
    hybrid = layer_wise(base_model().to(torch.bfloat16))
    report = export(hybrid, tmp_path / "granite")
    granite = AutoModelForCausalLM.from_pretrained(tmp_path / "granite")
    assert granite.dtype == torch.bfloat16
    assert granite.model.rotary_emb.inv_freq.dtype == torch.float32
    assert report["max_logit_difference"] < 0.2


def test_report_and_files(tmp_path: Path) -> None:
    hybrid = layer_wise(base_model("qwen2"), chunk=7)
    hybrid.train()
    folder = tmp_path / "new" / "granite"
    report = export(hybrid, folder)
    assert hybrid.training, "the caller's model is left as it was"
    before = sum(parameter.numel() for parameter in hybrid.parameters())
    # two layers: x and B rows for 2 more heads of 8 (weights, bias; taps, bias), a bias of out_proj
    repeated = 2 * 2 * 8 * (32 + 1 + 4 + 1)
    assert report["parameters"]["before"] == before
    assert report["parameters"]["after"] == before + 2 * (repeated + 32) + 32
    assert any("equal length" in note for note in report["notes"])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # names and keys that releases before transformers 5 read
    assert config["layer_types"] == ["mamba", "attention", "mamba"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["mamba_chunk_size"] == 8
    assert "head_dim" not in config
    assert (folder / "model.safetensors").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["granite"], "nothing temporary"
    json.dumps(report)


def test_scaled_rope_is_written_twice(tmp_path: Path) -> None:
    export(layer_wise(base_model(rope_parameters=LLAMA3)), tmp_path / "granite")
    config = json.loads((tmp_path / "granite" / "config.json").read_text(encoding="utf-8"))
    assert config["rope_scaling"] == config["rope_parameters"] == LLAMA3


def test_folder_in_use(tmp_path: Path) -> None:
    hybrid = layer_wise(base_model())
    (tmp_path / "empty").mkdir()
    export(hybrid, tmp_path / "empty")
    written = (tmp_path / "empty" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"holds (a model|files) already"):
        export(layer_wise(base_model(seed=1)), tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").read_bytes() == written


def test_a_difference_stops_the_export(tmp_path: Path) -> None:
    hybrid = layer_wise(base_model())
    # a mixer that computes something the target does not
    hybrid.model.layers[0].self_attn.mixer.register_forward_hook(
        lambda module, inputs, output: (1.01 * output[0], output[1])
    )
    with pytest.raises(ExportError, match="logits differ by"):
        export(hybrid, tmp_path / "granite")
    assert list(tmp_path.iterdir()) == []


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "q/k norms": ("qwen3", {}, "normalises queries and keys"),
    "not a multiple": ("llama", {"head_dim": 10}, "not a multiple of the hidden size 32"),
    "mlp bias": ("llama", {"mlp_bias": True}, "mlp_bias"),
    "activation": ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "partial rotary": (
        "llama",
        {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_bases(name: str, tmp_path: Path) -> None:
    family, changes, message = REFUSED[name]
    hybrid = layer_wise(base_model(family, **changes))
    with pytest.raises(ExportError, match=message) as caught:
        export(hybrid, tmp_path / "granite")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mixer", "softmax", "message"),
    [
        ("skip", [(1, head) for head in range(4)], "mixer 'skip'"),
        ("sliding_window", [(1, head) for head in range(4)], "mixer 'sliding_window'"),
        ("mamba2", [(1, 0), (1, 3)], "layer 1: it keeps 2 of 4 heads"),
        ("mamba2", [], "keeps no attention"),
    ],
)
def test_refused_hybrids(mixer: str, softmax: list[tuple[int, int]], message: str) -> None:
    placement = Placement(
        base="base", layers=3, heads=4, kv_heads=2, softmax=softmax, selector="test"
    )
    with pytest.raises(ExportError, match=message):
        to_granite(convert(base_model(), placement, MIXERS[mixer], "qkvo"))


def test_refused_attention() -> None:
    hybrid = layer_wise(base_model("qwen2"))
    hybrid.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ExportError, match="layer 1: its attention is 'sliding_attention'"):
        to_granite(hybrid)


def test_refused_families() -> None:
    with pytest.raises(ExportError, match="only hybrids"):
        to_granite(base_model())
    hybrid = layer_wise(base_model())
    hybrid.config.model_type = "rad_granite"  # a family of its own multipliers, say
    with pytest.raises(ExportError, match="known: rad_llama, rad_qwen2"):
        to_granite(hybrid)
