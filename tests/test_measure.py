"""Held-out figures: long rows are measured in parts, which changes nothing but the memory."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from distillation_fixture import CONTEXT, job, random_corpus

from rad.distillation import chunked, measure
from rad.distillation.measure import FORWARD_TOKENS, HeldOut
from rad.estimate import memory


def test_parts_of_few_tokens_give_the_same_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = random_corpus(tmp_path / "corpus")
    trained = job(corpus)
    whole = HeldOut(corpus, trained.base)
    assert len(whole.parts) == 1  # short rows stay in the batch that they were in
    monkeypatch.setattr(measure, "FORWARD_TOKENS", 2 * CONTEXT + 1)
    parts = HeldOut(corpus, trained.base)
    assert [len(part.tokens) for part in parts.parts] == [2] * (len(whole.tokens) // 2)
    one, many = whole(trained.student), parts(trained.student)
    for name, value in one.items():
        if name.startswith("held_out"):
            assert many[name] == pytest.approx(value, rel=1e-5), name
    assert one["held_out_kl"] > 0


def test_the_estimate_knows_how_much_is_measured_at_once() -> None:
    assert memory.MEASURE_FORWARD == FORWARD_TOKENS
    assert memory.MEASURE_TOKENS == measure.MOST_TOKENS
    assert memory.CHUNK_ELEMENTS == {"cpu": chunked.CPU_ELEMENTS, "cuda": chunked.GPU_ELEMENTS}
    for name, value in (("rows", memory.MEASURE_ROWS), ("batch_size", memory.MEASURE_BATCH)):
        assert inspect.signature(HeldOut).parameters[name].default == value
