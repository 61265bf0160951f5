"""Zeroing heads, the retrieval probes and the ranking of heads."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import selection_models as models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rad.placement import Budget, BudgetError
from rad.selection import CostMeter, SelectionContext, SelectionError, calibration_rows, select
from rad.selection import probes as probe_module
from rad.selection.ablation import zero_heads
from rad.selection.probes import Probe
from rad.selection.retrieval_aware import ablate_heads, rank
from rad.settings import RetrievalAwareSettings


class Plain:
    """A tokenizer-like object with special ids only."""

    bos_token_id = 1
    all_special_ids = (0, 1, 2)


def context_of(model: Any, budget: Budget, **chosen: Any) -> SelectionContext:
    fields = {name: chosen.pop(name) for name in ("corpus",) if name in chosen}
    tokenizer = chosen.pop("tokenizer", Plain())
    small = {"probe": "copy", "samples": 4, "tokens": 24, "batch_size": 3}
    settings = RetrievalAwareSettings(**{**small, **chosen})
    return SelectionContext.for_model(model, budget, settings, tokenizer=tokenizer, **fields)


def build(context: SelectionContext) -> Probe:
    assert isinstance(context.settings, RetrievalAwareSettings)
    return probe_module.build(context, context.settings)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
def test_zeroing_heads_equals_zeroed_columns(bias: bool) -> None:
    model = models.random_llama(bias=bias)
    tokens = torch.from_numpy(models.random_rows(2, 12))
    manual = models.random_llama.__wrapped__(bias=bias)
    for layer, head in ((0, 1), (2, 0), (2, 3)):
        columns = slice(head * models.HEAD_DIM, (head + 1) * models.HEAD_DIM)
        manual.model.layers[layer].self_attn.o_proj.weight[:, columns] = 0
    intact = model(tokens).logits
    with zero_heads(model, [(0, 1), (2, 0), (2, 3)]):
        zeroed = model(tokens).logits
    torch.testing.assert_close(zeroed, manual(tokens).logits)
    assert torch.equal(model(tokens).logits, intact)
    assert (zeroed - intact).abs().max() > 0.01
    with pytest.raises(IndexError, match="no layer 0 head 4"), zero_heads(model, [(0, 4)]):
        pass


@torch.no_grad()
@pytest.mark.parametrize("build_model", [models.random_llama, models.random_qwen3])
def test_stored_prefixes_change_nothing(build_model: Any) -> None:
    """Re-running from the ablated layer equals whole passes with the head zeroed."""
    model = build_model()
    probe = build(context_of(model, Budget(heads=1)))
    meter = CostMeter()
    found = ablate_heads(model, probe, batch_size=3, meter=meter)

    def whole() -> tuple[float, float]:
        log = model(probe.tokens).logits.log_softmax(-1)
        margins, correct = probe.score(log[probe.rows[:, None], probe.positions - 1])
        return float(margins.mean()), float(correct.float().mean())

    assert whole() == pytest.approx((found.margin, found.accuracy), abs=1e-5)
    layers = found.margins.shape[0]
    for layer in range(layers):
        for head in range(models.HEADS):
            with zero_heads(model, [(layer, head)]):
                margin, accuracy = whole()
            assert float(found.margins[layer, head]) == pytest.approx(margin, abs=1e-5)
            assert float(found.accuracies[layer, head]) == pytest.approx(accuracy, abs=1e-5)
    batches = 2
    assert meter.forward_passes == batches * (layers * models.HEADS + 1)
    share = 1 + models.HEADS * sum(range(1, layers + 1)) / layers
    assert meter.tokens == pytest.approx(probe.tokens.numel() * share)


ANSWERS = range(16, 24)
QUERY = 12


def planted(layer: int, head: int) -> Any:
    """A model in which one head fetches the only answer token of the context.

    Width: 0-23 which token, 24 is an answer, 25 is the query, 26-49 what to say. Other heads are
    noise, MLPs are zero.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=64, intermediate_size=8, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_theta=1e9,
        initializer_range=0.02, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in (model.get_input_embeddings().weight, model.lm_head.weight):
            parameter.zero_()
        token = torch.arange(24)
        model.get_input_embeddings().weight[token, token] = 1.0
        model.get_input_embeddings().weight[list(ANSWERS), 24] = 1.0
        model.get_input_embeddings().weight[QUERY, 25] = 1.0
        model.lm_head.weight[token, 26 + token] = 4.0
        for block in model.model.layers:
            block.mlp.down_proj.weight.zero_()
        attention = model.model.layers[layer].self_attn
        group = head // 2
        # The last pair of a head's dimensions hardly rotates with the position.
        attention.q_proj.weight[head * 16 + 15, 25] = 8.0
        attention.k_proj.weight[group * 16 + 15, 24] = 8.0
        for index, answer in enumerate(ANSWERS):
            attention.v_proj.weight[group * 16 + index, answer] = 1.0
            attention.o_proj.weight[26 + answer, head * 16 + index] = 4.0
    return model


def fetch_probe(rows: int) -> Probe:
    """Fillers with one answer token among them, the query, the answer."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 10, (rows, 14), generator=generator)
    answers = torch.randint(16, 24, (rows,), generator=generator)
    tokens[torch.arange(rows), torch.randint(1, 11, (rows,), generator=generator)] = answers
    tokens[:, 12] = QUERY
    tokens[:, 13] = answers
    rivals = torch.tensor([[a for a in ANSWERS if a != int(answer)] for answer in answers])
    return Probe(tokens, torch.arange(rows), torch.full((rows, 1), 13), rivals[:, None])


@pytest.mark.parametrize("head", [(1, 2), (2, 1)])
def test_a_planted_head_is_found(head: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted(*head)
    monkeypatch.setitem(probe_module.PROBES, "copy", lambda *_: fetch_probe(32))
    placement = select(context_of(model, Budget(heads=1)))
    assert placement.softmax == [head]
    report = placement.provenance["probe"]
    assert report["intact_accuracy"] == 1
    assert report["accuracy_drop"][head[0]][head[1]] > 0.6
    assert placement.scores is not None
    drops = torch.tensor(placement.scores.values)
    planted_drop = float(drops[head])
    drops[head] = 0
    assert planted_drop > 2 and planted_drop > 10 * float(drops.abs().max())
    assert placement.kind(head[0]) == "hybrid"


def test_margin_and_correctness_of_one_and_two_tokens() -> None:
    tokens = torch.tensor([[5, 1, 0, 0], [5, 6, 2, 3]])
    probe = Probe(
        tokens,
        rows=torch.tensor([0, 1]),
        positions=torch.tensor([[1, -1], [2, 3]]),
        rivals=torch.tensor([[[2, 3], [-1, -1]], [[1, -1], [0, -1]]]),
    )
    p = torch.full((2, 2, 8), 0.01)
    p[0, 0, [1, 2, 3]] = torch.tensor([0.5, 0.3, 0.1])
    p[1, 0, [2, 1]] = torch.tensor([0.6, 0.2])
    p[1, 1, [3, 0, 7]] = torch.tensor([0.4, 0.1, 0.45])
    margins, correct = probe.score(p.log())
    # Two tokens: a rival that differs in the first loses to both, one in the second to that one.
    expected = min(math.log(0.6 * 0.4 / 0.2), math.log(0.4 / 0.1))
    assert margins.tolist() == pytest.approx([math.log(0.5 / 0.3), expected])
    assert correct.tolist() == [True, False], "token 7 is likelier than the answer's second"


def test_dictionary_probe_has_the_papers_format() -> None:
    from rad.data.nano import tokenizer

    loaded = tokenizer.load()
    context = context_of(
        models.random_llama(), Budget(heads=1), probe="dictionary", pairs=5, tokenizer=loaded
    )
    probe = build(context)
    for row in range(4):
        ids = probe.tokens[row]
        text = loaded.decode(ids[ids != 0].tolist(), skip_special_tokens=True)
        head, *pairs, question = text.split("\n")
        assert head == "Memorize the following dictionary:" and len(pairs) == 5
        stated = dict(pair.split(":") for pair in pairs)
        assert len(stated) == len(set(stated.values())) == 5
        key, value = question.removeprefix("The value of the key '").split("' is ")
        assert stated[key] == value
        where = probe.positions[row]
        answer = loaded.decode(ids[where[where >= 0]].tolist())
        assert answer.strip() == value
        assert int((probe.rivals[row] >= 0).sum()) == 4
    again = build(context)
    assert torch.equal(probe.tokens, again.tokens) and torch.equal(probe.rivals, again.rivals)


def test_nano_probe_asks_training_prompts_only() -> None:
    from rad.data.nano import split_of, tokenizer

    loaded = tokenizer.load()
    context = context_of(
        models.random_llama(), Budget(heads=1), probe="nano", tokens=64, tokenizer=loaded
    )
    probe = build(context)
    for row, where, rivals in zip(probe.rows, probe.positions, probe.rivals, strict=True):
        ids = probe.tokens[row, : where[where >= 0].min()]
        prompt = loaded.decode(ids.tolist(), skip_special_tokens=True)
        assert split_of(prompt) == "train"
        answer = loaded.decode(probe.tokens[row, where[0]].tolist())
        wrong = [loaded.decode([token]) for token in rivals[0].tolist() if token >= 0]
        assert wrong and answer not in wrong
        assert all(f"{value};" in prompt for value in [answer, *wrong])


@pytest.mark.parametrize("kind", ["copy", "repeat"])
def test_repeating_probes_ask_what_was_seen(kind: str, tmp_path: Path) -> None:
    corpus = models.write_corpus(tmp_path, models.random_rows(5, 40))
    probe = build(context_of(models.random_llama(), Budget(heads=1), probe=kind, corpus=corpus))
    assert probe.tokens.shape == (4, 24)
    for row, (place,), rivals in zip(probe.rows, probe.positions, probe.rivals, strict=True):
        before = probe.tokens[row, :place].tolist()
        answer = int(probe.tokens[row, place])
        assert answer in before
        wrong = {token for token in rivals[0].tolist() if token >= 0}
        assert answer not in wrong and wrong <= set(before)


def test_rank_breaks_ties_in_index_order() -> None:
    assert rank(torch.tensor([[0.0, 2.0], [2.0, 1.0]])) == [(0, 1), (1, 0), (1, 1), (0, 0)]


@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(count=st.integers(0, models.LAYERS * models.HEADS), seed=st.integers(0, 3))
def test_retrieval_aware_placement_is_valid(count: int, seed: int) -> None:
    placement = select(context_of(models.random_llama(), Budget(heads=count), seed=seed))
    assert len(placement.softmax) == count
    values = placement.scores.values if placement.scores else []
    kept = [values[layer][head] for layer, head in placement.softmax]  # type: ignore[index]
    others = sorted(v for row in values for v in row)[: models.LAYERS * models.HEADS - count]  # type: ignore[union-attr]
    assert not kept or not others or min(kept) >= max(others)
    assert placement.cost.tokens > 0


def test_budgets_and_missing_inputs_are_refused() -> None:
    model = models.random_llama()
    with pytest.raises(BudgetError, match="17 heads"):
        select(context_of(model, Budget(heads=17)))
    with pytest.raises(SelectionError, match="needs a corpus"):
        select(context_of(model, Budget(heads=1), probe="repeat"))
    context = context_of(model, Budget(heads=1))
    context.model = None
    with pytest.raises(SelectionError, match="needs the base model"):
        select(context)


def test_calibration_rows_are_seeded_and_different(tmp_path: Path) -> None:
    rows = models.random_rows(20, 8)
    folder = models.write_corpus(tmp_path, rows)
    first = calibration_rows(folder, 6, seed=1)
    assert first.shape == (6, 8)
    assert (first == calibration_rows(folder, 6, seed=1)).all()
    assert (first != calibration_rows(folder, 6, seed=2)).any()
    every = {tuple(row) for row in rows.tolist()}
    chosen = {tuple(row) for row in first.tolist()}
    assert len(chosen) == 6 and chosen <= every
