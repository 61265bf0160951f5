"""Sampled acceptance leaves the full model's distribution as it is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rad.selection.sampling import Greedy, Sampled, rule_for
from rad.selection.speculative import DraftExit, plain_generate, speculative_generate


def chi_square_score(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square of counts (cells) as a standard normal score (Wilson-Hilferty).

    Cells in which fewer than five are expected are pooled.
    """
    rare = expected < 5
    pooled = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    wanted = torch.cat([expected[~rare], expected[rare].sum()[None]])
    present = wanted > 0
    assert not pooled[~present].any(), "a token of probability zero was written"
    value = float(((pooled - wanted)[present] ** 2 / wanted[present]).sum())
    freedom = int(present.sum()) - 1
    spread = 2 / (9 * freedom)
    return ((value / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 1.5


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.0, 0.7)])
def test_the_rule_keeps_the_distribution(temperature: float, top_p: float) -> None:
    rule = Sampled(temperature, top_p, seed=5)
    draft, full = logits(1, 12), logits(2, 2, 12)
    counts, drawn = torch.zeros(12), torch.zeros(12)
    draws, accepted = 8000, 0
    for _ in range(draws):
        token, _, q = rule.propose(draft)
        drawn[token] += 1
        kept, own = rule.verify([token], [q], full)
        accepted += kept
        counts[token if kept else own] += 1
    expected = rule.distribution(full[0]) * draws
    assert chi_square_score(counts, expected) < 3
    # the share accepted is the overlap of the two distributions (Leviathan et al., section 3.2)
    overlap = float(torch.minimum(rule.distribution(draft), rule.distribution(full[0])).sum())
    assert accepted / draws == pytest.approx(overlap, abs=4 * 0.5 / math.sqrt(draws))
    if top_p == 1:
        assert chi_square_score(drawn, expected) > 10, "the test tells the draft's apart"


def small_model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(4)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        bos_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_decoding_keeps_the_joint_distribution() -> None:
    """Four tokens: by chance of acceptance drafted, corrected, or the full model's own."""
    vocabulary, length, draws = 4, 4, 2000
    model = small_model(vocabulary)
    prompt = torch.tensor([1, 3, 0])
    texts = torch.tensor(list(itertools.product(range(vocabulary), repeat=length)))
    rows = torch.cat([prompt.expand(len(texts), -1), texts], 1)
    steps = model(rows).logits.double().log_softmax(-1)[:, len(prompt) - 1 : -1]
    exact = steps.gather(-1, texts[..., None]).sum((1, 2)).exp()
    assert float(exact.sum()) == pytest.approx(1, abs=1e-5)

    rule, leave = Sampled(seed=7), DraftExit(0.3, True)
    counts = torch.zeros(vocabulary**length)
    drafted = accepted = 0
    place = torch.tensor([vocabulary**power for power in range(length - 1, -1, -1)])
    for _ in range(draws):
        output, found = speculative_generate(
            model, prompt, (0, 1), length, rule=rule, draft_exit=leave
        )
        counts[int((torch.tensor(output) * place).sum())] += 1
        drafted, accepted = drafted + found.drafted, accepted + found.accepted
    assert chi_square_score(counts, exact * draws) < 3
    assert 0.2 < accepted / drafted < 0.95, "both outcomes must occur"


def test_the_same_seed_draws_the_same_tokens() -> None:
    model, prompt = small_model(8), torch.tensor([1, 2, 3])

    def draw(seed: int) -> list[int]:
        return speculative_generate(model, prompt, (0,), 20, rule=Sampled(seed=seed))[0]

    assert draw(1) == draw(1) != draw(2)
    assert len(plain_generate(model, prompt, 5, rule=Sampled(seed=1))) == 5


def test_a_distribution_keeps_the_smallest_set_of_the_mass_asked_for() -> None:
    values = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = Sampled(top_p=0.79).distribution(values)
    torch.testing.assert_close(kept, torch.tensor([0.625, 0.375, 0, 0], dtype=torch.float64))
    assert Sampled(top_p=0.01).distribution(values).tolist() == [1, 0, 0, 0]


def test_rules_by_temperature() -> None:
    assert isinstance(rule_for(0.0), Greedy)
    assert isinstance(rule_for(0.5), Sampled)
    with pytest.raises(ValueError, match="temperature is -1"):
        rule_for(-1.0)
    with pytest.raises(ValueError, match="top_p is 0"):
        rule_for(1.0, top_p=0)
