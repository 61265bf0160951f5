"""Identities that conversion, the hybrid model and its cache must hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models_fixture import HEADS, KV_HEADS, LAYERS, MIXERS, base_model, placement, tokens
from transformers import AutoModelForCausalLM, DynamicCache

import rad  # noqa: F401  (registers the hybrids)
from rad.models.cache import HybridCache
from rad.models.convert import convert
from rad.models.hybrid import standardise
from rad.placement import Placement

KINDS = ["none", "layer", "heads", "mixed"]
FAMILIES = ["llama", "qwen2", "qwen3"]


def _close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_converted_is_the_base(family: str) -> None:
    base = base_model(family)
    hybrid = convert(base, placement("all"), MIXERS["mamba2"], "qkvo")
    assert torch.equal(hybrid(tokens()).logits, base(tokens()).logits)


@pytest.mark.parametrize("variant", ["zero", "gate_zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_zero_start_is_the_base_with_those_attentions_skipped(family: str, variant: str) -> None:
    base = base_model(family)
    hybrid = convert(base, placement("layer"), MIXERS["mamba2"], variant)
    skipped = convert(base, placement("layer"), MIXERS["skip"], "qkvo")
    for layer in (0, 2):
        torch.nn.init.zeros_(base.model.layers[layer].self_attn.o_proj.weight)
    _close(hybrid(tokens()).logits, base(tokens()).logits)
    _close(skipped(tokens()).logits, base(tokens()).logits)


def test_a_window_as_long_as_the_text_is_full_attention() -> None:
    base = base_model()
    settings = {"type": "sliding_window", "window": 64, "sinks": 0}
    for kind in KINDS:
        _close(
            convert(base, placement(kind), settings, "qkvo")(tokens()).logits, base(tokens()).logits
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mixer", list(MIXERS))
@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode_equal_one_forward(kind: str, mixer: str, family: str) -> None:
    hybrid = convert(base_model(family), placement(kind), MIXERS[mixer], "qkvo")
    ids = tokens()
    whole = hybrid(ids).logits
    cache = HybridCache(hybrid.config)
    parts = []
    for start, stop in [(0, 9), (9, 13), *((t, t + 1) for t in range(13, ids.shape[1]))]:
        parts.append(hybrid(ids[:, start:stop], past_key_values=cache, use_cache=True).logits)
        assert cache.get_seq_length() == stop
    _close(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("mixer", ["mamba2", "sliding_window"])
@pytest.mark.parametrize("kind", KINDS)
def test_left_padding_changes_nothing(kind: str, mixer: str) -> None:
    hybrid = convert(base_model(), placement(kind), MIXERS[mixer], "qkvo")
    ids = tokens(rows=1)
    alone = hybrid.generate(ids, max_new_tokens=6, do_sample=False)[:, ids.shape[1] :]
    pad = torch.zeros(1, 7, dtype=torch.long)
    batch = torch.cat([torch.cat([pad, ids], 1), tokens(rows=1, length=ids.shape[1] + 7, seed=3)])
    mask = (batch != 0).long()
    together = hybrid.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert together[0, batch.shape[1] :].tolist() == alone[0].tolist()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = hybrid(batch, attention_mask=mask, position_ids=positions).logits
    _close(padded[:1, 7:], hybrid(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_and_without_cache_agree(kind: str) -> None:
    hybrid = convert(base_model(), placement(kind), MIXERS["mamba2"], "qkvo")
    with_cache, without = (
        hybrid.generate(tokens(), max_new_tokens=8, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_through_the_auto_class(family: str, tmp_path: Path) -> None:
    hybrid = convert(base_model(family), placement("mixed"), MIXERS["mamba2"], "qkvo")
    hybrid.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(hybrid)
    assert torch.equal(again(tokens()).logits, hybrid(tokens()).logits)


def test_kept_heads_are_the_bases_heads() -> None:
    """With every other head's output removed, base and hybrid compute the same."""
    base = base_model()
    kept = placement("heads")
    hybrid = convert(base, kept, {**MIXERS["skip"]}, "qkvo")
    dim = base.config.hidden_size // HEADS
    with torch.no_grad():
        for layer in range(LAYERS):
            for head in set(range(HEADS)) - set(kept.kept_heads(layer)):
                weight = base.model.layers[layer].self_attn.o_proj.weight
                weight[:, head * dim : (head + 1) * dim] = 0
    _close(hybrid(tokens()).logits, base(tokens()).logits)


def test_a_layers_mixer_does_not_depend_on_the_other_layers() -> None:
    base = base_model()
    one = convert(base, placement("layer"), MIXERS["mamba2"], "qkvo", seed=4)
    two = convert(base, placement("none"), MIXERS["mamba2"], "qkvo", seed=4)
    for name, value in one.model.layers[0].self_attn.mixer.state_dict().items():
        assert torch.equal(value, two.model.layers[0].self_attn.mixer.state_dict()[name])


def test_zero_start_reaches_the_gate_and_dead_starts_are_avoided() -> None:
    """With all of in_proj zero, only the gate's rows get a gradient (RAD, section 3.2)."""
    base = base_model()
    hybrid = convert(base, placement("none"), MIXERS["mamba2"], "zero")
    hybrid(tokens()).logits.square().sum().backward()
    mixer = hybrid.model.layers[1].self_attn.mixer
    gate, rest = mixer.in_proj.weight.grad.split([mixer.sizes[0], sum(mixer.sizes[1:])], dim=0)
    assert gate.abs().max() > 0
    assert rest.abs().max() == 0


def test_standardise_copies_mean_and_deviation() -> None:
    torch.manual_seed(0)
    a, y = torch.randn(2, 5, 1, 8) * 7 + 3, torch.randn(2, 5, 3, 8)
    out = standardise(a, y)
    torch.testing.assert_close(out.mean((2, 3)), y.mean((2, 3)))
    torch.testing.assert_close(out.std((2, 3)), y.std((2, 3)), rtol=1e-3, atol=1e-4)


def test_cached_bytes_per_token_match_the_placement() -> None:
    for kind in KINDS:
        kept = placement(kind)
        hybrid = convert(base_model(), kept, MIXERS["mamba2"], "qkvo")
        cache = HybridCache(hybrid.config)
        hybrid(tokens(rows=1), past_key_values=cache, use_cache=True)
        heads = sum(
            layer.keys.shape[1]
            for layer in cache.layers
            if getattr(layer, "keys", None) is not None
        )
        assert heads == kept.cached_kv_heads()


def test_wrong_caches_masks_and_placements_are_refused() -> None:
    base = base_model()
    hybrid = convert(base, placement("none"), MIXERS["mamba2"], "qkvo")
    with pytest.raises(ValueError, match="HybridCache"):
        hybrid(tokens(), past_key_values=DynamicCache(), use_cache=True)
    with pytest.raises(ValueError, match="2-D attention mask"):
        hybrid(tokens(), attention_mask=torch.ones(2, 1, 21, 21))
    other = Placement(
        base="b", layers=9, heads=HEADS, kv_heads=KV_HEADS, softmax=[], selector="test"
    )
    with pytest.raises(ValueError, match="9 layers"):
        convert(base, other, MIXERS["mamba2"], "qkvo")
    with pytest.raises(ValueError, match="cannot start from"):
        convert(base, placement("none"), MIXERS["sliding_window"], "zero")
    with pytest.raises(ValueError, match="stage-1"):
        convert(base, placement("none"), MIXERS["mamba2"], "aligned")
