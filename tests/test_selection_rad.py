"""RAD as a selector: objectives, searches, reports, and what it says of bad input."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import selection_models as models
import torch

from rad.models.convert import convert
from rad.models.sources import ModelError, load, load_tokenizer
from rad.placement import Budget, Placement
from rad.selection import SelectionContext, SelectionError, select
from rad.selection.acceptance import Calibration
from rad.selection.matchness import Matchness
from rad.selection.rad import compare_choices
from rad.selection.speculation_report import (
    agreement,
    expected_jaccard,
    jaccard,
    skipped_by,
    speculate,
)
from rad.selection.speculative import (
    DraftExit,
    greedy_generate,
    skip_attention,
    speculative_generate,
)
from rad.selection.throughput import compare
from rad.settings import MIXER_SETTINGS, RadSettings

SMALL = {
    "prompts": 4,
    "prompt_tokens": 16,
    "new_tokens": 12,
    "initial": 2,
    "timed_prompts": 0,
}


def redundant(seed: int = 1, layers: int = models.LAYERS) -> Any:
    """A random model of which the attention of layers 1 and 2 does nothing."""
    model = models.random_llama.__wrapped__(layers=layers, seed=seed)
    with torch.no_grad():
        for layer in (1, 2):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
    return model


def context(folder: Path, model: Any, keep: int, **settings: Any) -> SelectionContext:
    corpus = models.write_corpus(folder, models.random_rows(24, 32))
    chosen = RadSettings(**{**SMALL, **settings})
    return SelectionContext.for_model(model, Budget(layers=keep), chosen, corpus=corpus)


# --- matchness ------------------------------------------------------------------------------


def plain_matchness(model: Any, text: torch.Tensor, start: int, skip: tuple[int, ...]) -> float:
    with torch.no_grad(), skip_attention(model, skip):
        choices = model(text[:, :-1], use_cache=False).logits[:, start - 1 :].argmax(-1)
    return float((choices == text[:, start:]).double().mean())


@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
def test_matchness_with_shared_prefixes_equals_separate_passes(kept_bytes: int) -> None:
    model = models.random_llama()
    prompts = torch.from_numpy(models.random_rows(3, 10))
    text = torch.cat([prompts, greedy_generate(model, prompts, 14)], 1)
    measure = Matchness(model, text, 10, kept_bytes=kept_bytes)
    sets = [s for k in range(5) for s in itertools.combinations(range(4), k)]
    for skip in [*sets, *reversed(sets)]:
        assert measure(skip) == plain_matchness(model, text, 10, skip)
    assert measure(()) == 1


def test_every_prefix_is_computed_once() -> None:
    model = models.random_llama()
    text = torch.from_numpy(models.random_rows(2, 12))
    measure = Matchness(model, text, 6)
    assert measure.layers_run == 4
    sets = list(itertools.combinations(range(4), 2))
    for skip in sets:
        measure(skip)
    # a prefix of n layers ends in layer n-1; those that skip nothing came with the intact pass
    prefixes = {tuple(layer in skip for layer in range(n)) for skip in sets for n in (1, 2, 3)}
    inner = sum(any(pattern) for pattern in prefixes)
    assert measure.layers_run - 4 == inner + len(sets) < 4 * len(sets)


# --- the searches, through the selector -----------------------------------------------------


@pytest.mark.parametrize("objective", ["acceptance", "speed_up", "matchness"])
@pytest.mark.parametrize("method", ["auto", "bayesian", "greedy", "exhaustive"])
def test_every_search_skips_the_attention_that_does_nothing(
    tmp_path: Path, objective: str, method: str
) -> None:
    chosen = context(tmp_path, redundant(), 2, objective=objective, search=method)
    placement = select(chosen)
    assert placement.kept_layers() == [0, 3] and skipped_by(placement) == [1, 2]
    report = placement.provenance["search"]
    assert report["method"] == ("exhaustive" if method == "auto" else method)
    assert all(len(skip) == 2 for skip, _ in report["best_sets"])
    assert placement.cost.flops > 0


@pytest.mark.parametrize("keep", [0, 4])
@pytest.mark.parametrize("method", ["bayesian", "greedy", "exhaustive"])
def test_budgets_at_the_ends_leave_no_choice(tmp_path: Path, keep: int, method: str) -> None:
    placement = select(context(tmp_path, models.random_llama(), keep, search=method))
    assert len(placement.kept_layers()) == keep


def reproducible(placement: Placement) -> dict[str, Any]:
    record = placement.model_dump(mode="json")
    record["cost"].pop("seconds")
    return record


@pytest.mark.parametrize("objective", ["acceptance", "matchness"])
def test_identical_seeds_give_identical_placements(tmp_path: Path, objective: str) -> None:
    settings = {"objective": objective, "search": "bayesian", "evaluations": 6}
    model = models.random_llama(layers=6)
    first = select(context(tmp_path, model, 3, **settings, agreement_seeds=2))
    again = select(context(tmp_path, model, 3, **settings, agreement_seeds=2))
    assert reproducible(first) == reproducible(again)
    other = select(context(tmp_path, model, 3, **settings, seed=9))
    assert first.provenance["search"] != other.provenance["search"]


def test_the_threshold_search_reports_the_free_choice(tmp_path: Path) -> None:
    settings = {"objective": "speed_up", "discretisation": "threshold", "exit_threshold": 0.0}
    placement = select(context(tmp_path, redundant(), 2, **settings))
    report = placement.provenance["search"]
    # skipping both is free and makes drafts cheaper; more would be rejected
    assert report["unconstrained"]["skipped"] == [1, 2] == report["skipped"]
    placement = select(context(tmp_path, redundant(), 3, **settings))
    assert placement.provenance["search"]["unconstrained"]["skipped"] == [1, 2]
    assert len(placement.kept_layers()) == 3
    with pytest.raises(SelectionError, match="threshold needs an objective of speed"):
        select(context(tmp_path, redundant(), 2, discretisation="threshold"))


def test_throughput_is_measured_and_its_best_sets_timed_again(tmp_path: Path) -> None:
    settings = {"prompts": 1, "new_tokens": 4, "finalists": 2, "repeats": 3, "timed_prompts": 1}
    placement = select(context(tmp_path, redundant(), 2, objective="throughput", **settings))
    report = placement.provenance["search"]
    finalists = report["finalists"]
    assert len(finalists) == 2 and report["value"] == max(value for _, value in finalists)
    assert report["value"] > 0 and report["skipped"] in [skip for skip, _ in finalists]
    measured = placement.provenance["decoding"]["measured"]
    assert measured["identical"] == measured["prompts"] == 1
    assert measured["speed_up"] == pytest.approx(
        measured["tokens_per_second"] / measured["plain_tokens_per_second"]
    )


def test_speed_counts_both_ways_by_the_same_clock() -> None:
    """With a clock that ticks once per model call the times are known."""
    model = redundant(seed=3)
    ticks = []
    handle = model.register_forward_hook(lambda *_: ticks.append(1))
    rows = torch.from_numpy(models.random_rows(3, 10))
    found = compare(
        model,
        rows,
        (1, 2),
        19,
        max_draft=8,
        draft_exit=DraftExit(0.0, False),
        clock=lambda: float(len(ticks)),
    )
    handle.remove()
    assert found.identical == 3 and found.statistics.acceptance_rate == 1
    assert found.plain_seconds == 3 * 19
    assert found.seconds == 3 * (1 + 2 * 8 + 2), "prefill, drafts, verifications"
    assert found.speed_up == pytest.approx(1.0)


def test_the_report_of_a_placement(tmp_path: Path) -> None:
    placement = select(context(tmp_path, redundant(), 2, agreement_seeds=2, exit_threshold=0.0))
    report = placement.provenance["decoding"]
    assert report["acceptance_rate"] == report["matchness"] == 1
    assert report["acceptance_length"] > 2 and report["draft_cost"] < 1
    assert 1 < report["analytic_speed_up"] <= report["speed_up_limit"]
    agreed = placement.provenance["agreement"]
    assert agreed["mean"] == 1 and agreed["votes"] == [0, 3, 3, 0]
    assert agreed["chance"] == pytest.approx(expected_jaccard(2, 2, 4))


def test_agreement() -> None:
    assert jaccard([1, 2], [2, 3]) == pytest.approx(1 / 3)
    assert jaccard([], []) == 1
    pairs = list(itertools.product(itertools.combinations(range(5), 2), repeat=2))
    assert expected_jaccard(2, 2, 5) == pytest.approx(
        sum(jaccard(left, right) for left, right in pairs) / len(pairs)
    )
    found = agreement({"a": [0, 1], "b": (1, 0), "c": {1, 2}}, 4)
    assert found["pairs"] == [["a", "b", 1.0], ["a", "c", 1 / 3], ["b", "c", 1 / 3]]
    assert found["lowest"] == 1 / 3 and found["votes"] == [2, 3, 1, 0]
    with pytest.raises(SelectionError, match="at least two"):
        agreement({"a": [1]}, 4)


def test_choices_of_objectives_and_seeds_are_compared(tmp_path: Path) -> None:
    found = compare_choices(context(tmp_path, redundant(), 2), ["acceptance", "matchness"], [0, 1])
    assert len(found["sets"]) == 4 and len(found["pairs"]) == 6
    assert found["mean"] == 1


# --- bad input ------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["acceptance", "matchness"])
def test_a_base_that_yields_no_numbers_is_named(tmp_path: Path, objective: str) -> None:
    model = models.random_llama.__wrapped__(seed=5)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(SelectionError, match="logits are not finite; look at its weights"):
        select(context(tmp_path, model, 2, objective=objective))


def test_a_calibration_that_does_not_fit_is_named(tmp_path: Path) -> None:
    model = models.random_llama()
    with pytest.raises(SelectionError, match="exceed the base's 128 positions"):
        select(context(tmp_path, model, 2, new_tokens=120))
    with pytest.raises(SelectionError, match="rows of the corpus have only 32 tokens"):
        select(context(tmp_path, model, 2, prompt_tokens=33))
    with pytest.raises(SelectionError, match="new_tokens is 1"):
        Calibration(model, torch.ones(1, 4, dtype=torch.long), 1)


# --- the nano base --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano() -> tuple[Any, Any]:
    try:
        return load("nano:base").eval(), load_tokenizer("nano:base")
    except ModelError as error:
        pytest.skip(str(error))


TEXTS = ["Tom has 3 apples. He buys 4 more.", "f(x) = x + 2", "once upon a time"]


@pytest.mark.parametrize("skip", [(), (0,), (3, 5), (1, 2, 3, 5, 6, 7), tuple(range(8))])
def test_the_nano_base_decodes_losslessly(nano: tuple[Any, Any], skip: tuple[int, ...]) -> None:
    model, tokenizer = nano
    for text in TEXTS:
        prompt = tokenizer(text, return_tensors="pt")["input_ids"][0]
        plain = greedy_generate(model, prompt[None], 40)[0].tolist()
        assert speculative_generate(model, prompt, skip, 40)[0] == plain


def test_a_hybrid_of_the_nano_base_decodes_losslessly(nano: tuple[Any, Any]) -> None:
    base, tokenizer = nano
    kept = [(layer, head) for layer in (0, 2, 4) for head in range(4)] + [(6, 1)]
    placement = Placement(base="b", layers=8, heads=4, kv_heads=2, softmax=kept, selector="test")
    model = convert(base, placement, MIXER_SETTINGS["mamba2"]().model_dump(), "qkvo")
    report = speculate(model, tokenizer, TEXTS, [1, 3, 6], new_tokens=30, ignore_stop=True)
    assert report["measured"]["identical"] == len(TEXTS)
    assert 0 < report["accepted"] < report["drafted"]


def test_speculate_reports_what_it_did(nano: tuple[Any, Any]) -> None:
    model, tokenizer = nano
    report = speculate(model, tokenizer, TEXTS, [5, 3], new_tokens=24)
    assert report["skipped"] == [3, 5] and report["rule"] == "greedy"
    assert report["measured"]["identical"] == report["prompts"] == len(TEXTS)
    assert report["acceptance_rate"] == report["accepted"] / report["drafted"]
    assert [row["prompt"] for row in report["outputs"]] == TEXTS
    drawn = [
        speculate(model, tokenizer, TEXTS[:1], [3], new_tokens=24, temperature=1.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    texts = [run["outputs"][0]["text"] for run in drawn]
    assert texts[0] == texts[1] != texts[2]
    assert drawn[0]["rule"] == "sampled" and "identical" not in drawn[0]["measured"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"skip": [8]}, "cannot skip layer 8: the model has layers 0 to 7"),
        ({"prompts": []}, "no prompts"),
        ({"new_tokens": 0}, "new_tokens is 0"),
        ({"max_draft": 0}, "max_draft is 0"),
        ({"new_tokens": 9999}, "and 9999 new ones exceed the model's"),
        ({"exit_threshold": 1.5}, "expected a probability"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0"),
    ],
)
def test_speculate_names_what_cannot_be_used(
    nano: tuple[Any, Any], changes: dict[str, Any], message: str
) -> None:
    options = {"prompts": TEXTS, "skip": [1], **changes}
    with pytest.raises(ValueError, match=message):
        speculate(*nano, options.pop("prompts"), options.pop("skip"), **options)
