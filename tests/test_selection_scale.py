"""KL-guided candidates and shared scores at paper scale, on small models: memory, rates, locks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import retrieval_fixture
import torch
from pydantic import ValidationError
from selection_models import nano_record
from test_selection_kl_guided import CONTEXT, LAYERS, Inputs, report_of

from rad.distillation import losses, speed
from rad.distillation import optimiser as optimisers
from rad.placement import Budget, Placement
from rad.selection import (
    candidates,
    head_ablation,
    retrieval_aware,
    reuse,
    select,
    standalone,
    swap_score,
)
from rad.selection.candidates import Shared, Trainer
from rad.settings import AlignmentSettings, KLGuidedSettings, StageSettings

VOCABULARY = 96
STEP = 4 * CONTEXT  # tokens
GROUPS = [{"match": ["attention", "*.input_layernorm.*"], "learning_rate": 1e-2}]


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path)


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of one step are large already."""
    monkeypatch.setattr(candidates, "SHARED_LOGITS", STEP)
    monkeypatch.setattr(swap_score, "SHARED_LOGITS", STEP)


def scores(inputs: Inputs, **chosen: Any) -> list[float]:
    found = select(inputs.context(**chosen)).scores
    assert found is not None
    return found.values  # type: ignore[return-value]


def written_out(inputs: Inputs, layer: int, steps: int = 5) -> list[float]:
    """Losses of a candidate by the plain loop: whole batches, whole logits, one rate."""
    context = inputs.context()
    shared = Shared(context, context.settings)
    student = shared.hybrid([layer])
    stage = StageSettings(tokens=steps * STEP, batch_size=4)
    adamw, _ = optimisers.build(student, stage)
    parameters = [p for group in adamw.param_groups for p in group["params"]]
    found = []
    student.train()
    for step in range(steps):
        tokens, weight = shared.batches(step)
        with torch.no_grad():
            target = shared.base(tokens, use_cache=False).logits
        optimisers.set_rate(adamw, stage, step, steps)
        loss = losses.kl_loss(target, student(tokens, use_cache=False).logits, weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        adamw.zero_grad()
        found.append(loss.item())
    return found


def trained(inputs: Inputs, layer: int = 1, **chosen: Any) -> Trainer:
    context = inputs.context(**chosen)
    trainer = Trainer(Shared(context, context.settings), candidates.Candidate("c", layer, (layer,)))
    trainer.train(5)
    return trainer


def test_by_default_a_candidate_is_trained_to_the_bit_as_written_out(inputs: Inputs) -> None:
    assert trained(inputs).losses == written_out(inputs, 1)
    # recomputed activations are the same activations
    assert trained(inputs, activation_checkpointing=True).losses == trained(inputs).losses


def test_micro_batches_add_up_to_the_batch(inputs: Inputs) -> None:
    whole = trained(inputs)
    for accumulate in (2, 4):
        parts = trained(inputs, accumulate=accumulate)
        assert parts.losses == pytest.approx(whole.losses, rel=1e-4)
        assert parts.result().held_out == pytest.approx(whole.result().held_out, rel=1e-4)
        assert parts.spent.trained == whole.spent.trained == 5 * STEP
    with pytest.raises(ValidationError, match="batch_size 4 does not divide into 3"):
        inputs.context(accumulate=3)


def test_large_logits_are_never_whole(inputs: Inputs, no_room: None) -> None:
    longest = 0

    def watch(_module: Any, _arguments: Any, output: Any) -> None:
        nonlocal longest
        if isinstance(output, torch.Tensor) and output.shape[-1] == VOCABULARY:
            longest = max(longest, output[..., 0].numel())

    handle = torch.nn.modules.module.register_module_forward_hook(watch)
    try:
        found = select(inputs.context())
    finally:
        handle.remove()
    assert 0 < longest <= 6, "only to check the heads: a few tokens, or the last of every row"
    assert found.scores is not None
    expected = written_out(inputs, 1)
    assert trained(inputs).losses == pytest.approx(expected, rel=1e-4)


def test_large_logits_give_the_scores_of_whole_ones(
    inputs: Inputs, request: pytest.FixtureRequest
) -> None:
    kinds: list[dict[str, Any]] = [{}, {"variant": "gr_s2"}, {"variant": "swap"}]
    whole = [scores(inputs, **kind) for kind in kinds]
    request.getfixturevalue("no_room")
    for kind, expected in zip(kinds, whole, strict=True):
        assert scores(inputs, **kind) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("room", [STEP, 2 * STEP * VOCABULARY], ids=["chunked", "whole"])
def test_one_after_another_is_side_by_side(
    inputs: Inputs, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "SHARED_LOGITS", room)
    alive: list[Any] = []
    most = []
    build = optimisers.build

    def counted(student: Any, stage: StageSettings) -> Any:
        optimiser, names = build(student, stage)
        alive.append(weakref.ref(optimiser))
        most.append(sum(each() is not None for each in alive))
        return optimiser, names

    monkeypatch.setattr(optimisers, "build", counted)
    together = select(inputs.context(variant="avg_s2"))
    assert max(most) == 2 * LAYERS
    alive.clear()
    most.clear()
    apart = select(inputs.context(variant="avg_s2", side_by_side=False))
    assert max(most) == 1, "the student before is gone"
    assert report_of(apart)["scores"] == report_of(together)["scores"]
    assert apart.cost.trained_tokens == together.cost.trained_tokens
    assert apart.cost.flops > together.cost.flops, "the base ran for each"
    with pytest.raises(ValidationError, match="early_stop compares candidates while they train"):
        inputs.context(early_stop=True, side_by_side=False)


class Stop(Exception):
    """Stands for a killed job."""


def test_a_lone_candidate_goes_on_from_its_state(
    inputs: Inputs, tmp_path: Path, no_room: None
) -> None:
    state = tmp_path / "state"
    chosen: dict[str, Any] = {"side_by_side": False, "save_every_seconds": 1e-9, "check_every": 3}
    context = inputs.context(state=state, **chosen)

    def stop_in_the_second(message: str) -> None:
        if "layer001: 3 of 5 steps" in message:
            raise Stop

    context.progress = stop_in_the_second
    with pytest.raises(Stop):
        select(context)
    resumed = select(inputs.context(state=state, **chosen))
    assert resumed.scores == select(inputs.context(**chosen)).scores
    assert report_of(resumed)["reused"] == {
        "candidates": ["restore-00-layer000"],
        "trained_tokens": (5 + 2) * STEP,
    }
    assert resumed.cost.trained_tokens == LAYERS * 5 * STEP


def test_groups_and_decay_are_those_of_a_stage(inputs: Inputs) -> None:
    trainer = trained(
        inputs, groups=GROUPS, learning_rate=1e-3, schedule="constant", warmup_fraction=0.0
    )
    rates = optimisers.learning_rates(trainer.optimiser)
    assert rates == {"attention+*.input_layernorm.*": 1e-2, "rest": 1e-3}
    own = {
        name
        for name, group in zip(
            trainer.names,
            [g for g in trainer.optimiser.param_groups for _ in g["params"]],
            strict=True,
        )
        if group["lr"] == 1e-2
    }
    every = {name for name, _ in trainer.student.named_parameters()}
    assert own == {name for name in every if ".self_attn." in name or "input_layernorm" in name}
    decays = [group["weight_decay"] for group in trainer.optimiser.param_groups]
    assert sorted(set(decays)) == [0.0, 0.01]
    both = trained(inputs, decay_vectors=True)
    assert {group["weight_decay"] for group in both.optimiser.param_groups} == {0.01}
    assert both.losses != trained(inputs).losses


def test_autocast_where_the_hardware_has_it(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trained(inputs).losses
    found = {}
    for has in (False, True):
        monkeypatch.setattr(speed, "bfloat16_in_hardware", lambda device, has=has: has)
        trainer = trained(inputs, autocast=True)
        assert trainer.student.dtype == torch.float32
        found[has] = trainer.losses
    assert found[False] == pytest.approx(plain, rel=1e-4)
    assert found[True] == pytest.approx(plain, rel=0.1) and found[True] != found[False]


# --- several budgets ------------------------------------------------------------------------


def test_retrieval_scores_are_made_once_for_all_budgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Inputs(tmp_path).base
    calls = []
    ablate = head_ablation.ablate_heads

    def counted(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        return ablate(*arguments, **settings)

    monkeypatch.setattr(retrieval_aware, "ablate_heads", counted)

    def run(heads: int, state: Path | None, **chosen: Any) -> Placement:
        context = retrieval_fixture.context_of(base, Budget(heads=heads), **chosen)
        context.resources = {"state": state}
        return select(context)

    for chosen in ({}, {"prefilter": 0.5}):
        alone = [run(heads, None, **chosen) for heads in (2, 4)]
        calls.clear()
        shared = [run(heads, tmp_path / "state", **chosen) for heads in (2, 4)]
        assert len(calls) == 1
        for mine, theirs in zip(shared, alone, strict=True):
            assert _said(mine) == _said(theirs)
    calls.clear()
    run(4, tmp_path / "state", seed=1)
    assert len(calls) == 1, "another probe is not these scores"


def _said(placement: Placement) -> dict[str, Any]:
    """All that a placement says but how long it took and who took it."""
    found = placement.model_dump(mode="json")
    found["cost"].pop("seconds")
    found["provenance"].get("kl_guided", {}).pop("reused", None)
    return found


HOLD = """
import sys, time
from pathlib import Path
from rad.selection import reuse
with reuse.alone(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_free_when_its_process_dies(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == b"held\n"
        said: list[str] = []

        def kill(text: str) -> None:
            said.append(text)
            child.send_signal(signal.SIGKILL)

        with reuse.alone(tmp_path, kill):
            assert child.wait() == -signal.SIGKILL
        assert len(said) == 1 and f"waiting for process {child.pid} on " in said[0]
        with reuse.alone(tmp_path, said.append):
            assert len(said) == 1
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.fixture
def nano(tmp_path: Path) -> dict[str, Any]:
    """The nano base with a small corpus and a short alignment; skips where it is not shipped."""
    from rad.data.corpus import build
    from rad.distillation.align import align
    from rad.models import sources
    from rad.settings import CorpusSettings, Mamba2Settings

    record = nano_record()
    corpus = CorpusSettings(source="nano", tokens=8192, held_out_tokens=2048, context=64, seed=11)
    build("c", corpus, sources.load_tokenizer("nano:base"), tmp_path / "corpus")
    mixer = Mamba2Settings(chunk=64).model_dump()
    align(
        record,
        mixer,
        AlignmentSettings(tokens=1024, batch_size=8),
        corpus=tmp_path / "corpus",
        state=tmp_path / "state",
        output=tmp_path / "aligned",
    )
    return {
        "record": record,
        "corpus": tmp_path / "corpus",
        "aligned": tmp_path / "aligned",
        "mixer": mixer,
    }


def _until(stream: Iterator[str], word: str) -> list[str]:
    lines = []
    for line in stream:
        lines.append(line)
        if word in line:
            return lines
    raise AssertionError(f"no {word!r} in {lines}")


def test_two_budgets_at_once_train_every_candidate_once(
    nano: dict[str, Any], tmp_path: Path
) -> None:
    values = {"tokens": 2 * 4 * 64, "batch_size": 4, "held_out_rows": 4, "method": "kl_guided"}
    (tmp_path / "source.json").write_text(json.dumps(nano["record"]), encoding="utf-8")
    state = tmp_path / "together"
    command = [sys.executable, "-m", "rad", "--threads", "1", "select", "kl_guided"]
    command += ["--settings", json.dumps(values), "--mixer", json.dumps(nano["mixer"])]
    command += ["--model", str(tmp_path / "source.json"), "--state", str(state)]
    command += ["--corpus", str(nano["corpus"]), "--aligned", str(nano["aligned"])]
    budgets = ("l2", "l4")
    jobs = {}
    try:
        with reuse.alone(state, print):  # both have come before either goes on
            for budget in budgets:
                rest = ["--budget", budget, "--out", str(tmp_path / f"{budget}.json")]
                jobs[budget] = subprocess.Popen(
                    [*command, *rest], stderr=subprocess.PIPE, text=True, encoding="utf-8"
                )
            said = {}
            for budget, job in jobs.items():
                assert job.stderr is not None
                said[budget] = _until(job.stderr, f"waiting for process {os.getpid()} on ")
        for budget, job in jobs.items():
            said[budget] += job.communicate()[1].splitlines()
            assert job.returncode == 0, said
    finally:
        for job in jobs.values():
            job.kill()
            job.wait()
    lines = [line for text in said.values() for line in text]
    layers = nano["record"]["layers"]
    assert sum("held-out KL" in line for line in lines) == layers
    settings = KLGuidedSettings.model_validate(values)
    reused = []
    for budget in budgets:
        found = Placement.load(tmp_path / f"{budget}.json")
        reused.append(len(report_of(found).get("reused", {}).get("candidates", [])))
        alone = standalone.run(
            "kl_guided",
            settings,
            budget=Budget.parse(budget),
            state=tmp_path / "sequential",
            **nano,
        )
        assert _said(found) == _said(alone)
    assert sorted(reused) == [0, layers]


# --- stage 1 --------------------------------------------------------------------------------


def test_alignment_is_the_stage_that_it_was_unless_it_says_so() -> None:
    kept = {"tokens": 4096, "batch_size": 8}
    plain = AlignmentSettings(**kept).stage()
    assert plain == StageSettings(loss="align", trainable="mixers", **kept)
    chosen = AlignmentSettings(**kept, accumulate=4, decay_vectors=True).stage()
    assert (chosen.accumulate, chosen.decay_vectors) == (4, True)
    same = chosen.model_copy(update={"accumulate": 1, "decay_vectors": False})
    assert same == plain
    with pytest.raises(ValidationError, match="batch_size 8 does not divide into 3"):
        AlignmentSettings(**kept, accumulate=3)
