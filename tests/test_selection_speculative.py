"""Skipping attention, self-speculative decoding and its replay."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import selection_models as models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from rad.placement import Budget, BudgetError
from rad.selection import SelectionContext, SelectionError, select
from rad.selection.acceptance import Calibration, draft_cost
from rad.selection.rollback import SharedCache, crop_cache
from rad.selection.speculative import (
    DraftExit,
    Statistics,
    greedy_generate,
    skip_attention,
    speculative_generate,
)
from rad.settings import RadSettings

SKIPS: list[tuple[int, ...]] = [(), (0,), (2,), (0, 3), (1, 2, 3), (0, 1, 2, 3)]
EXITS = [DraftExit(0.0, False), DraftExit(0.5, True), DraftExit(1.0, False)]


def prompts(count: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(models.random_rows(count, length, seed))


@pytest.fixture(scope="module")
def model() -> Any:
    return models.random_llama()


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_skipping_equals_zeroed_output_projections(bias: bool) -> None:
    model = models.random_llama(bias=bias)
    tokens = prompts(2, 12)
    manual = models.random_llama.__wrapped__(bias=bias)
    for layer in (0, 2):
        for parameter in manual.model.layers[layer].self_attn.o_proj.parameters():
            parameter.zero_()
    intact = model(tokens).logits
    with skip_attention(model, {0, 2}):
        skipped = model(tokens).logits
    torch.testing.assert_close(skipped, manual(tokens).logits)
    assert torch.equal(model(tokens).logits, intact), "the block must leave no trace"
    assert (skipped - intact).abs().max() > 0.1


@torch.no_grad()
def test_skipping_computes_nothing_and_restores_after_errors(model: Any) -> None:
    calls: list[int] = []
    handle = model.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda *_: calls.append(1)
    )
    with pytest.raises(RuntimeError, match="stop"), skip_attention(model, [1]):
        model(prompts(1, 4))
        assert not calls
        raise RuntimeError("stop")
    model(prompts(1, 4))
    handle.remove()
    assert calls == [1]
    with pytest.raises(SelectionError, match="cannot skip layer 9"), skip_attention(model, [9]):
        pass


@torch.no_grad()
def test_plain_greedy_equals_generate(model: Any) -> None:
    tokens = prompts(3, 8)
    expected = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=10, do_sample=False,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(greedy_generate(model, tokens, 10), expected[:, 8:])


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("leave", EXITS)
def test_decoding_is_lossless(model: Any, skip: tuple[int, ...], leave: DraftExit) -> None:
    tokens = prompts(2, 9, seed=len(skip))
    expected = greedy_generate(model, tokens, 15).tolist()
    for prompt, plain in zip(tokens, expected, strict=True):
        output, counts = speculative_generate(
            model, prompt, skip, 15, max_draft=5, draft_exit=DraftExit(**vars(leave))
        )
        assert output == plain
        assert counts.emitted == 14
        assert counts.accepted + counts.verifications == counts.emitted


def test_decoding_is_lossless_for_other_architectures() -> None:
    model = models.random_qwen3()
    tokens = prompts(1, 9)
    output, _ = speculative_generate(model, tokens[0], {0, 2}, 15)
    assert output == greedy_generate(model, tokens, 15)[0].tolist()


def test_decoding_is_lossless_for_a_trained_model() -> None:
    model, tokenizer = models.stories()
    for text in ("Once upon a time", "Lily went to the park and"):
        prompt = tokenizer(text, return_tensors="pt")["input_ids"][0]
        plain = greedy_generate(model, prompt[None], 40)[0].tolist()
        for skip in ((), (1,), (0, 2, 4)):
            output, counts = speculative_generate(model, prompt, skip, 40)
            assert output == plain
            assert (counts.acceptance_rate == 1) == (skip == ())


def test_skipping_nothing_accepts_everything(model: Any) -> None:
    output, counts = speculative_generate(
        model, prompts(1, 6)[0], (), 19, max_draft=8, draft_exit=DraftExit(0.0, False)
    )
    assert len(output) == 19
    assert counts == Statistics(drafted=16, accepted=16, verifications=2, emitted=18)
    assert counts.acceptance_length == 9


def test_decoding_stops_at_the_stop_token(model: Any) -> None:
    prompt = prompts(1, 6)[0]
    plain = greedy_generate(model, prompt[None], 12)[0].tolist()
    stop = plain[5]
    output, _ = speculative_generate(model, prompt, (1,), 12, stop_token=stop)
    assert output == plain[: plain.index(stop) + 1]


def test_crop_shortens_layers_of_different_length() -> None:
    cache = DynamicCache()
    for layer, length in enumerate((7, 5, 3)):
        cache.update(torch.randn(1, 2, length, 4), torch.randn(1, 2, length, 4), layer)
    kept = [layer.keys[:, :, :5].clone() for layer in cache.layers]
    crop_cache(cache, 5)
    assert [layer.get_seq_length() for layer in cache.layers] == [5, 5, 3]
    assert all(torch.equal(a, b.keys) for a, b in zip(kept, cache.layers, strict=True))


@torch.no_grad()
def test_cache_holds_the_full_models_entries_after_decoding(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draft entries must be gone: what stays equals one full pass over the same tokens."""
    from rad.selection import speculative

    shared = SharedCache(model)
    monkeypatch.setattr(speculative, "SharedCache", lambda model: shared)
    prompt = prompts(1, 6)[0]
    output, _ = speculative_generate(model, prompt, (0, 2), 14)
    text = torch.cat([prompt, torch.tensor(output[:-1])])[None]
    full = model(text, use_cache=True).past_key_values
    for mine, reference in zip(shared.cache.layers, full.layers, strict=True):
        torch.testing.assert_close(mine.keys, reference.keys, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(mine.values, reference.values, atol=1e-5, rtol=1e-4)


def serial(
    model: Any, calibration: Calibration, skip: Collection[int], leave: DraftExit
) -> Statistics:
    """Counts of the serial loop over all prompts; the exit's state carries over."""
    total = Statistics()
    for prompt in calibration.prompts:
        _, counts = speculative_generate(
            model, prompt, skip, calibration.continuation.shape[1], max_draft=6, draft_exit=leave
        )
        for name, value in vars(counts).items():
            setattr(total, name, getattr(total, name) + value)
    return total


@pytest.mark.parametrize("skip", SKIPS)
@pytest.mark.parametrize("leave", EXITS)
def test_replay_equals_the_serial_loop(model: Any, skip: tuple[int, ...], leave: DraftExit) -> None:
    calibration = Calibration(model, prompts(3, 10), 14)
    expected = serial(model, calibration, skip, DraftExit(**vars(leave)))
    assert calibration.statistics(skip, 6, leave) == expected


def test_replay_equals_the_serial_loop_of_a_trained_model() -> None:
    model, tokenizer = models.stories()
    text = tokenizer("Once upon a time there was a little girl named Lily. She loved to play")
    rows = torch.tensor(text["input_ids"])[: 2 * 8].reshape(2, 8)
    calibration = Calibration(model, rows, 24)
    for skip in ((0,), (1, 3)):
        assert calibration.statistics(skip, 6) == serial(model, calibration, skip, DraftExit())


def test_matchness(model: Any) -> None:
    calibration = Calibration(model, prompts(3, 10), 14)
    assert calibration.matchness(()) == 1
    assert calibration.matchness((0, 1, 2, 3)) < 1


def test_adaptive_exit_moves_towards_its_target() -> None:
    leave = DraftExit(0.5)
    leave.update(drafted=4, accepted=0, max_draft=8)
    assert leave.threshold == pytest.approx(0.501)
    for _ in range(8):
        leave.update(drafted=4, accepted=4, max_draft=8)
    assert leave.threshold < 0.501
    before = leave.threshold
    leave.update(drafted=8, accepted=8, max_draft=8)
    assert leave.threshold == before, "a draft of full length says nothing about the exit"


def test_modelled_speed_up(model: Any) -> None:
    weights = sum(
        parameter.numel()
        for layer in (0, 3)
        for parameter in model.model.layers[layer].self_attn.parameters()
    )
    total = sum(parameter.numel() for parameter in model.parameters())
    total -= model.get_input_embeddings().weight.numel()
    assert draft_cost(model, (0, 3)) == pytest.approx(1 - weights / total)
    perfect = Statistics(drafted=8, accepted=8, verifications=1, emitted=9)
    assert perfect.speed_up(0.5) == pytest.approx(9 / 5)


def rad_context(folder: Path, budget: Budget, **settings: Any) -> SelectionContext:
    small = {"prompts": 2, "prompt_tokens": 8, "new_tokens": 6, "max_draft": 3, "initial": 1}
    corpus = models.write_corpus(folder, models.random_rows(6, 16))
    chosen = RadSettings(**{**small, "evaluations": 6, **settings})
    return SelectionContext.for_model(models.random_llama(), budget, chosen, corpus=corpus)


@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    count=st.integers(0, models.LAYERS * models.HEADS),
    objective=st.sampled_from(["acceptance", "speed_up", "matchness"]),
    evaluations=st.integers(1, 6),
)
def test_rad_placement_is_valid(
    tmp_path: Path, count: int, objective: str, evaluations: int
) -> None:
    context = rad_context(
        tmp_path, Budget(heads=count), objective=objective, evaluations=evaluations
    )
    if count % models.HEADS:
        with pytest.raises(BudgetError):
            select(context)
        return
    placement = select(context)
    kept = placement.kept_layers()
    assert len(placement.softmax) == count and len(kept) == count // models.HEADS
    report = placement.provenance["search"]
    assert sorted([*kept, *report["skipped"]]) == list(range(models.LAYERS))
    assert placement.cost.tokens > 0 and placement.cost.forward_passes > 0
    assert placement.scores is not None and len(placement.scores.values) == models.LAYERS


def test_rad_skips_the_attention_that_does_nothing(tmp_path: Path) -> None:
    model = models.random_llama.__wrapped__(seed=1)
    with torch.no_grad():
        for layer in (1, 2):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
    corpus = models.write_corpus(tmp_path, models.random_rows(8, 32))
    chosen = RadSettings(prompts=4, prompt_tokens=16, new_tokens=16)
    context = SelectionContext.for_model(model, Budget(layers=2), chosen, corpus=corpus)
    placement = select(context)
    assert placement.kept_layers() == [0, 3]
    assert placement.provenance["search"]["value"] == 1
    assert placement.provenance["search"]["exhaustive"]
    assert placement.provenance["search"]["random_mean"] < 1
    assert placement.scores is not None
    assert placement.scores.values[1:3] == [1, 1] and not placement.scores.higher_is_kept
    assert select(context).softmax == placement.softmax


def test_rad_names_what_is_missing(tmp_path: Path) -> None:
    context = rad_context(tmp_path, Budget(layers=2), prompt_tokens=40)
    with pytest.raises(SelectionError, match="prompt_tokens is 40"):
        select(context)
    with pytest.raises(SelectionError, match="calibration rows"):
        select(rad_context(tmp_path, Budget(layers=2), prompts=99))
    context.corpus = tmp_path / "nowhere"
    with pytest.raises(SelectionError, match="not a corpus folder"):
        select(context)
    context.corpus = None
    with pytest.raises(SelectionError, match="needs a corpus"):
        select(context)
