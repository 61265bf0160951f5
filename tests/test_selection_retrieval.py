"""Zeroing heads, their scores on a probe, and which of them are kept."""

from __future__ import annotations

from typing import Any

import pytest
import selection_models as models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from retrieval_fixture import build, context_of, nano

from rad.placement import Budget, BudgetError
from rad.selection import CostMeter, SelectionError, select
from rad.selection import probes as probe_module
from rad.selection.ablation import zero_heads
from rad.selection.head_ablation import ablate_heads, gate_gradients
from rad.selection.probes import Probe
from rad.selection.retrieval_aware import rank
from rad.settings import RetrievalAwareSettings


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
@pytest.mark.parametrize("head_batch", [1, 3])
def test_stored_prefixes_change_nothing(build_model: Any, head_batch: int) -> None:
    """Re-running from the ablated layer, heads side by side, equals whole passes with it zeroed."""
    model = build_model()
    probe = build(context_of(model, Budget(heads=1)))
    meter = CostMeter()
    found = ablate_heads(model, probe, batch_size=3, meter=meter, head_batch=head_batch)

    def whole(measure: str) -> list[float]:
        log = model(probe.tokens).logits.log_softmax(-1)
        margins, correct = probe.score(log[probe.rows[:, None], probe.positions - 1])
        value = {"margin": margins, "accuracy": correct.float()}[measure]
        return [float(value[probe.rows == row].mean()) for row in range(len(probe.tokens))]

    layers = found.zeroed["margin"].shape[0]
    for measure in ("margin", "accuracy"):
        assert found.intact[measure].tolist() == pytest.approx(whole(measure), abs=1e-5)
        for layer in range(layers):
            for head in range(models.HEADS):
                with zero_heads(model, [(layer, head)]):
                    expected = whole(measure)
                mine = found.zeroed[measure][layer, head].tolist()
                assert mine == pytest.approx(expected, abs=1e-5)
    batches = 2
    passes = layers * -(-models.HEADS // head_batch)
    assert meter.forward_passes == batches * (passes + 1)
    share = 1 + models.HEADS * sum(range(1, layers + 1)) / layers
    assert meter.tokens == pytest.approx(probe.tokens.numel() * share)


@torch.no_grad()
def test_gate_gradients_are_the_slope_of_the_margin() -> None:
    """Against a finite difference: a head scaled a little by its columns of `o_proj`."""
    model = models.random_llama.__wrapped__().double()
    probe = build(context_of(model, Budget(heads=1)))
    slopes = gate_gradients(model, probe, batch_size=3, gates=(1.0,))

    def margin() -> float:
        log = model(probe.tokens).logits.log_softmax(-1)
        return float(probe.score(log[probe.rows[:, None], probe.positions - 1])[0].double().mean())

    for layer, head in ((0, 1), (2, 3)):
        weight = model.model.layers[layer].self_attn.o_proj.weight
        columns = slice(head * models.HEAD_DIM, (head + 1) * models.HEAD_DIM)
        kept, values = weight[:, columns].clone(), []
        for scale in (1.001, 0.999):  # small: no other wrong token becomes the likeliest
            weight[:, columns] = kept * scale
            values.append(margin())
        weight[:, columns] = kept
        slope = (values[0] - values[1]) / 2e-3
        assert float(slopes[layer, head]) == pytest.approx(slope, rel=0.02, abs=2e-4)


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
    assert report["intact_accuracy"] == report["intact_candidate_accuracy"] == 1
    assert report["chance"] == pytest.approx(1 / len(ANSWERS))
    assert report["accuracy_drop"][head[0]][head[1]] > 0.6
    assert placement.scores is not None
    drops = torch.tensor(placement.scores.values)
    planted_drop = float(drops[head])
    drops[head] = 0
    assert planted_drop > 2 and planted_drop > 10 * float(drops.abs().max())
    assert placement.kind(head[0]) == "hybrid"
    assert report["stability"] == {
        "of": "halves",
        "spearman": pytest.approx(1, abs=1),
        "overlap_of_kept": 1,
    }
    by_accuracy = select(context_of(model, Budget(heads=1), score="accuracy"))
    assert by_accuracy.softmax == [head]
    with pytest.raises(SelectionError, match=r"right in 1.000 .* share the cut; use score margin"):
        select(context_of(model, Budget(heads=2), score="accuracy", unfit_probe="error"))
    filtered = select(context_of(model, Budget(heads=1), prefilter=0.1, prefilter_recall=True))
    assert filtered.softmax == [head]
    assert filtered.provenance["probe"]["prefilter"]["recall"] == {"of_first": 1, "found": 1}


def test_standard_errors_and_stability_are_those_of_the_rows() -> None:
    model = models.random_llama()
    report = select(context_of(model, Budget(heads=6), seeds=2)).provenance["probe"]
    assert report["rows"] == 8 and report["stability"]["of"] == "seeds"
    drops = []
    for seed in (0, 1):
        probe = build(context_of(model, Budget(heads=6), seed=seed))
        drops.append(ablate_heads(model, probe, batch_size=3).drop("margin"))
    both = torch.cat(drops, dim=-1)
    error = both.std(-1) / 8**0.5
    for name, expected in (("margin_drop", both.mean(-1)), ("margin_drop_error", error)):
        torch.testing.assert_close(torch.tensor(report[name], dtype=torch.float64), expected)
    first, second = (set(rank(drop.mean(-1))[:6]) for drop in drops)
    assert report["stability"]["overlap_of_kept"] == pytest.approx(len(first & second) / 6)


def test_controls_keep_as_many_other_heads() -> None:
    model = models.random_llama()
    kept = {
        control: select(context_of(model, Budget(heads=4), control=control))
        for control in ("none", "bottom", "shifted", "random")
    }
    ranking = [tuple(pair) for pair in kept["none"].provenance["probe"]["ranking"]]
    assert kept["none"].softmax == sorted(ranking[:4])
    assert kept["bottom"].softmax == sorted(ranking[-4:])
    assert kept["shifted"].softmax == sorted(ranking[12:]), "by default 3 k ranks further down"
    near = select(context_of(model, Budget(heads=4), control="shifted", shift=4))
    assert near.softmax == sorted(ranking[4:8])
    assert len(kept["random"].softmax) == 4 and kept["random"].cost.forward_passes == 0
    draws = {
        tuple(select(context_of(model, Budget(heads=4), control="random", seed=seed)).softmax)
        for seed in (0, 0, 1)
    }
    assert len(draws) == 2
    with pytest.raises(SelectionError, match="set shift to at most 12"):
        select(context_of(model, Budget(heads=4), control="shifted", shift=13))


def test_a_threshold_keeps_what_scores_above_it() -> None:
    model = models.random_llama()
    placement = select(context_of(model, Budget(heads=5)))
    assert placement.scores is not None
    values = sorted((v for row in placement.scores.values for v in row), reverse=True)  # type: ignore[union-attr]
    between = (values[4] + values[5]) / 2
    same = select(context_of(model, Budget(heads=5), threshold=between))
    assert same.softmax == placement.softmax
    with pytest.raises(BudgetError, match="keeps 5 heads, budget h4 is 4: ask for heads:5"):
        select(context_of(model, Budget(heads=4), threshold=between))
    # 16 heads of 4 layers, 2 x 8 values of 4 bytes each
    wide = Budget(kv_bytes_per_token=16 * 64)
    limited = select(context_of(model, wide, threshold=between))
    assert limited.softmax == placement.softmax
    narrow = select(context_of(model, Budget(kv_bytes_per_token=3 * 64), threshold=between))
    assert narrow.footprint is not None and 0 < narrow.footprint.kv_bytes_per_token <= 3 * 64
    assert set(narrow.softmax) < set(placement.softmax)


@pytest.mark.parametrize("recall", [False, True])
def test_prefiltered_heads_come_first_with_exact_scores(recall: bool) -> None:
    model = models.random_llama()
    exact = select(context_of(model, Budget(heads=3)))
    chosen = {"prefilter": 0.25, "prefilter_recall": recall}
    found = select(context_of(model, Budget(heads=3), **chosen))
    report = found.provenance["probe"]["prefilter"]
    slopes = torch.tensor(report["gradient"])
    first = rank(slopes)[: report["ablated"]]
    assert report["ablated"] == 4 and set(found.softmax) <= set(first)
    assert found.scores is not None and exact.scores is not None
    for layer, head in first:
        assert found.scores.values[layer][head] == exact.scores.values[layer][head]  # type: ignore[index]
    others = set(rank(slopes)) - set(first)
    least = min(found.scores.values[layer][head] for layer, head in first)  # type: ignore[index]
    assert all(found.scores.values[layer][head] <= least for layer, head in others)  # type: ignore[index]
    assert ("recall" in report) == recall
    true = [tuple(pair) for pair in exact.provenance["probe"]["ranking"]][:3]
    if recall:
        assert report["recall"] == {"of_first": 3, "found": len(set(true) & set(first)) / 3}
    else:
        assert found.cost.tokens < exact.cost.tokens
    with pytest.raises(
        SelectionError, match="ablates 4 heads, the budget keeps 5: raise prefilter"
    ):
        select(context_of(model, Budget(heads=5), **chosen))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"control": "bottom", "threshold": 1.0}, "no use for a threshold"),
        ({"control": "shifted", "prefilter": 0.5}, "needs every head's score"),
        ({"shift": 3}, "belongs to control shifted"),
        ({"prefilter_recall": True}, "needs prefilter"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    chosen: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        RetrievalAwareSettings(**chosen)


def test_the_heads_found_on_the_nano_base_are_the_ones_it_looks_things_up_with() -> None:
    """Zeroed together, the kept heads end retrieval on other prompts; as many others do not."""
    context = nano(tokens=64)
    placement = select(context)
    fresh = build(nano(tokens=64, seed=9))
    ranking = [tuple(pair) for pair in placement.provenance["probe"]["ranking"]]

    @torch.no_grad()
    def accuracy(zeroed: list[Any]) -> float:
        with zero_heads(context.model, zeroed):
            log = context.model(fresh.tokens).logits.log_softmax(-1)
        return float(fresh.score(log[fresh.rows[:, None], fresh.positions - 1])[1].float().mean())

    assert accuracy([]) > 0.9
    assert accuracy(placement.softmax) < 0.3
    assert accuracy(ranking[4:8]) > 0.8
    assert placement.provenance["probe"]["stability"]["overlap_of_kept"] > 0.5


def test_scores_that_are_no_numbers_are_refused() -> None:
    model = models.random_llama.__wrapped__(seed=4)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(SelectionError, match="score 0 of 16 is nan, not a finite number"):
        select(context_of(model, Budget(heads=1)))


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
