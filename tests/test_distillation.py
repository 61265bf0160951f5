"""Losses against independent formulas, the data order, stages, what is shared, runs end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distillation_fixture import CONTEXT, job, random_corpus, tokens_of, weights
from models_fixture import MIXERS, base_model, placement, tokens
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint

from rad.data.corpus import Corpus, CorpusError
from rad.distillation import loop, losses, optimiser, speed
from rad.distillation.align import layer_errors
from rad.distillation.batches import Batches
from rad.distillation.layerwise import align_layer, layer_calls, layerwise_backward
from rad.distillation.measure import HeldOut
from rad.distillation.shared_prefix import share_frozen, shared_layers, unshare
from rad.distillation.stages import Stage
from rad.files import write_json
from rad.models.convert import convert
from rad.placement import Placement
from rad.settings import AlignmentSettings, StageSettings


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return random_corpus(tmp_path / "corpus")


def test_kl_is_the_textbook_formula() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    p, q = teacher.softmax(-1), student.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(losses.token_kl(teacher, student), expected)
    assert losses.token_kl(teacher, teacher).abs().max() < 1e-6
    tau = 2.0
    p, q = (teacher / tau).softmax(-1), (student / tau).softmax(-1)
    expected = tau**2 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(losses.token_kl(teacher, student, tau), expected)


def test_losses_weigh_the_predicted_token() -> None:
    torch.manual_seed(0)
    logits, ids = torch.randn(1, 4, 7), torch.randint(0, 7, (1, 4))
    weight = torch.tensor([[9.0, 0.0, 1.0, 0.0]])  # only the token at position 2 counts
    expected = -logits.log_softmax(-1)[0, 1, ids[0, 2]]
    torch.testing.assert_close(losses.ce_loss(logits, ids, weight), expected)
    other = torch.randn(1, 4, 7)
    torch.testing.assert_close(
        losses.kl_loss(other, logits, weight), losses.token_kl(other, logits)[0, 1]
    )


def test_alignment_loss_is_the_mean_distance_over_root_width() -> None:
    target, output = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)
    output[0, 0, 0], output[0, 1, 1] = 3.0, 5.0
    value = losses.alignment_loss(target, output, torch.ones(1, 2))
    assert value.item() == pytest.approx((3 + 5) / 2 / 2, rel=1e-5)


def test_batches_depend_on_seed_and_step_alone_and_cover_an_epoch(corpus: Corpus) -> None:
    one, two = Batches(corpus, 8, seed=1), Batches(corpus, 8, seed=1)
    for step in (6, 0, 3):
        assert torch.equal(one(step)[0], two(step)[0])
    seen = torch.cat([one(step)[0] for step in range(5)])
    rows = torch.from_numpy(corpus.rows("train").astype(np.int64))
    assert sorted(seen.tolist()) == sorted(rows.tolist())
    assert not torch.equal(Batches(corpus, 8, seed=2)(0)[0], one(0)[0])


def test_a_truncated_corpus_is_named(corpus: Corpus) -> None:
    (corpus.folder / "train.bin").write_bytes(b"12")
    with pytest.raises(CorpusError, match=r"train\.bin: expected 1920 bytes, found 2"):
        corpus.rows("train")


def test_aligned_mixers_are_sliced_by_head(tmp_path: Path, corpus: Corpus) -> None:
    """Starting `aligned`, the owned heads compute what the aligned full mixer computed for them."""
    from rad.distillation.run import save_aligned

    base = base_model()
    full = convert(base, placement("none"), MIXERS["mamba2"], "qkvo", seed=1)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_aligned(full, tmp_path)
    kept = placement("heads")
    hybrid = convert(base, kept, MIXERS["mamba2"], "aligned", aligned=tmp_path)
    u = torch.randn(2, 9, 32)
    for layer in range(3):
        mine, theirs = (model.model.layers[layer].self_attn.mixer for model in (hybrid, full))
        expected, _ = theirs(u)
        found, _ = mine(u)
        torch.testing.assert_close(found, expected[:, :, mine.owned])


def test_the_step_zero_record_of_a_skip_student_is_the_skip_models_kl(corpus: Corpus) -> None:
    base = base_model()
    held_out = HeldOut(corpus, base, rows=4)
    zero = convert(base, placement("layer"), MIXERS["mamba2"], "zero")
    skip = convert(base, placement("layer"), MIXERS["skip"], "qkvo")
    assert held_out(zero)["held_out_kl"] == pytest.approx(held_out(skip)["held_out_kl"], rel=1e-4)
    assert held_out(base)["held_out_kl"] == pytest.approx(0.0, abs=1e-6)
    assert tokens().shape == (2, 21)


# --- training -------------------------------------------------------------------------------


def test_training_lowers_the_held_out_kl_and_nothing_frozen_changes_by_a_bit(
    corpus: Corpus,
) -> None:
    stage = StageSettings(
        tokens=tokens_of(40), batch_size=4, learning_rate=3e-3, trainable="mixers"
    )
    trained = job(corpus, stages=[stage])
    before, base = weights(trained), {k: v.clone() for k, v in trained.base.state_dict().items()}
    records = loop.train(trained)
    assert records[-1]["held_out_kl"] < 0.6 * records[0]["held_out_kl"]
    assert records[-1]["held_out_agreement"] > records[0]["held_out_agreement"]
    mixers = optimiser.mixer_parameters(trained.student)
    for name, value in trained.student.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in mixers), name
    for name, value in trained.base.state_dict().items():
        assert torch.equal(value, base[name]), name


def test_alignment_brings_every_layer_closer(corpus: Corpus) -> None:
    settings = AlignmentSettings(tokens=tokens_of(40), batch_size=4, learning_rate=1e-2)
    trained = job(corpus, kind="none", stages=[settings.stage()])
    before = layer_errors(trained.base, trained.student, corpus, settings)
    records = loop.train(trained)
    after = layer_errors(trained.base, trained.student, corpus, settings)
    assert all(b < a for a, b in zip(before, after, strict=True))
    assert list(records[-1]["layer_losses"]) == ["0", "1", "2"]
    mean = sum(records[-1]["layer_losses"].values()) / 3
    assert records[-1]["train_loss"] == pytest.approx(mean)


@pytest.mark.parametrize("mixer", ["mamba2", "discrete_mamba2"])
def test_orientation_brings_the_matrices_closer(corpus: Corpus, mixer: str) -> None:
    stage = StageSettings(
        loss="orientation", tokens=tokens_of(20), batch_size=4, learning_rate=1e-2
    )
    trained = job(corpus, stages=[stage], mixer=mixer, measure=None)
    records = loop.train(trained)
    assert records[-1]["train_loss"] < 0.95 * records[1]["train_loss"]
    assert trained.base.config._attn_implementation == "sdpa"


def test_an_align_stage_may_reach_the_whole_layer(corpus: Corpus) -> None:
    stage = StageSettings(
        loss="align", unit="layer", tokens=tokens_of(2), batch_size=4, distance="relative"
    )
    trained = job(corpus, stages=[stage], measure=None)
    before = weights(trained)
    loop.train(trained)
    changed = {k for k, v in weights(trained).items() if not torch.equal(v, before[k])}
    assert any(name.startswith("model.layers.2.mlp.") for name in changed)
    assert all(name.startswith(("model.layers.1.", "model.layers.2.")) for name in changed)


def test_cross_entropy_needs_no_teacher(corpus: Corpus) -> None:
    stage = StageSettings(loss="ce", tokens=tokens_of(30), batch_size=4, learning_rate=3e-3)
    records = loop.train(job(corpus, stages=[stage], teacher=None))
    assert records[-1]["train_loss"] < records[1]["train_loss"]
    assert set(records[1]["losses"]) == {"ce"}


@pytest.mark.parametrize("loss", ["align", "kl"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(corpus: Corpus, loss: Any) -> None:
    gradients = []
    for accumulate in (1, 4):
        settings = StageSettings(
            loss=loss, tokens=tokens_of(1, 8), batch_size=8, accumulate=accumulate, ce_weight=0.5
        )
        trained = job(corpus)
        optimiser.set_trainable(trained.student, settings)
        stage = Stage(settings, trained.student, trained.base, trained.base)
        found = stage.backward(Batches(corpus, 8, seed=0).batch(0))
        named = trained.student.named_parameters()
        gradients.append((found, {n: p.grad for n, p in named if p.grad is not None}))
    (one, whole), (four, split) = gradients
    assert one.total == pytest.approx(four.total, rel=1e-5)
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("unit", ["mixer", "layer"])
def test_a_layers_alignment_loss_has_no_gradient_in_another_layer(unit: Any) -> None:
    base = base_model()
    student = convert(base, placement("none"), MIXERS["mamba2"], "qkvo")
    stage = StageSettings(loss="align", tokens=1, unit=unit)
    weight = torch.ones(2, 21)
    for call in layer_calls(base, tokens()):
        student.zero_grad()
        align_layer(call, student, weight, stage).backward()
        touched = {
            int(n.split(".")[2]) for n, p in student.named_parameters() if p.grad is not None
        }
        assert touched == {call.layer}


def test_one_pass_of_the_base_gives_every_layer_the_gradient_of_its_own_pass() -> None:
    base = base_model()
    base.requires_grad_(False)
    stage = StageSettings(loss="align", tokens=1)
    student = convert(base, placement("none"), MIXERS["mamba2"], "qkvo")
    layerwise_backward(student, base, tokens(), torch.ones(2, 21), stage)
    for layer in range(3):
        alone = convert(base, placement("none"), MIXERS["mamba2"], "qkvo")
        (call,) = [call for call in layer_calls(base, tokens()) if call.layer == layer]
        (align_layer(call, alone, torch.ones(2, 21), stage) / 3).backward()
        for mine, theirs in zip(
            student.model.layers[layer].parameters(),
            alone.model.layers[layer].parameters(),
            strict=True,
        ):
            assert (mine.grad is None) == (theirs.grad is None)
            if mine.grad is not None:
                torch.testing.assert_close(mine.grad, theirs.grad)


# --- what base and student share ------------------------------------------------------------


def test_frozen_weights_are_held_once_and_come_apart_when_they_are_trained() -> None:
    base = base_model()
    base.requires_grad_(False)
    student = convert(base, placement("mixed"), MIXERS["mamba2"], "qkvo")
    optimiser.set_trainable(student, StageSettings(tokens=1, trainable="mixers"))
    saved = share_frozen(student, base)
    mixers = optimiser.mixer_parameters(student)
    ids = {id(parameter) for parameter in base.parameters()}
    own = {name for name, p in student.named_parameters() if id(p) not in ids}
    assert own == mixers | {name for name in own if ".softmax." in name}  # heads cut out of layer 1
    shared = sum(p.nbytes for p in student.parameters() if id(p) in ids)
    assert saved == shared > 0
    assert student.lm_head.weight is student.model.embed_tokens.weight is base.lm_head.weight
    assert shared_layers(student, base) == 1
    unshare(student, base, {"model.embed_tokens.weight"})
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert student.lm_head.weight is not base.lm_head.weight
    assert torch.equal(student.lm_head.weight, base.lm_head.weight)
    assert shared_layers(student, base) == 0


@pytest.mark.parametrize("packing", ["whole", "isolate"])
def test_sharing_changes_no_bit(tmp_path: Path, packing: str) -> None:
    data = random_corpus(tmp_path / packing, packing)
    stages = [
        StageSettings(tokens=tokens_of(4), batch_size=4, trainable="mixers"),
        StageSettings(tokens=tokens_of(4), batch_size=4, trainable="all"),
        StageSettings(tokens=tokens_of(4), batch_size=4, trainable="mixers"),
    ]
    found = []
    for share in (True, False):
        trained = job(data, stages=stages, share=share)
        losses_seen = [record["train_loss"] for record in loop.train(trained)]
        found.append((losses_seen, weights(trained)))
    (one, shared), (two, apart) = found
    assert one == two
    assert all(torch.equal(value, apart[name]) for name, value in shared.items())


def test_the_shared_layers_are_run_once(corpus: Corpus) -> None:
    calls = {"base": 0, "student": 0}
    trained = job(corpus)
    optimiser.set_trainable(trained.student, StageSettings(tokens=1, trainable="mixers"))
    share_frozen(trained.student, trained.base)
    settings = StageSettings(tokens=1, batch_size=4, trainable="mixers")
    stage = Stage(settings, trained.student, trained.base, trained.base)

    def count(who: str) -> Any:
        def hook(*_: Any) -> None:
            calls[who] += 1

        return hook

    for who, model in (("base", trained.base), ("student", trained.student)):
        model.model.layers[0].mlp.register_forward_hook(count(who))
    stage.backward(Batches(corpus, 4, seed=0).batch(0))
    assert stage.shared == 1
    assert calls == {"base": 1, "student": 0}


# --- options of the loop --------------------------------------------------------------------


def test_activation_checkpointing_changes_nothing(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = loop.train(job(corpus))
    calls = 0

    def counted(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        return checkpoint(*arguments, **settings)

    monkeypatch.setattr(loop, "checkpoint", counted)
    two = loop.train(job(corpus, activation_checkpointing=True))
    assert [mine["train_loss"] for mine in one] == [theirs["train_loss"] for theirs in two]
    assert calls == 3 * 8  # every layer in every step of the second stage


def test_autocast_is_used_only_where_the_hardware_has_bfloat16(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for has in (False, True):
        monkeypatch.setattr(speed, "bfloat16_in_hardware", lambda device, has=has: has)
        trained = job(corpus, autocast=True)
        found[has] = [record["train_loss"] for record in loop.train(trained)[1:]]
        assert trained.student.dtype == torch.float32
    plain = [record["train_loss"] for record in loop.train(job(corpus))[1:]]
    assert found[False] == plain
    assert found[True] != plain
    assert found[True] == pytest.approx(plain, rel=0.05)


@pytest.mark.slow  # the compiler takes half a minute
def test_compiled_layers_train_alike(corpus: Corpus) -> None:
    stages = [StageSettings(tokens=tokens_of(3), batch_size=4, trainable="mixers")]
    plain = loop.train(job(corpus, stages=stages))
    compiled = loop.train(job(corpus, stages=stages, compile=True))
    assert compiled[-1]["train_loss"] == pytest.approx(plain[-1]["train_loss"], rel=1e-4)


def test_the_curve_says_what_was_done(corpus: Corpus) -> None:
    trained = job(corpus, log_tokens=[tokens_of(1), tokens_of(6)])
    records = loop.train(trained)
    per_step = tokens_of(1)
    assert [record["tokens"] // per_step for record in records] == [0, 1, 2, 4, 6, 8, 12]
    assert [record["stage_name"] for record in records] == ["align"] * 4 + ["kl"] * 3
    for record in records[1:]:
        assert set(record["losses"]) == {record["stage_name"]}
        assert bool(record["layer_losses"]) == (record["stage"] == 0)
        assert record["model_flops_per_second"] > 0
        assert 0 <= record["held_out_agreement"] <= 1
    assert set(records[-1]["learning_rates"]) == {"mixers", "rest"}
    best = min(records, key=lambda record: record["held_out_kl"])
    assert trained.best["tokens"] == best["tokens"]


def test_flops_are_those_of_the_products() -> None:
    """The closed form against a count of every matrix product of a real step."""
    from torch.utils.flop_counter import FlopCounterMode

    base = base_model()
    base.requires_grad_(False)
    student = convert(base, placement("mixed"), MIXERS["mamba2"], "qkvo")
    optimiser.set_trainable(student, StageSettings(tokens=1, trainable="mixers"))
    share_frozen(student, base)
    stage = Stage(StageSettings(tokens=1, trainable="mixers"), student, base, base)
    ids = tokens(4, 64)
    with FlopCounterMode(display=False) as counter:
        hidden, theirs = stage._both(ids)
        logits = student.lm_head(hidden)
        base.lm_head(theirs)
        logits.square().mean().backward()
    counted = counter.get_total_flops() / ids.numel()
    # the recurrences and the convolutions are left out of the closed form
    assert stage.flops(64) == pytest.approx(counted, rel=0.3)


# --- bad input ------------------------------------------------------------------------------


def test_a_stage_below_one_step_is_refused(corpus: Corpus) -> None:
    stage = StageSettings(tokens=tokens_of(1) - 1, batch_size=4)
    with pytest.raises(ValueError, match=r"stage kl: 95 tokens are less than one step of 4 rows"):
        loop.train(job(corpus, stages=[stage]))


def test_rows_beyond_the_models_range_are_refused_or_cut(corpus: Corpus) -> None:
    long = job(corpus)
    long.student.config.max_position_embeddings = 16
    with pytest.raises(ValueError, match=r"sequences of 24 tokens, the model's range is 16"):
        loop.train(long)
    cut = StageSettings(tokens=tokens_of(2), batch_size=4, context=12)
    long.stages = [cut]
    assert loop.train(long)[-1]["step"] == 4
    with pytest.raises(CorpusError, match="do not divide into pieces of 7"):
        loop.train(job(corpus, stages=[StageSettings(tokens=10_000, context=7)]))


def test_pieces_of_rows_are_the_rows(corpus: Corpus) -> None:
    pieces = Batches(corpus, 4, seed=0, context=8)
    assert pieces.rows.shape == (40 * 3, 8)
    assert np.array_equal(pieces.rows.reshape(40, CONTEXT), corpus.rows("train"))


def test_an_empty_corpus_is_refused(corpus: Corpus) -> None:
    manifest = json.loads((corpus.folder / "manifest.json").read_text())
    manifest["splits"]["train"]["rows"] = 0
    for name in ("train", "train_weight", "train_boundary"):
        (corpus.folder / f"{name}.bin").write_bytes(b"")
    write_json(corpus.folder / "manifest.json", manifest)
    with pytest.raises(CorpusError, match="split train has no rows; rebuild the corpus"):
        loop.train(job(Corpus(corpus.folder)))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_batch(
    corpus: Corpus, tmp_path: Path
) -> None:
    broken = job(corpus, tmp_path / "state", measure=None)
    broken.stages = broken.stages[1:]
    with torch.no_grad():
        broken.student.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"not finite at step 1 of stage kl") as caught:
        loop.train(broken)
    path = Path(str(caught.value).rpartition(" ")[2])
    kept = load_file(str(path))
    batch = Batches(corpus, 4, seed=3).batch(0)
    assert torch.equal(kept["tokens"], batch.tokens)
    assert torch.equal(kept["rows"], batch.rows)


# --- runs end to end ------------------------------------------------------------------------


def _spec(teacher: str = "self", **recipe: Any) -> dict[str, Any]:
    source = "nano:base" if teacher == "self" else f"nano:{teacher}"
    settings = {"use": "controlled", "tokens": 6 * 4 * 64, "log_points": 2}
    return {
        "run": "small",
        "base": {"name": "base", "source": "nano:base", "revision": None, "dtype": "float32"},
        "teacher": {"name": teacher, "source": source, "revision": None, "dtype": "float32"},
        "budget": {"layers": 2},
        "mixer": {"name": "mamba2", **MIXERS["mamba2"]},
        "initialisation": "qkvo",
        "recipe": {"name": "kl", "override": {"all": {"batch_size": 4}}, **settings, **recipe},
        "seed": 0,
    }


@pytest.fixture(scope="module")
def nano_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from rad.data.corpus import build
    from rad.models.sources import load_tokenizer
    from rad.settings import CorpusSettings

    folder = tmp_path_factory.mktemp("nano") / "corpus"
    settings = {"source": "nano", "tokens": 4096, "held_out_tokens": 512, "context": 64}
    build("distil", CorpusSettings.model_validate(settings), load_tokenizer("nano:base"), folder)
    return folder


def _run(folder: Path, corpus: Path, spec: dict[str, Any], **options: Any) -> dict[str, Any]:
    from rad.distillation.run import distil

    kept = Placement.from_layers(
        [1, 5], layers=8, heads=4, kv_heads=2, base="base", selector="uniform"
    )
    state = folder / "state"
    distil(spec, kept, corpus=corpus, state=state, output=folder / "run", **options)
    assert not state.exists()
    lines = (folder / "run" / "curve.jsonl").read_text().splitlines()
    training = json.loads((folder / "run" / "training.json").read_text())
    return {"curve": [json.loads(line) for line in lines], "training": training}


def test_a_run_writes_the_last_and_the_best_weights(tmp_path: Path, nano_corpus: Path) -> None:
    from rad.models import sources

    found = _run(tmp_path, nano_corpus, _spec(keep="both"))
    curve, training = found["curve"], found["training"]
    assert [record["step"] for record in curve] == [0, 3, 6]
    assert training["best"]["held_out_kl"] == min(record["held_out_kl"] for record in curve)
    held_out = HeldOut(Corpus(nano_corpus), sources.load("nano:base"))
    for folder, expected in (("model", curve[-1]), ("best", training["best"])):
        model = sources.load(str(tmp_path / "run" / folder))
        assert held_out(model)["held_out_kl"] == pytest.approx(expected["held_out_kl"], rel=1e-4)


def test_stored_outputs_of_a_teacher_give_the_run_of_the_live_teacher(
    tmp_path: Path, nano_corpus: Path
) -> None:
    from rad.distillation.teacher_outputs import write_outputs
    from rad.models import sources

    stored = tmp_path / "outputs"
    teacher = sources.load("nano:medium")
    write_outputs(teacher, nano_corpus, stored, "hidden", teacher_sha256="medium")
    curves = [
        _run(tmp_path / name, nano_corpus, _spec("medium"), **options)["curve"]
        for name, options in (
            ("live", {}),
            ("stored", {"teacher_outputs": stored, "teacher_sha256": "medium"}),
        )
    ]
    for live, other in zip(*curves, strict=True):
        for key in ("train_loss", "held_out_kl", "held_out_teacher_kl"):
            assert other[key] == pytest.approx(live[key], abs=1e-5)
        assert not math.isclose(live["held_out_kl"], live["held_out_teacher_kl"])


def test_alignment_of_a_base_is_what_aligned_runs_start_from(
    tmp_path: Path, nano_corpus: Path
) -> None:
    from rad.distillation.align import align
    from rad.models.sources import describe

    record = describe("base", {"source": "nano:base", "revision": None, "dtype": "float32"})
    assert record is not None
    settings = AlignmentSettings(tokens=6 * 4 * 64, batch_size=4, learning_rate=3e-3)
    folders = {"corpus": nano_corpus, "state": tmp_path / "state", "output": tmp_path / "aligned"}
    align(record, {"name": "mamba2", **MIXERS["mamba2"]}, settings, **folders)
    written = json.loads((tmp_path / "aligned" / "alignment.json").read_text())
    before, after = written["held_out_error_before"], written["held_out_error_after"]
    assert len(after) == 8
    assert sum(after) < sum(before)
    spec = _spec() | {"initialisation": "aligned"}
    start = _run(tmp_path, nano_corpus, spec, aligned=tmp_path / "aligned")["curve"][0]
    plain = _run(tmp_path / "plain", nano_corpus, _spec())["curve"][0]
    assert start["held_out_kl"] < plain["held_out_kl"]
