"""Speculative decoding of hybrids, the shared cache's rollback, and skipping under `generate`."""

from __future__ import annotations

from typing import Any

import models_fixture as fixture
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rad.mixers import MIXERS
from rad.models.convert import convert
from rad.selection import SelectionError, speculative
from rad.selection.acceptance import Calibration
from rad.selection.rollback import SharedCache
from rad.selection.speculative import (
    DraftExit,
    greedy_generate,
    skip_attention,
    speculative_generate,
)

SKIPS: list[tuple[int, ...]] = [(0,), (1, 2), (0, 1, 2)]


def hybrid(mixer: str, kind: str) -> Any:
    """A hybrid whose mixers matter enough for drafts without them to be rejected at times."""
    model = convert(
        fixture.base_model(), fixture.placement(kind), fixture.MIXERS[mixer], "qkvo", seed=3
    )
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(6)
    return model


def prompt(seed: int) -> torch.Tensor:
    return fixture.tokens(1, 9, seed)[0]


@pytest.mark.parametrize("mixer", sorted(MIXERS))
@pytest.mark.parametrize("kind", ["none", "heads", "mixed"])
def test_hybrids_decode_losslessly(mixer: str, kind: str) -> None:
    model = hybrid(mixer, kind)
    drafted = accepted = 0
    for skip in SKIPS:
        text = prompt(len(skip))
        plain = greedy_generate(model, text[None], 20)[0].tolist()
        output, counts = speculative_generate(
            model, text, skip, 20, max_draft=5, draft_exit=DraftExit(0.0, False)
        )
        assert output == plain
        drafted, accepted = drafted + counts.drafted, accepted + counts.accepted
    assert drafted > 0
    if (mixer, kind) != ("skip", "none"):  # where nothing is left to skip
        assert 0 < accepted < drafted, "partial acceptance is what is tested"


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_what_stays_in_the_cache_equals_one_full_pass(
    mixer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """States recomputed from kept inputs over many partial acceptances do not drift."""
    model = hybrid(mixer, "mixed")
    shared = SharedCache(model)
    monkeypatch.setattr(speculative, "SharedCache", lambda model: shared)
    text = prompt(2)
    output, counts = speculative_generate(
        model, text, (0, 1, 2), 24, max_draft=5, draft_exit=DraftExit(0.0, False)
    )
    assert 0 < counts.accepted < counts.drafted
    with torch.no_grad():
        whole = torch.cat([text, torch.tensor(output[:-1])])[None]
        full = model(whole, use_cache=True).past_key_values
    for index in (1, 2):  # layer 0 is whole
        mine, reference = shared.cache.mixer_state(index), full.mixer_state(index)
        assert (mine is None) == (reference is None) == (mixer == "skip")
        for name in reference or {}:
            torch.testing.assert_close(mine[name], reference[name], atol=2e-4, rtol=2e-4)
    for index in (0, 1):  # the layers that keep heads
        torch.testing.assert_close(
            shared.cache.layers[index].keys, full.layers[index].keys, atol=2e-4, rtol=2e-4
        )


def test_states_are_put_back_not_copied() -> None:
    model = hybrid("mamba2", "none")
    shared = SharedCache(model)
    text = prompt(1)[None]
    with torch.no_grad():
        with shared.verification():
            model(text, past_key_values=shared.cache, use_cache=True)
        shared.accept(9, 9)
        before = shared.cache.mixer_state(0)["ssm"]
        values = before.clone()
        for _ in range(3):
            model(text[:, :1], past_key_values=shared.cache, use_cache=True)
        assert shared.cache.mixer_state(0)["ssm"] is not before
        shared.forget_draft()
    assert shared.cache.mixer_state(0)["ssm"] is before
    assert torch.equal(before, values), "a mixer must leave the state that it is given alone"


@pytest.mark.parametrize("skip", [(0,), (1,), (0, 1, 2)])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_generate_counts_tokens_when_layers_are_skipped(skip: tuple[int, ...], family: str) -> None:
    model, manual = fixture.base_model(family), fixture.base_model(family)
    with torch.no_grad():
        for layer in skip:
            manual.model.layers[layer].self_attn.o_proj.weight.zero_()
    text = fixture.tokens(2, 9)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = manual.generate(text, **options)
    with skip_attention(model, skip):
        assert torch.equal(model.generate(text, **options), expected)


@pytest.mark.parametrize("kind", ["none", "layer", "heads", "mixed"])
@pytest.mark.parametrize("skip", [(0,), (0, 1, 2)])
def test_generate_counts_tokens_of_a_hybrid_too(kind: str, skip: tuple[int, ...]) -> None:
    model = hybrid("mamba2", kind)
    text = fixture.tokens(2, 9)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with skip_attention(model, skip):
        expected = model.generate(text, use_cache=False, **options)
        assert torch.equal(model.generate(text, **options), expected)


def test_models_that_cannot_be_rolled_back_or_searched_are_named() -> None:
    config = Qwen2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
    )
    bounded = Qwen2ForCausalLM(config).eval()
    with pytest.raises(SelectionError, match="sliding-window layers"):
        speculative_generate(bounded, torch.arange(3, 9), (0,), 4)
    with pytest.raises(SelectionError, match="is a hybrid: skip sets are searched on its base"):
        Calibration(hybrid("mamba2", "none"), fixture.tokens(2, 9), 8)
