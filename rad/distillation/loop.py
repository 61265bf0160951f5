"""The training loop: stages of distillation with a curve, a resumable state and clean interruption.

    teacher(tokens) --KL--> student(tokens)        loss `kl`
    base layer input --> base attention output     loss `align`, teacher-forced, layer by layer

Legend: B batch, T time, E hidden size, V vocabulary.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rad.data.corpus import Corpus
from rad.distillation import losses
from rad.distillation import optimiser as optimisers
from rad.distillation import state as states
from rad.distillation.batches import Batches
from rad.models.hybrid import HybridAttention
from rad.progress import Progress
from rad.settings import StageSettings

Record = dict[str, Any]
Measure = Callable[[Any], Record]


class Interrupted(Exception):
    """The job was asked to stop; its state is saved."""


@dataclass
class Job:
    """Everything a training run needs; `measure` adds held-out figures to a curve record."""

    student: Any
    base: Any
    teacher: Any
    corpus: Corpus
    stages: list[StageSettings]
    seed: int
    digest: str = ""
    state: Path | None = None
    measure: Measure | None = None
    log_points: int = 12
    save_every_seconds: float = 60.0
    title: str = "distil"
    records: list[Record] = field(default_factory=list)
    seconds: float = 0.0
    resumed: int = 0


def train(job: Job) -> list[Record]:
    """Run every stage of `job` on `job.student` in place and return the curve's records.

    Raises `Interrupted` after a signal (state saved), `StateError` on a foreign or corrupt state,
    `FloatingPointError` when the loss is no number.
    """
    saved = states.latest(job.state, job.digest) if job.state else None
    first_stage, first_step = 0, 0
    if saved:
        first_stage, first_step = saved["stage"], saved["step"]
        job.records, job.seconds = saved["records"], saved["seconds"]
        job.resumed = saved["resumed"] + 1
    done = sum(_steps(job, stage) for stage in job.stages[:first_stage]) + first_step
    total = sum(_steps(job, stage) for stage in job.stages)
    with Progress(job.title, total, done) as progress, _signals() as stop:
        for index, stage in enumerate(job.stages):
            if index < first_stage:
                continue
            resume = saved if saved and index == first_stage else None
            _stage(job, index, stage, resume, progress, stop)
    return job.records


def _steps(job: Job, stage: StageSettings) -> int:
    return max(1, stage.tokens // (stage.batch_size * job.corpus.context))


def _stage(
    job: Job,
    index: int,
    stage: StageSettings,
    saved: dict[str, Any] | None,
    progress: Progress,
    stop: dict[str, bool],
) -> None:
    student, steps = job.student, _steps(job, stage)
    optimiser, names = optimisers.build(student, stage)
    batches = Batches(job.corpus, stage.batch_size, job.seed)
    tokens_before = sum(
        _steps(job, earlier) * earlier.batch_size * job.corpus.context
        for earlier in job.stages[:index]
    )
    points = {round(k * steps / job.log_points) for k in range(1, job.log_points + 1)}
    loss_sum, loss_count, start = 0.0, 0, 0
    if saved:
        states.restore(saved["path"], student, optimiser, names)
        start, loss_sum, loss_count = saved["step"], saved["loss_sum"], saved["loss_count"]
    elif index == 0:
        job.records.append(_record(job, 0, 0, index, None, 0.0))
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    last_save = clock = time.perf_counter()
    student.train()

    def save(step: int) -> None:
        if job.state is None:
            return
        meta = {
            "digest": job.digest,
            "stage": index,
            "step": step,
            "records": job.records,
            "seconds": job.seconds,
            "resumed": job.resumed,
            "loss_sum": loss_sum,
            "loss_count": loss_count,
        }
        states.save(job.state, student, optimiser, names, meta)

    for step in range(start, steps):
        tokens, weight = batches(step)
        learning_rate = optimisers.set_rate(optimiser, stage, step, steps)
        loss = _loss(job, stage, tokens, weight)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, stage.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"{job.title}: the gradient is not finite at step {step + 1} (loss {loss.item()}); "
                "lower the learning rate"
            )
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        loss_sum, loss_count = loss_sum + loss.item(), loss_count + 1
        now = time.perf_counter()
        job.seconds, clock = job.seconds + now - clock, now
        tokens_done = tokens_before + (step + 1) * batches.tokens_per_batch
        where = f"stage {index + 1} of {len(job.stages)}, {tokens_done} tokens"
        progress.advance(f"{where}, loss {loss.item():.4f}")
        if step + 1 in points:
            job.records.append(
                _record(job, step + 1, tokens_done, index, loss_sum / loss_count, learning_rate)
            )
            loss_sum, loss_count = 0.0, 0
            clock = time.perf_counter()  # measuring is not training time
        if stop["now"]:
            save(step + 1)
            raise Interrupted(f"{job.title}: stopped at step {step + 1} of {steps}; state saved")
        if clock - last_save > job.save_every_seconds:
            save(step + 1)
            last_save = time.perf_counter()
    student.eval()


def _loss(job: Job, stage: StageSettings, tokens: Tensor, weight: Tensor) -> Tensor:
    if stage.loss == "align":
        return _alignment(job.student, job.base, tokens, weight)
    with torch.no_grad():
        target = job.teacher(tokens, use_cache=False).logits
    logits = job.student(tokens, use_cache=False).logits
    loss = stage.kl_weight * losses.kl_loss(target, logits, weight, stage.temperature)
    if stage.ce_weight:
        loss = loss + stage.ce_weight * losses.ce_loss(logits, tokens, weight)
    return loss


def _alignment(student: Any, base: Any, tokens: Tensor, weight: Tensor) -> Tensor:
    """Mean over converted layers of the distance between attention and mixer outputs.

    Teacher-forced: each layer gets the base's own input, so the layers are independent.
    """
    total: list[Tensor] = []
    for layer, inputs, output, rope in attention_pairs(base, tokens):
        module = student.model.layers[layer].self_attn
        if isinstance(module, HybridAttention):
            mine, _ = module(inputs, position_embeddings=rope)
            total.append(losses.alignment_loss(output, mine, (weight > 0).float()))
    return torch.stack(total).mean()


def attention_pairs(
    base: Any, tokens: Tensor
) -> Iterator[tuple[int, Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """(layer, input (B,T,E), output (B,T,E), rope) of every attention layer, from one forward."""
    seen: list[tuple[int, Tensor, Tensor, tuple[Tensor, Tensor]]] = []

    def hook(layer: int) -> Callable[..., None]:
        def keep(_module: Any, _args: Any, kwargs: dict[str, Any], output: Any) -> None:
            seen.append((layer, kwargs["hidden_states"], output[0], kwargs["position_embeddings"]))

        return keep

    handles = [
        layer.self_attn.register_forward_hook(hook(index), with_kwargs=True)
        for index, layer in enumerate(base.model.layers)
    ]
    try:
        with torch.no_grad():
            base.model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    yield from seen


def _record(
    job: Job, step: int, tokens: int, stage: int, loss: float | None, learning_rate: float
) -> Record:
    import resource

    # ru_maxrss is in KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    record: Record = {
        "step": step,
        "tokens": tokens,
        "stage": stage,
        "train_loss": loss,
        "learning_rate": learning_rate,
        "seconds": job.seconds,
        "tokens_per_second": tokens / job.seconds if job.seconds else 0.0,
        "peak_memory_mib": peak,
    }
    if job.measure is not None:
        job.student.eval()
        record |= job.measure(job.student)
        job.student.train()
    return record


@contextmanager
def _signals() -> Iterator[dict[str, bool]]:
    """Turn SIGTERM, SIGINT and SIGUSR1 into a flag that is read after each step."""
    stop = {"now": False}

    def ask(_number: int, _frame: Any) -> None:
        stop["now"] = True

    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        try:
            previous[number] = signal.signal(number, ask)
        except ValueError:  # not the main thread: the caller handles signals
            break
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
