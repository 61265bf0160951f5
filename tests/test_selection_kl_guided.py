"""KL-guided selection: its variants, the shared teacher, early stop and resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import models_fixture as models
import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from rad.data.corpus import Corpus
from rad.distillation import losses
from rad.distillation.layerwise import attention_pairs
from rad.distillation.measure import HeldOut
from rad.distillation.run import save_aligned
from rad.models.convert import convert
from rad.models.hybrid import HybridAttention
from rad.placement import Budget, BudgetError, Placement
from rad.selection import SelectionContext, SelectionError, candidates, select
from rad.selection.candidates import Shared
from rad.selection.early_stop import StableTopK
from rad.selection.swap_score import SwapScore, residuals
from rad.settings import KLGuidedSettings

LAYERS = models.LAYERS
CONTEXT = 16


def write_corpus(folder: Path) -> Path:
    """A corpus of random rows with both splits and weights."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    splits = {}
    for split, rows in (("train", 40), ("held_out", 6)):
        generator.integers(3, 96, (rows, CONTEXT)).astype("<u2").tofile(folder / f"{split}.bin")
        weight = np.where(generator.random((rows, CONTEXT)) < 0.2, 0, 255).astype(np.uint8)
        weight.tofile(folder / f"{split}_weight.bin")
        splits[split] = {"rows": rows}
    manifest = {"context": CONTEXT, "dtype": "<u2", "splits": splits, "settings_sha256": "c"}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def keeping(layers: list[int]) -> Placement:
    return Placement.from_layers(
        layers, layers=LAYERS, heads=models.HEADS, kv_heads=models.KV_HEADS, base="b", selector="t"
    )


def aligned_folder(base: Any, mixer: dict[str, Any], folder: Path) -> Path:
    """What stage 1 writes, at different distances from the base in different layers."""
    linear = convert(base, keeping([]), mixer, "qkvo")
    save_aligned(linear, folder)
    tensors = load_file(str(folder / "mixers.safetensors"))
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        scale = (0.3, 0.05, 0.6)[int(name.split(".")[1])]
        if tensor.dim() == 2:
            noise = torch.randn(tensor.shape, generator=generator)
            tensors[name] = tensor * (1 + scale * noise)
    save_file(tensors, str(folder / "mixers.safetensors"))
    return folder


class Inputs:
    """A base, a corpus and an alignment on disk."""

    def __init__(self, root: Path, family: str = "llama", mixer: str = "mamba2") -> None:
        self.base = models.base_model(family)
        self.corpus = write_corpus(root / "corpus")
        self.mixer = models.MIXERS[mixer]
        self.resources: dict[str, Any] = {"mixer": self.mixer}
        if mixer not in ("sliding_window", "skip"):
            self.resources["aligned"] = aligned_folder(self.base, self.mixer, root / "aligned")

    def context(self, layers: int = 1, state: Path | None = None, **chosen: Any) -> Any:
        fields = {"tokens": 5 * 4 * CONTEXT, "batch_size": 4, "held_out_rows": 6, **chosen}
        return SelectionContext.for_model(
            self.base,
            Budget(layers=layers),
            KLGuidedSettings(**fields),
            corpus=self.corpus,
            resources={**self.resources, "state": state},
        )

    def hybrid(self, kept: list[int]) -> Any:
        folder = self.resources.get("aligned")
        start = "aligned" if folder else "qkvo"
        return convert(self.base, keeping(kept), self.mixer, start, aligned=folder)


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path)


def report_of(placement: Placement) -> dict[str, Any]:
    found: dict[str, Any] = placement.provenance["kl_guided"]
    return found


@torch.no_grad()
def stage1_loss(base: Any, student: Any, tokens: torch.Tensor, weight: torch.Tensor) -> list[float]:
    """Teacher-forced stage-1 loss of each layer; a softmax layer of the student has none."""
    found = []
    for layer, inputs, output, rope in attention_pairs(base, tokens):
        attention = student.model.layers[layer].self_attn
        if isinstance(attention, HybridAttention):
            mine, _ = attention(inputs, position_embeddings=rope)
            found.append(losses.alignment_loss(output, mine, (weight > 0).float()).item())
        else:
            found.append(0.0)
    return found


def test_stage_1_rankings_are_the_sort_of_the_layers_residuals(inputs: Inputs) -> None:
    """GA-S1 and GR-S1 from candidates that were really built, against one table of residuals."""
    corpus = Corpus(inputs.corpus)
    tokens = torch.from_numpy(corpus.rows("held_out").astype(np.int64))
    weight = torch.from_numpy(corpus.weights("held_out").astype(np.float32))
    own = stage1_loss(inputs.base, inputs.hybrid([]), tokens, weight)
    restored = [
        sum(stage1_loss(inputs.base, inputs.hybrid([layer]), tokens, weight))
        for layer in range(LAYERS)
    ]
    others = [[i for i in range(LAYERS) if i != layer] for layer in range(LAYERS)]
    linearised = [
        sum(stage1_loss(inputs.base, inputs.hybrid(kept), tokens, weight)) for kept in others
    ]
    by_residual = sorted(range(LAYERS), key=lambda layer: -own[layer])
    assert by_residual != list(range(LAYERS)), "the order of the layers must not be the answer"
    for variant, built in (("ga_s1", restored), ("gr_s1", linearised)):
        placement = select(inputs.context(variant=variant))
        assert placement.scores is not None
        mean = [value / LAYERS for value in built]
        assert placement.scores.values == pytest.approx(mean, rel=1e-4)
        assert placement.provenance["ranking"] == by_residual
        assert placement.kept_layers() == by_residual[:1]
        assert placement.cost.trained_tokens == 0
    average = select(inputs.context(variant="avg_s1", greedy="sequential", layers=2))
    assert average.provenance["ranking"] == by_residual
    assert average.kept_layers() == sorted(by_residual[:2])


CASES = [("llama", name) for name in models.MIXERS] + [("qwen2", "gla"), ("qwen3", "mamba2")]


@pytest.mark.parametrize(("family", "mixer"), CASES)
def test_swap_scores_are_the_kl_of_the_converted_hybrid(
    family: str, mixer: str, tmp_path: Path
) -> None:
    inputs = Inputs(tmp_path, family, mixer)
    context = inputs.context()
    shared = Shared(context, context.settings)
    swap = SwapScore(
        shared.base,
        shared.hybrid([]),
        shared.tokens,
        shared.weight,
        batch_size=4,
        meter=context.meter,
    )
    held_out = HeldOut(Corpus(inputs.corpus), inputs.base, rows=6)

    def whole(kept: list[int]) -> float:
        return float(held_out(inputs.hybrid(kept))["held_out_kl"])

    intact, restored = swap([], [0, 2])
    assert intact == pytest.approx(whole([]), rel=1e-3, abs=1e-5)
    for layer in (0, 2):
        assert restored[layer] == pytest.approx(whole([layer]), rel=1e-3, abs=1e-5)
    mixed, more = swap([1], [2])
    assert mixed == pytest.approx(whole([1]), rel=1e-3, abs=1e-5)
    assert more[2] == pytest.approx(whole([1, 2]), rel=1e-3, abs=1e-5)
    _, linearised = swap([0, 1, 2], [1])
    assert linearised[1] == pytest.approx(whole([0, 2]), rel=1e-3, abs=1e-5)
    assert shared.held_out_kl(inputs.hybrid([1])) == pytest.approx(whole([1]), rel=1e-4, abs=1e-5)
    errors = residuals(
        shared.base, shared.hybrid([]), shared.tokens, shared.weight, 4, context.meter
    )
    assert all(error >= 0 and np.isfinite(error) for error in errors)


@pytest.mark.parametrize(("family", "mixer"), [("qwen2", "gated_deltanet"), ("qwen3", "skip")])
def test_candidates_of_other_families_and_unaligned_mixers_train(
    family: str, mixer: str, tmp_path: Path
) -> None:
    placement = select(Inputs(tmp_path, family, mixer).context())
    found = report_of(placement)["ga_s2"]
    assert min(found["swap"]) > min(found["held_out_kl"])


def test_the_teacher_runs_once_per_batch_whatever_the_rounds(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores do not depend on how many steps' logits fit in memory; the base's passes do not grow.

    One call a training batch, one a held-out batch, and those of a swap score per move.
    """
    calls = []
    handle = inputs.base.register_forward_hook(lambda *_: calls.append(1))
    once = select(inputs.context(variant="avg_s2"))
    assert once.scores is not None
    in_one_round = len(calls)
    assert in_one_round == 5 + 2 + 2 * 2, "nothing per candidate"
    monkeypatch.setattr(candidates, "SHARED_LOGITS", 2 * 4 * CONTEXT * 96)
    calls.clear()
    again = select(inputs.context(variant="avg_s2"))
    handle.remove()
    assert again.scores is not None
    assert report_of(again)["scores"] == report_of(once)["scores"]
    assert len(calls) == in_one_round
    trained = 2 * LAYERS * 5 * 4 * CONTEXT
    assert once.cost.trained_tokens == again.cost.trained_tokens == trained
    assert once.cost.flops > 6 * trained * 1000


def test_variants_rank_as_they_say(inputs: Inputs) -> None:
    found = {name: select(inputs.context(variant=name)) for name in ("ga_s2", "gr_s2", "avg_s2")}
    ranks = {}
    for name, placement in found.items():
        assert placement.scores is not None
        values = placement.scores.values
        assert placement.scores.higher_is_kept == (name == "gr_s2")
        sign = -1 if name == "gr_s2" else 1
        order = sorted(range(LAYERS), key=lambda layer: (sign * values[layer], layer))
        assert placement.provenance["ranking"] == order
        ranks[name] = [order.index(layer) for layer in range(LAYERS)]
    values = found["avg_s2"].scores.values  # type: ignore[union-attr]
    pairs = zip(ranks["ga_s2"], ranks["gr_s2"], strict=True)
    assert values == [(a + b) / 2 for a, b in pairs]
    swap = report_of(found["ga_s2"])["ga_s2"]["spearman_swap_trained"]
    assert -1 <= swap <= 1
    same = select(inputs.context())
    assert same.scores == found["ga_s2"].scores and same.softmax == found["ga_s2"].softmax


def test_published_score_is_the_recent_training_loss(inputs: Inputs) -> None:
    whole = select(inputs.context(score="training_loss", score_window=2))
    early = select(inputs.context(score="training_loss", score_window=2, score_step=3))
    assert whole.scores is not None and early.scores is not None
    assert whole.scores.values == report_of(whole)["ga_s2"]["training_loss"]
    assert early.scores.values != whole.scores.values
    assert report_of(early)["steps"] == 3 and report_of(whole)["steps"] == 5
    with pytest.raises(SelectionError, match="score_step 9 is beyond the 5 steps"):
        select(inputs.context(score="training_loss", score_step=9))


def test_sequential_scores_the_rest_again_after_every_choice(inputs: Inputs) -> None:
    first = select(inputs.context())
    both = select(inputs.context(layers=2, greedy="sequential"))
    rounds = report_of(both)["rounds"]
    assert [len(entry["layers"]) for entry in rounds] == [LAYERS, LAYERS - 1]
    assert rounds[0]["moved"] == first.kept_layers()[0]
    assert rounds[0]["scores"] == first.scores.values  # type: ignore[union-attr]
    best = rounds[1]["layers"][int(np.argmin(rounds[1]["scores"]))]
    assert both.kept_layers() == sorted([rounds[0]["moved"], best])
    # the second round restores on top of the first choice
    assert min(rounds[1]["scores"]) < min(rounds[0]["scores"])
    removal = select(inputs.context(greedy="sequential", variant="gr_s2"))
    moved = [entry["moved"] for entry in report_of(removal)["rounds"]]
    assert removal.kept_layers() == sorted(set(range(LAYERS)) - set(moved))
    swap = select(inputs.context(layers=2, greedy="sequential", variant="swap"))
    assert swap.cost.trained_tokens == 0 and len(swap.kept_layers()) == 2
    with pytest.raises(ValidationError, match="no common next step"):
        inputs.context(variant="avg_s2", greedy="sequential")
    with pytest.raises(ValidationError, match="ga_s2 trains its candidates: it needs tokens"):
        KLGuidedSettings()
    assert KLGuidedSettings(variant="swap").tokens == 0


def test_the_rule_for_a_stable_top_k() -> None:
    rule = StableTopK(3)
    assert [rule.update(chosen, 0.5) for chosen in ({0, 1, 2}, {0, 1, 3}, {0, 1, 3})] == [False] * 3
    assert not rule.update({4, 5, 3}, 0.6), "two of three layers were exchanged: counting restarts"
    assert [rule.update({4, 5, 3}, 0.7) for _ in range(3)] == [False, False, True]
    early = StableTopK(3)
    assert not any(early.update({0, 1, 2}, 0.1) for _ in range(9))
    assert early.update({0, 1, 2}, 0.15)
    single = StableTopK(1)
    assert not any(single.update({index % 2}, 0.9) for index in range(9))


def test_training_stops_early_when_the_choice_is_stable(inputs: Inputs) -> None:
    chosen: dict[str, Any] = {"tokens": 20 * 4 * CONTEXT, "early_stop": True, "check_every": 2}
    stopped = select(inputs.context(layers=2, **chosen))
    record = report_of(stopped)["early_stop"][0]
    assert record["of"] == 20 and 8 <= record["steps"] < 20
    assert stopped.cost.trained_tokens == LAYERS * record["steps"] * 4 * CONTEXT
    assert len(record["chosen"]["ga"]) == record["steps"] // 2
    # with every layer kept there is nothing to decide, so nothing to stop for
    assert "early_stop" not in report_of(select(inputs.context(layers=LAYERS, **chosen)))


class Stop(Exception):
    """Stands for a killed job."""


def test_finished_candidates_are_not_trained_again(inputs: Inputs, tmp_path: Path) -> None:
    state = tmp_path / "state"
    context = inputs.context(state=state)

    def stop_at_the_second(message: str) -> None:
        if "layer001" in message:
            raise Stop

    context.progress = stop_at_the_second
    with pytest.raises(Stop):
        select(context)
    resumed = select(inputs.context(state=state))
    alone = select(inputs.context())
    assert resumed.scores == alone.scores
    part = 5 * 4 * CONTEXT
    # a placement says what its scores cost, whoever spent it
    assert resumed.cost.trained_tokens == LAYERS * part == alone.cost.trained_tokens
    assert report_of(resumed)["reused"] == {
        "candidates": ["restore-00-layer000"],
        "trained_tokens": part,
    }
    assert "reused" not in report_of(alone)
    both = select(inputs.context(state=state, variant="avg_s2"))
    assert both.cost.trained_tokens == 2 * LAYERS * part
    assert report_of(both)["reused"]["trained_tokens"] == LAYERS * part, "the restored are known"
    other = select(inputs.context(state=state, learning_rate=1e-4))
    assert "reused" not in report_of(other) and other.scores != alone.scores


def test_rounds_resume_where_they_were_saved(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "SHARED_LOGITS", 2 * 4 * CONTEXT * 96)
    state = tmp_path / "state"
    often: dict[str, Any] = {"save_every_seconds": 1e-9}
    context = inputs.context(state=state, **often)

    def stop_at_step_4(message: str) -> None:
        if "4 of 5 steps" in message:
            raise Stop

    context.progress = stop_at_step_4
    with pytest.raises(Stop):
        select(context)
    resumed = select(inputs.context(state=state, **often))
    alone = select(inputs.context())
    assert resumed.scores == alone.scores
    assert report_of(resumed)["reused"]["trained_tokens"] == LAYERS * 2 * 4 * CONTEXT
    assert resumed.cost.trained_tokens == LAYERS * 5 * 4 * CONTEXT
    assert not list(state.rglob("*.safetensors"))


def test_what_cannot_be_selected_is_refused(inputs: Inputs) -> None:
    with pytest.raises(BudgetError, match="16 heads"):
        select(inputs.context(layers=4))
    context = inputs.context()
    context.resources = {"mixer": inputs.mixer}
    with pytest.raises(SelectionError, match="needs the resource 'aligned'"):
        select(context)
    context.resources = {}
    with pytest.raises(SelectionError, match="needs the resource 'mixer'"):
        select(context)
    with pytest.raises(SelectionError, match="lower learning_rate"):
        select(inputs.context(learning_rate=1e30))


def test_a_model_that_scales_its_logits_is_refused_by_the_swap_score(inputs: Inputs) -> None:
    def doubled(module: Any, arguments: Any, output: Any) -> Any:
        output.logits = 2 * output.logits
        return output

    handle = inputs.base.register_forward_hook(doubled)
    try:
        with pytest.raises(SelectionError, match="scaled or capped logits"):
            select(inputs.context(variant="swap"))
    finally:
        handle.remove()
