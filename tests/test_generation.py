"""Generation with every mixer: batches, caches, beams; the four traps of hybrid caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_fixture import MIXERS, base_model, placement, tokens
from transformers import StaticCache

from rad.models.cache import HybridCache
from rad.models.convert import convert

FORMS: dict[str, dict[str, Any]] = {
    **MIXERS,
    "gated_deltanet+conv": {**MIXERS["gated_deltanet"], "conv_size": 3, "conv_init": "default"},
    "parallel": {**MIXERS["discrete_mamba2"], "form": "parallel"},
}
KINDS = ["none", "layer", "heads", "mixed"]


def hybrid_of(mixer: str, kind: str, family: str = "llama") -> Any:
    hybrid = convert(base_model(family), placement(kind), FORMS[mixer], "qkvo")
    hybrid.generation_config.eos_token_id = None  # rows that end early would be padded
    return hybrid


def greedy(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    new = {"max_new_tokens": 6, "do_sample": False, **options}
    return model.generate(ids, **new)[:, ids.shape[1] :]


@pytest.mark.parametrize("mixer", list(FORMS))
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_different_lengths_in_one_batch(kind: str, mixer: str) -> None:
    """Trap 3: the library masks padding for attention only; left padding must change nothing."""
    hybrid = hybrid_of(mixer, kind)
    rows = [tokens(rows=1, length=n, seed=n) for n in (5, 14, 21)]
    alone = [greedy(hybrid, row)[0].tolist() for row in rows]
    longest = max(row.shape[1] for row in rows)
    batch = torch.cat([torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows])
    mask = torch.cat(
        [torch.nn.functional.pad(torch.ones_like(r), (longest - r.shape[1], 0)) for r in rows]
    )
    assert greedy(hybrid, batch, attention_mask=mask).tolist() == alone


@pytest.mark.parametrize("mixer", list(FORMS))
def test_chunked_prefill_equals_one_shot_prefill(mixer: str) -> None:
    hybrid = hybrid_of(mixer, "mixed")
    ids = tokens()
    whole = hybrid(ids, use_cache=True)
    cache = HybridCache(hybrid.config)
    for part in ids.split(6, dim=1):
        last = hybrid(part, past_key_values=cache, use_cache=True)
    torch.testing.assert_close(last.logits[:, -1], whole.logits[:, -1], rtol=1e-4, atol=1e-4)
    assert torch.equal(greedy(hybrid, ids, prefill_chunk_size=6), greedy(hybrid, ids))


@pytest.mark.parametrize("mixer", list(FORMS))
@pytest.mark.parametrize("kind", ["none", "heads"])
def test_beam_search_and_sampling_use_the_cache_correctly(kind: str, mixer: str) -> None:
    """Beams are reordered at every step, recurrent states with them."""
    hybrid = hybrid_of(mixer, kind)
    ids = tokens()
    beams = [greedy(hybrid, ids, num_beams=3, use_cache=use) for use in (True, False)]
    assert torch.equal(*beams)
    sampled = []
    for use in (True, False):
        torch.manual_seed(7)
        sampled.append(greedy(hybrid, ids, do_sample=True, use_cache=use))
    assert torch.equal(*sampled)


@pytest.mark.parametrize("mixer", list(FORMS))
def test_memory_of_mixer_layers_does_not_grow_while_decoding(mixer: str) -> None:
    hybrid = hybrid_of(mixer, "layer")
    sizes = []
    cache = HybridCache(hybrid.config)
    ids = tokens(length=12)
    for _ in range(5):
        ids = hybrid(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        layer: Any = cache.layers[0]
        held = [t for t in layer.recurrent_states.values() if t is not None]
        sizes.append(sum(t.untyped_storage().nbytes() for t in held))
    assert len(set(sizes)) == 1
    mixer_layers = [layer.self_attn.mixer for layer in hybrid.model.layers[0::2]]
    spec = mixer_layers[0].state_bytes(torch.float32, 16)
    assert sizes[0] == 2 * spec  # two sequences


@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet"])
def test_a_mixer_without_a_conv_decodes_from_its_state(mixer: str) -> None:
    """Trap 1: the library's flag for "there is a state" is set by conv states only."""
    hybrid = hybrid_of(mixer, "none")
    ids = tokens()
    cache = HybridCache(hybrid.config)
    hybrid(ids[:, :-1], past_key_values=cache, use_cache=True)
    assert cache.mixer_state(0) is not None
    stepped = hybrid(ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(stepped, hybrid(ids).logits[:, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", list(FORMS))
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_student_without_attention_counts_its_tokens(family: str, mixer: str) -> None:
    """Trap 2: the library asks an attention layer for the position; here there is none."""
    hybrid = hybrid_of(mixer, "none", family)
    cache = HybridCache(hybrid.config)
    hybrid(tokens(length=9), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 9
    cached, plain = (greedy(hybrid, tokens(), use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_static_caches_are_refused() -> None:
    """Trap 4: a cache that is laid out early does not know recurrent states."""
    hybrid = hybrid_of("mamba2", "layer")
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        greedy(hybrid, tokens(), cache_implementation="static")
    with pytest.raises(ValueError, match="HybridCache"):
        hybrid(tokens(), past_key_values=StaticCache(hybrid.config, max_cache_len=64))


def test_a_cache_can_be_used_again_after_reset() -> None:
    hybrid = hybrid_of("mamba2", "mixed")
    cache = HybridCache(hybrid.config)
    first = hybrid(tokens(), past_key_values=cache, use_cache=True).logits
    cache.reset()
    assert cache.get_seq_length() == 0
    again = hybrid(tokens(), past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(again, first)
