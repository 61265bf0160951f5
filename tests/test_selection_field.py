"""The field's other selectors on models: exact where they can be, and real on the nano base."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rad.field_settings import FlashMorphSettings
from rad.placement import Budget, Placement
from rad.selection import SelectionContext, SelectionError, flash_morph, recall_probes, select
from rad.selection.halo import halo_scores
from rad.selection.layer_moves import NoAttention, Trunk, replaced, silenced, text_batches
from rad.selection.recall_ablation import answer_score
from rad.selection.smart import violation
from rad.settings import SELECTOR_SETTINGS, Mamba2Settings
from tests.selection_models import nano_record, random_llama, random_rows

MIXER = Mamba2Settings().model_dump(mode="json")
# --- one layer changed ----------------------------------------------------------------------


def test_a_changed_layer_is_a_whole_pass_without_its_attention() -> None:
    model = random_llama()
    tokens = torch.from_numpy(random_rows(3, 12))
    with torch.no_grad():
        trunk = Trunk(model, tokens)
        torch.testing.assert_close(trunk.logits(trunk.hidden), model(tokens).logits)
        for layer in range(4):
            weight = model.model.layers[layer].self_attn.o_proj.weight
            kept = weight.detach().clone()
            weight.zero_()
            want = model(tokens).logits
            weight.copy_(kept)
            torch.testing.assert_close(trunk.logits(trunk.changed(layer, NoAttention())), want)
            with silenced(model, [layer]):
                torch.testing.assert_close(model(tokens).logits, want)
    attention = model.model.layers[1].self_attn
    with pytest.raises(RuntimeError), replaced(model, {1: NoAttention()}):
        raise RuntimeError
    assert model.model.layers[1].self_attn is attention


def test_answer_score_is_the_greedy_answer() -> None:
    model = random_llama()
    tokens = torch.from_numpy(random_rows(6, 10))
    with torch.no_grad():
        for place in (8, 9):  # half of the rows get the greedy continuation
            tokens[:3, place] = model(tokens[:3, :place]).logits[:, -1].argmax(-1)
        asked = torch.zeros_like(tokens, dtype=torch.bool)
        asked[:, 8:] = True
        trunk = Trunk(model, tokens)
        sums, count = answer_score(trunk, trunk.hidden, recall_probes.Answers(tokens, asked))
        expected = model(tokens).logits.log_softmax(-1)[:, 7:9].gather(-1, tokens[:, 8:, None])
    assert count == 6 and float(sums[0]) >= 3
    right = (model(tokens).logits.argmax(-1)[:, 7:9] == tokens[:, 8:]).all(1).sum()
    assert float(sums[0]) == float(right)
    assert float(sums[1]) == pytest.approx(float(expected.sum()), rel=1e-4)


# --- selectors on a random model ------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    rows = random_rows(24, 16)
    rows.astype("<u2").tofile(folder / "train.bin")
    weights = np.full(rows.shape, 255, dtype=np.uint8)
    weights[:, 0] = 0
    weights.tofile(folder / "train_weight.bin")
    manifest = {
        "schema": 1, "context": 16, "dtype": "<u2", "splits": {"train": {"rows": 24}},
        "settings_sha256": "x",
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_aligned(random_llama(), tmp_path_factory.mktemp("aligned"))


def _save_aligned(model: Any, folder: Path) -> Path:
    """Mixers that start from attention's weights, saved as an alignment would."""
    from rad.distillation.run import save_aligned
    from rad.models.convert import convert

    config = model.config
    nothing = Placement(
        base="b",
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        softmax=[],
        selector="none",
    )
    save_aligned(convert(model, nothing, MIXER, "qkvo"), folder)
    return folder


def _run(model: Any, method: str, budget: Budget, keys: dict[str, Any], **fields: Any) -> Placement:
    chosen = SELECTOR_SETTINGS[method].model_validate({"method": method, **keys})
    return select(SelectionContext.for_model(model, budget, chosen, **fields))


CASES: list[tuple[str, dict[str, Any]]] = [
    ("lm_ppl", {"rows": 8}),
    ("lm_ppl", {"rows": 8, "move": "linearise"}),
    ("activation_mse", {"rows": 8}),
    ("activation_mse", {"rows": 8, "move": "linearise"}),
    ("leave_one_out", {"rows": 8, "metric": "loss"}),
]


@pytest.mark.parametrize(("method", "keys"), CASES)
def test_rankings_are_nested_and_repeatable(
    method: str, keys: dict[str, Any], corpus: Path, aligned: Path
) -> None:
    fields = {"corpus": corpus, "resources": {"aligned": aligned, "mixer": MIXER}}
    sets = [_run(random_llama(), method, Budget(layers=k), keys, **fields) for k in (0, 1, 2, 3, 4)]
    for few, many in itertools.pairwise(sets):
        assert set(few.softmax) < set(many.softmax)
        assert few.scores == many.scores
    values = np.array(sets[0].scores.values)  # type: ignore[union-attr]
    assert sets[1].kept_layers() == [int(values.argmax())]
    assert sets[2].cost.tokens == 8 * 16 * (1 + 2.5)
    assert sets[2].cost.flops > 0


@pytest.mark.parametrize("sensitivity", ["restore", "linearise", "zero"])
def test_smart_scores_are_differences_of_kl(corpus: Path, aligned: Path, sensitivity: str) -> None:
    from rad.distillation.losses import kl_loss
    from rad.models.convert import convert

    fields = {"corpus": corpus, "resources": {"aligned": aligned, "mixer": MIXER}}
    keys = {"rows": 8, "sensitivity": sensitivity}
    base = random_llama()
    found = _run(base, "smart", Budget(layers=2), keys, **fields)
    assert violation(found.kept_layers(), 4) is None
    assert found.scores is not None
    [(tokens, (_, weight))] = text_batches(corpus, 8, 8, 0)

    def kl(linear: list[int]) -> float:
        kept = [layer for layer in range(4) if layer not in linear]
        placement = Placement.from_layers(
            kept, layers=4, heads=4, kv_heads=2, base="b", selector="t"
        )
        student = convert(base, placement, MIXER, "aligned", aligned=aligned)
        with torch.no_grad():
            return kl_loss(base(tokens).logits, student(tokens).logits, weight).item()

    def silent(layer: int) -> float:
        with torch.no_grad(), silenced(base, [layer]):
            logits = base(tokens).logits
        with torch.no_grad():
            return kl_loss(base(tokens).logits, logits, weight).item()

    if sensitivity == "restore":
        want = [kl([0, 1, 2, 3]) - kl([x for x in range(4) if x != y]) for y in range(4)]
    else:
        want = [kl([y]) if sensitivity == "linearise" else silent(y) for y in range(4)]
    assert found.scores.values == pytest.approx(want, abs=2e-4)


@pytest.mark.parametrize("initialisation", ["qkvo", "aligned"])
def test_progressive_conversion_orders_all_layers(
    corpus: Path, aligned: Path, initialisation: str
) -> None:
    fields = {"corpus": corpus, "resources": {"aligned": aligned, "mixer": MIXER}}
    keys = {
        "mode": "progressive", "rows": 8, "batch_size": 4, "steps": 2, "distil_steps": 2,
        "first_share": 0.4, "per_round": 1, "metric": "loss", "initialisation": initialisation,
    }  # fmt: skip
    before = {name: p.clone() for name, p in random_llama().state_dict().items()}
    found = [_run(random_llama(), "leave_one_out", Budget(layers=1), keys, **fields) for _ in "ab"]
    record = found[0].provenance
    assert found[0].softmax == found[1].softmax and record == found[1].provenance
    assert sorted(record["conversion_order"]) == [0, 1, 2, 3]
    assert found[0].kept_layers() == record["conversion_order"][-1:]
    assert [len(one["converted"]) for one in record["rounds"]] == [1, 1, 1]
    assert found[0].cost.trained_tokens > 0
    for name, value in random_llama().state_dict().items():  # the base itself is not trained
        assert torch.equal(value, before[name])


def test_a_gate_mixes_the_two_branches() -> None:
    class Constant(NoAttention):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, hidden_states: Any, **kwargs: Any) -> tuple[Any, None]:
            return torch.full_like(hidden_states, self.value), None

    hidden = torch.randn(1, 3, 4)
    gates = torch.tensor([0.25, 0.5])
    mixed = flash_morph.Gated(Constant(4.0), Constant(8.0), gates, 0)(hidden)[0]
    assert torch.equal(mixed, torch.full_like(hidden, 0.25 * 4 + 0.75 * 8))


def test_missing_inputs_are_named(corpus: Path, aligned: Path) -> None:
    model = random_llama()
    cases: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("lm_ppl", {}, {}, "selector lm_ppl needs a corpus"),
        ("lm_ppl", {}, {"corpus": corpus}, "64 calibration rows asked, but it has 24"),
        ("lm_ppl", {}, {"corpus": aligned}, "not a corpus folder"),
        ("lm_ppl", {"rows": 4, "move": "linearise"}, {"corpus": corpus}, "the resource 'mixer'"),
        (
            "smart",
            {"rows": 4},
            {"corpus": corpus, "resources": {"mixer": MIXER}},
            "smart needs the resource 'aligned'",
        ),
        ("ar", {}, {}, "ar needs the base's tokenizer"),
        ("flash_morph", {}, {"resources": {"mixer": MIXER, "aligned": aligned}}, "tokenizer"),
    ]
    for method, keys, fields, message in cases:
        with pytest.raises(SelectionError, match=message):
            _run(model, method, Budget(layers=1), keys, **fields)


def test_scores_that_are_no_numbers_are_refused(corpus: Path) -> None:
    broken = copy.deepcopy(random_llama())
    broken.model.layers[2].self_attn.o_proj.weight.data.fill_(torch.nan)
    with pytest.raises(SelectionError, match="not a finite number"):
        _run(broken, "activation_mse", Budget(layers=1), {"rows": 4}, corpus=corpus)


@pytest.mark.parametrize("method", ["lm_ppl", "activation_mse"])
def test_layerwise_selectors_need_whole_layers(corpus: Path, method: str) -> None:
    keys = {"rows": 4}
    with pytest.raises(ValueError, match="a layer-wise selector needs a multiple of 4"):
        _run(random_llama(), method, Budget(heads=6), keys, corpus=corpus)
    two = _run(random_llama(), method, Budget(heads=8), keys, corpus=corpus)
    assert len(two.kept_layers()) == 2
    # a layer caches 2 kv heads x 2 x 8 x 4 bytes
    most = _run(random_llama(), method, Budget(kv_bytes_per_token=300), keys, corpus=corpus)
    assert most.softmax == two.softmax


# --- the nano base --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The nano base with a small corpus and short alignment; skips where it is not shipped."""
    from rad.data.corpus import build
    from rad.distillation.align import align
    from rad.models import sources
    from rad.settings import AlignmentSettings, CorpusSettings

    record = nano_record()
    folder = tmp_path_factory.mktemp("nano")
    tokenizer = sources.load_tokenizer("nano:base")
    corpus = CorpusSettings(
        source="nano", tokens=32768, held_out_tokens=4096, context=128, prompt_weight=0.1, seed=11
    )
    build("c", corpus, tokenizer, folder / "corpus")
    short = AlignmentSettings(tokens=8192, batch_size=8, learning_rate=3e-3)
    align(
        record,
        MIXER,
        short,
        corpus=folder / "corpus",
        state=folder / "state",
        output=folder / "aligned",
    )
    return {
        "model": sources.load("nano:base"),
        "tokenizer": tokenizer,
        "corpus": folder / "corpus",
        "resources": {"aligned": folder / "aligned", "mixer": MIXER},
    }


NANO: list[tuple[str, dict[str, Any]]] = [
    ("ar", {"samples": 24}),
    ("ar", {"samples": 24, "move": "linearise"}),
    ("ar_mh", {"samples": 24, "metric": "log_probability"}),
    ("vt", {"samples": 24}),
    ("cwe", {"samples": 64}),
    ("lm_ppl", {"rows": 16}),
    ("activation_mse", {"rows": 16}),
    ("leave_one_out", {"rows": 16}),
    ("smart", {"rows": 16}),
    ("halo", {"rows": 16, "samples": 24, "score": "recall"}),
]


@pytest.mark.parametrize(("method", "keys"), NANO)
def test_selectors_find_the_two_retrieval_layers_of_the_nano_base(
    nano: dict[str, Any], method: str, keys: dict[str, Any]
) -> None:
    """Retrieval sits in layers 0 and 4 (docs/selection.md); every ablation must see that."""
    fields = {key: value for key, value in nano.items() if key != "model"}
    found = _run(nano["model"], method, Budget(layers=2), keys, **fields)
    assert found.kept_layers() == [0, 4]
    assert found.selector == method and found.cost.tokens > 0


GATES = {"tokens": 12 * 8 * 64, "batch_size": 8, "prompt_tokens": 64, "learning_rate": 0.1}


def test_gates_of_the_nano_base_keep_its_retrieval_layers(nano: dict[str, Any]) -> None:
    fields = {key: value for key, value in nano.items() if key != "model"}
    found = _run(nano["model"], "flash_morph", Budget(layers=2), GATES, **fields)
    assert found.kept_layers() == [0, 4]
    curve = found.provenance["curve"]
    assert curve[0]["hidden_mse"] == pytest.approx(0, abs=1e-6)  # all gates at 1 is the base
    assert curve[-1]["gates"] < curve[0]["gates"]


def test_a_layer_whose_linear_branch_is_exact_loses_its_gate(
    nano: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    branches = copy.deepcopy(nano["model"])  # the base's own attention in layer 0, silence above
    for layer in branches.model.layers[1:]:
        layer.self_attn = NoAttention()
    monkeypatch.setattr(flash_morph, "all_linear", lambda context: branches)
    fields = {key: value for key, value in nano.items() if key != "model"}
    found = _run(nano["model"], "flash_morph", Budget(layers=1), GATES, **fields)
    assert found.scores is not None
    gates = np.array(found.scores.values)
    assert found.kept_layers() == [4]
    assert gates[0] <= gates.min() + 1e-6  # nothing but the sum of the gates pulls at it


def test_generated_answers_rank_as_forced_ones(nano: dict[str, Any]) -> None:
    fields = {key: value for key, value in nano.items() if key != "model"}
    keys = {"samples": 8, "scoring": "generated", "max_new_tokens": 4, "tokens": 64}
    found = _run(nano["model"], "ar", Budget(layers=2), keys, **fields)
    forced = _run(nano["model"], "ar", Budget(layers=2), {"samples": 8, "tokens": 64}, **fields)
    assert found.softmax == forced.softmax
    assert found.provenance["probe"]["intact_accuracy"] >= 0.9
    with pytest.raises(SelectionError, match="generated has no log_probability"):
        _run(nano["model"], "ar", Budget(layers=2), {**keys, "metric": "log_probability"}, **fields)


def test_a_task_that_the_base_cannot_do_is_refused(nano: dict[str, Any]) -> None:
    fields = {key: value for key, value in nano.items() if key != "model"}
    keys = {"samples": 16, "style": "text", "pairs": 6}
    with pytest.raises(
        SelectionError, match=r"ar: the intact base answers 0.* guessing gives 0\.075"
    ):
        _run(nano["model"], "ar", Budget(layers=2), keys, **fields)


def test_pass_keys_are_hidden_in_corpus_text(nano: dict[str, Any]) -> None:
    chosen = FlashMorphSettings(style="text", passkeys=3, prompt_tokens=200, batch_size=4)
    fields = {key: value for key, value in nano.items() if key != "model"}
    context = SelectionContext.for_model(nano["model"], Budget(layers=2), chosen, **fields)
    prompts = flash_morph.Prompts(context, chosen)
    asked = prompts.passkeys(5)
    assert asked == prompts.passkeys(5) != prompts.passkeys(6)
    for question in asked:
        said = dict(re.findall(r"The pass key of (\w+) is (\d+)\.", question.prompt))
        assert len(said) == 3
        name = re.search(r"The pass key of (\w+) is$", question.prompt)
        assert name and question.answer == f" {said[name[1]]}"
    tokens, answers = prompts(0)
    assert tokens.shape[0] == 4 and 150 < tokens.shape[1] < 220 and answers.asked.any(1).all()


def test_halo_scores_come_from_what_remains(nano: dict[str, Any]) -> None:
    fields = {key: value for key, value in nano.items() if key != "model"}
    keys = {"rows": 8, "samples": 8, "recall": ["ar"]}
    found = _run(nano["model"], "halo", Budget(layers=3), keys, **fields)
    assert found.scores is not None
    left = found.provenance
    assert found.scores.values == halo_scores(left["recall"], left["common"])
    assert min(left["recall"]) < 0.5 < max(left["recall"]) and len(left["common"]) == 8


def test_halo_keeps_both_ends_when_asked(nano: dict[str, Any]) -> None:
    fields = {key: value for key, value in nano.items() if key != "model"}
    keys = {"rows": 8, "samples": 8, "recall": ["ar"], "endpoints": True}
    found = _run(nano["model"], "halo", Budget(layers=3), keys, **fields)
    assert {0, 7} < set(found.kept_layers())
    with pytest.raises(SelectionError, match="endpoints are 2 layers, the budget keeps 1"):
        _run(nano["model"], "halo", Budget(layers=1), keys, **fields)
