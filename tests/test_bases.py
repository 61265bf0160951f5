"""Which decoders can be a base, and that what makes each of them special survives conversion."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from models_fixture import HEADS, LAYERS, MIXERS, SHAPE, base_model, placement, tokens
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import rad  # noqa: F401  (registers the hybrids)
from rad.models.convert import convert
from rad.placement import Placement

SHARED = Path(os.environ.get("RAD_SHARED", Path(__file__).parents[2] / "shared"))
STORIES = SHARED / "models/stories260K-hf"
# family -> what makes it special
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 16, "attention_bias": True},
    "mistral": {"sliding_window": None, "head_dim": 8},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "granite": {"attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "gemma": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "qwen3_moe": {
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "olmo2": {},
}
ROPES = [
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 32},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
]
WINDOW = {"type": "sliding_window", "window": 64, "sinks": 0}  # as long as any text here


def small(family: str, **changes: Any) -> Any:
    """A tiny random model of any family of transformers, weights large enough to matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES.get(family, {}), **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_families_convert_decode_save_and_load(family: str, tmp_path: Path) -> None:
    base = small(family)
    same = convert(base, placement("all"), MIXERS["mamba2"], "qkvo")
    assert torch.equal(same(tokens()).logits, base(tokens()).logits)
    hybrid = convert(base, placement("layer"), MIXERS["mamba2"], "qkvo")
    cached, plain = (
        hybrid.generate(tokens(), max_new_tokens=5, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)
    hybrid.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.model_type == f"rad_{family}"
    assert torch.equal(again(tokens()).logits, hybrid(tokens()).logits)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "olmo2"])
def test_single_heads_keep_the_familys_own_attention(family: str) -> None:
    """A window as long as the text is full attention: split into heads, nothing changes."""
    base = small(family)
    for kind in ("heads", "mixed", "none"):
        hybrid = convert(base, placement(kind), WINDOW, "qkvo")
        _close(hybrid(tokens()).logits, base(tokens()).logits)


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_rope_scaling_is_the_bases(family: str, rope: dict[str, Any]) -> None:
    scaled = dict(rope)
    room = scaled.pop("max_position_embeddings", 128)
    base = base_model(
        family, rope_parameters={"rope_theta": 1e4, **scaled}, max_position_embeddings=room
    )
    plain = base_model(family)
    ids = tokens(length=60)
    assert not torch.allclose(base(ids).logits, plain(ids).logits, atol=1e-3)
    for kind in ("all", "heads", "none"):
        hybrid = convert(base, placement(kind), WINDOW, "qkvo")
        _close(hybrid(ids).logits, base(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_decays_and_frequencies_in_single(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    base = base_model().to(dtype)
    hybrid = convert(base, placement("mixed"), MIXERS["mamba2"], "qkvo")
    hybrid.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for model in (hybrid, again):
        mixer = model.model.layers[1].self_attn.mixer
        assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
        assert mixer.in_proj.weight.dtype == dtype
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    mine, theirs = hybrid(tokens()).logits, again(tokens()).logits
    assert mine.dtype == dtype and torch.equal(mine, theirs)


@pytest.mark.parametrize("form", ["slots", "parallel"])
@pytest.mark.parametrize("mixer", [name for name in MIXERS if name != "skip"])
def test_compiles_and_checkpoints(mixer: str, form: str) -> None:
    """One graph under torch.compile; activation checkpointing gives the same gradients."""
    if mixer == "sliding_window" and form == "parallel":
        pytest.skip("sliding_window has one form")
    settings = {**MIXERS[mixer], "form": form} if form == "parallel" else MIXERS[mixer]
    hybrid = convert(base_model(), placement("heads"), settings, "qkvo")
    ids = tokens()
    torch.compiler.reset()  # the code was compiled for the other cases too
    compiled = torch.compile(hybrid, backend="eager", fullgraph=True)
    _close(compiled(ids, use_cache=False).logits, hybrid(ids, use_cache=False).logits)
    gradients = []
    hybrid.train()
    for checkpointing in (False, True):
        if checkpointing:
            hybrid.activation_checkpointing_enable()
        hybrid.zero_grad()
        hybrid(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in hybrid.parameters() if p.grad is not None])
    for plain, saved in zip(*gradients, strict=True):
        _close(saved, plain)


def test_unsupported_bases_are_refused_with_one_line() -> None:
    keep = placement("layer")
    fused = small("phi3", pad_token_id=0, num_key_value_heads=HEADS)
    latent = small(
        "deepseek_v3",
        num_key_value_heads=HEADS,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        first_k_dense_replace=9,
    )
    for base, missing in (
        (fused, "no linear q_proj, k_proj, v_proj"),
        (latent, "no linear q_proj, k_proj, v_proj"),
        (small("mistral", sliding_window=16), "sliding window of 16 tokens"),
        (small("gpt2", n_layer=LAYERS, n_head=HEADS, n_embd=32), r"no model\.layers"),
    ):
        with pytest.raises(ValueError, match=missing) as caught:
            convert(base, keep, MIXERS["mamba2"], "qkvo")
        assert "\n" not in str(caught.value) and base.config.model_type in str(caught.value)
    hybrid = convert(base_model(), keep, MIXERS["mamba2"], "qkvo")
    with pytest.raises(ValueError, match="it is a hybrid already"):
        convert(hybrid, keep, MIXERS["mamba2"], "qkvo")
    with pytest.raises(ValueError, match=r"q_norm\.weight spans all heads; convert whole layers"):
        convert(small("olmo2"), placement("heads"), MIXERS["mamba2"], "qkvo")


@pytest.mark.skipif(not STORIES.exists(), reason=f"{STORIES} is not there")
def test_a_trained_base_is_reproduced_exactly() -> None:
    folder = STORIES
    base = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = base.config
    everything = Placement.from_layers(
        list(range(config.num_hidden_layers)),
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        base="stories",
        selector="all",
    )
    hybrid = convert(base, everything, MIXERS["mamba2"], "qkvo")
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert torch.equal(hybrid(ids).logits, base(ids).logits)
    texts = [
        tokenizer.decode(model.generate(ids, max_new_tokens=60, do_sample=False)[0])
        for model in (base, hybrid)
    ]
    assert texts[0] == texts[1]
