"""What scoring and storing a teacher's outputs cost: documents, batches, dtype, more GPUs."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from test_estimate import found, study

from rad.estimate.documents import SETS, documents
from rad.estimate.jobs import Job
from rad.settings import TASK_SETTINGS, TaskTable
from rad.task_settings import suite_names

MADE_TO_LENGTH = {"perplexity", "ruler", "ruler_nano", "ruler_text"}


def _documents(kind: str, limit: int = 8192, **options: Any) -> list[Any]:
    table = TaskTable.model_validate({"tasks": {"t": {"kind": kind, **options}}})
    return documents(table.tasks["t"], table.wanted("t"), limit)


def _evaluation(count: int = 1, gpu: str = "h100", **evaluation: Any) -> Job:
    """The job that scores the base."""
    estimate = found(study(evaluation=evaluation, references=["base"]), gpu, count)
    return next(job for job in estimate.jobs if job.name == "model-base")


def test_every_kind_is_known() -> None:
    kinds = {kind for each in TASK_SETTINGS.values() for kind in get_args(_kind(each))}
    assert kinds == set(TASK_SETTINGS) == set(SETS) | MADE_TO_LENGTH
    for kind in kinds:
        for each in _documents(kind):
            assert each.count > 0 and 0 < each.mean <= each.longest, kind
            assert each.source, kind


def _kind(settings: Any) -> Any:
    return settings.model_fields["kind"].annotation


def test_sizes_are_the_published_ones_unless_fewer_are_asked_for() -> None:
    (mmlu,) = _documents("mmlu")
    assert (mmlu.count, mmlu.requests, mmlu.answer) == (14042, 4, 0)
    assert _documents("mmlu", samples=50)[0].count == 50
    assert _documents("gsm8k", samples=9999)[0].count == 1319
    assert _documents("kv_retrieval", samples=1600)[0].count == 1600  # made to order
    long, short = _documents("kv_retrieval", pairs=50)[0], _documents("kv_retrieval", pairs=10)[0]
    assert long.mean - short.mean == 40 * 6
    (sampled,) = _documents("cruxeval_output", generations=10)
    assert (sampled.count, sampled.requests, sampled.answer) == (800, 10, 256)
    few, many = (_documents("gsm8k", shots=shots)[0].mean for shots in (0, 5))
    assert many > 4 * few


def test_ruler_fills_its_lengths_with_all_sub_tasks() -> None:
    every = _documents("ruler", lengths=[4096, 8192], samples=500)
    assert sum(each.count for each in every) == 2 * 13 * 500
    assert {each.longest + each.answer for each in every} == {4096, 8192}
    one = _documents("ruler", subtasks=["niah_single_1"], lengths=[4096])
    assert [(each.count, each.answer) for each in one] == [(100, 128)]


def test_perplexity_is_cut_to_the_context() -> None:
    (whole,) = _documents("perplexity", 32768, samples=None)
    (cut,) = _documents("perplexity", 32768, samples=None, lengths=[2048])
    assert whole.logits == 32768 and cut.logits == 2048
    assert whole.count * whole.mean == pytest.approx(cut.count * cut.mean, rel=0.15)


@pytest.mark.parametrize("suite", suite_names())
def test_suites_are_estimated(suite: str) -> None:
    job = _evaluation(suites=[suite], dtype="bfloat16", batch_size=16, max_length=8192)
    assert job.tokens > 0 and job.gpu_hours > 0 and job.memory is not None


LONG = {"long": {"kind": "ruler", "lengths": [65536], "samples": 10}}


def test_a_long_prompt_is_mended_by_fewer_tokens_first() -> None:
    refused = _evaluation(tasks=LONG, batch_size=32)
    assert not refused.fits
    assert refused.remedy.startswith("evaluation.batch_tokens: ")
    tokens = int(refused.remedy.split()[1])
    mended = _evaluation(tasks=LONG, batch_size=32, batch_tokens=tokens)
    assert mended.fits
    more = _evaluation(tasks=LONG, batch_size=32, batch_tokens=2 * tokens)
    assert not more.fits  # the largest of those tried


def test_weights_that_do_not_fit_are_mended_by_bfloat16() -> None:
    longest = {"long": {"kind": "ruler", "lengths": [131072], "samples": 10}}
    refused = _evaluation(tasks=longest, batch_size=1, dtype="float32", batch_tokens=4096)
    assert refused.remedy == "evaluation.dtype: bfloat16"
    assert _evaluation(tasks=longest, batch_size=1, dtype="bfloat16").fits


def test_the_dtype_of_evaluation_decides_rate_and_weights() -> None:
    tasks = {"mmlu": {"kind": "mmlu"}}
    wide, narrow = (_evaluation(tasks=tasks, dtype=d) for d in ("float32", "bfloat16"))
    assert wide.memory is not None and narrow.memory is not None
    assert wide.memory.weights == 2 * narrow.memory.weights
    assert wide.gpu_hours > 10 * narrow.gpu_hours


def test_decoding_reads_weights_and_batches_share_the_reading() -> None:
    tasks = {"gsm8k": {"kind": "gsm8k"}}
    one, many = (_evaluation(tasks=tasks, batch_size=rows, dtype="bfloat16") for rows in (1, 32))
    assert one.flops == many.flops
    assert one.gpu_hours > 10 * many.gpu_hours
    # 1319 answers of 512 tokens one by one: 16 GB read for each at 40 % of 3.35 TB/s
    assert one.gpu_hours == pytest.approx(1319 * 512 * 16e9 / 1.34e12 / 3600, rel=0.1)


def _stored(count: int, gpu: str = "h100", **settings: Any) -> Job:
    grid = {**study()["grid"][0], "selector": "uniform", "teacher": "large"}
    outputs = {"large": {"kind": "sampled", **settings}}
    estimate = found(study(grid=[grid], teacher_outputs=outputs), gpu, count)
    return next(job for job in estimate.jobs if job.stage == "teacher outputs")


def test_a_teacher_larger_than_a_gpu_is_laid_over_several() -> None:
    refused = _stored(8)
    assert refused.remedy == "teacher_outputs.large.device_map: auto on 2 GPUs"
    laid = _stored(8, device_map="auto", parts=4)
    assert laid.fits and laid.gpus == 2 and "4 parts of 2 GPUs" in laid.name
    # one of them works at a time
    assert laid.gpu_hours == pytest.approx(2 * refused.gpu_hours)
    assert not _stored(1, device_map="auto").fits
    alone = _stored(8, "h200", batch_size=1, device_map="auto")
    assert alone.fits and alone.gpus == 1


def test_outputs_that_no_run_reads_are_not_counted() -> None:
    estimate = found(study(teacher_outputs={"large": {"kind": "hidden"}}))
    assert "teacher outputs" not in {job.stage for job in estimate.jobs}
