"""The training loop: stages of distillation with a curve, a resumable state and clean interruption.

    for every stage:   freeze -> share what is frozen with the base -> optimiser
        for every step:   losses and gradients (`stages`) -> clip -> AdamW
                          at fixed token counts: a record of the curve, best weights
                          every minute, and on a signal: the state

Legend: B batch, T time.
"""

from __future__ import annotations

import functools
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rad.data.corpus import Corpus
from rad.distillation import optimiser as optimisers
from rad.distillation import parallel, speed
from rad.distillation import state as states
from rad.distillation.batches import Batch, Batches, effective_context
from rad.distillation.layerwise import attention_pairs
from rad.distillation.shared_prefix import share_frozen, unshare
from rad.distillation.stages import Stage, StepLosses
from rad.progress import Progress
from rad.recipe_settings import StageSettings

__all__ = ["Interrupted", "Job", "attention_pairs", "recomputing", "train"]

Record = dict[str, Any]
Measure = Callable[[Any], Record]
BEST = "best.safetensors"


class Interrupted(Exception):
    """The job was asked to stop; its state is saved."""


@dataclass
class Job:
    """Everything a training run needs; `measure` adds held-out figures to a curve record.

    `teacher` is a model or a `teachers.Teacher`; `vocabulary` the rows of the heads that count when
    they differ. `share` turns off what base and student share.
    """

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
    log_tokens: list[int] = field(default_factory=list)
    save_every_seconds: float = 60.0
    title: str = "distil"
    keep_best: bool = False
    autocast: bool = False
    activation_checkpointing: bool = False
    compile: bool = False
    share: bool = True
    vocabulary: int | None = None
    records: list[Record] = field(default_factory=list)
    best: Record = field(default_factory=dict)  # step, tokens and held_out_kl of the best record
    seconds: float = 0.0
    resumed: int = 0

    def context(self, stage: StageSettings) -> int:
        """Tokens of a sequence in a stage."""
        return effective_context(self.corpus, stage.context)

    def steps(self, stage: StageSettings) -> int:
        """Optimiser steps of a stage; raises `ValueError` when there is not one."""
        return stage.steps(self.context(stage))

    def tokens(self, stages: list[StageSettings]) -> int:
        """Tokens that whole stages train on."""
        return sum(self.steps(stage) * stage.batch_size * self.context(stage) for stage in stages)


def train(job: Job) -> list[Record]:
    """Run every stage of `job` on `job.student` in place and return the curve's records.

    Raises `Interrupted` after a signal (state saved), `StateError` on a foreign state, a damaged
    one without an older good one, or a full disk, `FloatingPointError` when a loss is no number,
    `ValueError` when a stage is shorter than a step or its sequences exceed the model's range.
    """
    total = sum(job.steps(stage) for stage in job.stages)
    _check_range(job)
    state = job.state
    saved = parallel.from_first(lambda: states.latest(state, job.digest)) if state else None
    first_stage, first_step = 0, 0
    if saved:
        first_stage, first_step = saved["stage"], saved["step"]
        job.records, job.seconds, job.best = saved["records"], saved["seconds"], saved["best"]
        job.resumed = saved["resumed"] + 1
    done = sum(job.steps(stage) for stage in job.stages[:first_stage]) + first_step
    changed = _ever_trained(job)
    with (
        parallel.progress(job.title, total, done) as progress,
        _signals() as asked,
        parallel.sharded(job),
        _recomputing(job),
    ):
        for index in range(first_stage, len(job.stages)):
            resume = saved if saved and index == first_stage else None
            _StageLoop(job, index, changed, progress, asked).run(resume)
    return job.records


def _check_range(job: Job) -> None:
    longest = getattr(job.student.config, "max_position_embeddings", None)
    for stage in job.stages:
        if longest is not None and job.context(stage) > longest:
            raise ValueError(
                f"stage {stage.title}: sequences of {job.context(stage)} tokens, the model's range "
                f"is {longest} (max_position_embeddings); give the stage a shorter `context`"
            )
        live = isinstance(job.teacher, torch.nn.Module) or stage.loss != "kl"
        if not live and job.context(stage) != job.corpus.context:
            raise ValueError(
                f"stage {stage.title}: context {stage.context} cuts the corpus's rows of "
                f"{job.corpus.context} tokens, for which the teacher's outputs were stored; leave "
                "`context` out or store outputs of a corpus of that context"
            )


def _ever_trained(job: Job) -> set[str]:
    """Names of the parameters that some stage trains: all that a state must hold."""
    names: set[str] = set()
    for stage in job.stages:
        names |= set(optimisers.set_trainable(job.student, stage))
    return names


class _StageLoop:
    """One stage of a job: its optimiser, batches, and the sums since the last record."""

    def __init__(
        self, job: Job, index: int, changed: set[str], progress: Progress, asked: dict[str, bool]
    ) -> None:
        self.job, self.index, self.changed = job, index, changed
        self.progress, self.asked = progress, asked
        self.settings = job.stages[index]
        self.steps = job.steps(self.settings)
        self.batches = Batches(
            job.corpus, self.settings.batch_size, job.seed, context=self.settings.context
        )
        self.tokens_before = job.tokens(job.stages[:index])
        self.points = self._points()
        self.sums, self.count = StepLosses(), 0

    def _points(self) -> set[int]:
        """Steps after which a record is taken: a function of the settings alone."""
        job, per_step = self.job, self.batches.tokens_per_batch
        points = {round(k * self.steps / job.log_points) for k in range(1, job.log_points + 1)}
        for tokens in job.log_tokens:
            step = math.ceil((tokens - self.tokens_before) / per_step)
            if 0 < step <= self.steps:
                points.add(step)
        return points

    def run(self, saved: dict[str, Any] | None) -> None:
        job, settings, student = self.job, self.settings, self.job.student
        unshare(student, job.base, optimisers.matching(student, settings.trainable))
        self.optimiser, self.names = optimisers.build(student, settings)
        start = 0
        if saved:
            states.restore(Path(saved["path"]), student, self.optimiser, self.names)
            start, self.count = saved["step"], saved["count"]
            self.sums = StepLosses(**saved["sums"])
        share = job.share and not parallel.active()  # pieces are kept, not shared
        if share:
            share_frozen(student, job.base)
        self.stage = Stage(
            settings,
            student,
            job.base,
            job.teacher,
            share=share,
            autocast=job.autocast,
            vocabulary=job.vocabulary,
        )
        if job.compile:
            for layer in list(student.base_model.layers)[self.stage.shared :]:
                layer.compile()
        if not saved and self.index == 0:
            self._record(0, None)
        self.parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        student.train()
        self._loop(start)
        student.eval()

    def _loop(self, start: int) -> None:
        job = self.job
        last_save = clock = time.perf_counter()
        for step in range(start, self.steps):
            found = self._step(step)
            self.sums.add(found)
            self.count += 1
            now = time.perf_counter()
            job.seconds, clock = job.seconds + now - clock, now
            tokens = self.tokens_before + (step + 1) * self.batches.tokens_per_batch
            where = f"stage {self.index + 1} of {len(job.stages)}, {tokens} tokens"
            self.progress.advance(f"{where}, loss {found.total:.4f}")
            if step + 1 in self.points:
                self._record(step + 1, self.sums.divided(self.count))
                self.sums, self.count = StepLosses(), 0
                clock = time.perf_counter()  # measuring is not training time
            due = clock - last_save > job.save_every_seconds
            stop, due = parallel.any_of(self.asked["stop"], self.asked["save"] or due)
            if stop:
                self._save(step + 1)
                raise Interrupted(
                    f"{job.title}: stopped at step {step + 1} of {self.steps}; state saved"
                )
            if due:
                self._save(step + 1)
                self.asked["save"] = False
                last_save = clock = time.perf_counter()

    def _step(self, step: int) -> StepLosses:
        optimisers.set_rate(self.optimiser, self.settings, step, self.steps)
        batch = self.batches.batch(step)
        found = self.stage.backward(batch)
        # without a limit the norm is still computed: it tells a gradient that is no number
        limit = math.inf if self.settings.clip is None else self.settings.clip
        norm = parallel.clip(self.parameters, limit)
        if not torch.isfinite(norm) or not math.isfinite(found.total):
            self._broken(step, batch, found.total)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return found

    def _broken(self, step: int, batch: Batch, loss: float) -> None:
        where = ""
        if self.job.state is not None:
            tensors: dict[str, Tensor] = {
                "tokens": batch.tokens,
                "weight": batch.weight,
                "rows": batch.rows,
            }
            folder = self.job.state
            kept = parallel.from_first(lambda: states.save_batch(folder, tensors))
            where = f"; the batch is in {kept}"
        raise FloatingPointError(
            f"{self.job.title}: loss or gradient is not finite at step {step + 1} of stage "
            f"{self.settings.title} (loss {loss}); lower the learning rate{where}"
        )

    def _save(self, step: int) -> None:
        job = self.job
        if job.state is None:
            return
        meta = {
            "digest": job.digest,
            "stage": self.index,
            "step": step,
            "records": job.records,
            "best": job.best,
            "seconds": job.seconds,
            "resumed": job.resumed,
            "sums": asdict(self.sums),
            "count": self.count,
        }
        states.save(job.state, job.student, self.optimiser, self.names, meta, self.changed)

    def _record(self, step: int, mean: StepLosses | None) -> None:
        """Append a point of the curve, and keep the weights when they are the best so far."""
        job = self.job
        tokens = self.tokens_before + step * self.batches.tokens_per_batch
        rates = optimisers.learning_rates(self.optimiser)
        last = job.records[-1] if job.records else {"tokens": tokens, "seconds": job.seconds}
        elapsed = job.seconds - last["seconds"]
        pace = (tokens - last["tokens"]) / elapsed if elapsed else 0.0  # since the last record
        record: Record = {
            "step": step,
            "tokens": tokens,
            "stage": self.index,
            "stage_name": self.settings.title,
            "train_loss": None if mean is None else mean.total,
            "losses": {} if mean is None else mean.parts,
            "layer_losses": {} if mean is None else mean.layers,
            "learning_rate": list(rates.values())[-1],
            "learning_rates": rates,
            "seconds": job.seconds,
            "tokens_per_second": pace,
            "model_flops_per_second": pace * self.stage.flops(self.batches.context),
            "peak_memory_mib": speed.peak_memory_mib(self.stage.device),
        }
        if job.measure is not None:
            job.student.eval()
            record |= parallel.measured(job.student, job.measure)
            job.student.train()
            self._keep_best(record)
        job.records.append(record)

    def _keep_best(self, record: Record) -> None:
        job, key = self.job, "held_out_kl"
        if job.best and not record[key] < job.best[key]:
            return
        job.best = {name: record[name] for name in ("step", "tokens", "stage", key)}
        if job.keep_best and job.state is not None:
            states.save_weights(job.state / BEST, job.student, self.changed)


def _recomputing(job: Job) -> AbstractContextManager[None]:
    """`recomputing` of the job's student, as the job says."""
    return recomputing(job.student, job.activation_checkpointing)


@contextmanager
def recomputing(student: Any, wanted: bool) -> Iterator[None]:
    """Activation checkpointing of every layer within the block, if it is wanted.

    Not the library's switch, which also makes the embeddings' output require a gradient: the
    backward pass would run down to layers that nobody trains.
    """
    layers = list(student.base_model.layers) if wanted else []
    for layer in layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.gradient_checkpointing, layer._gradient_checkpointing_func


@contextmanager
def _signals() -> Iterator[dict[str, bool]]:
    """Turn signals into flags that are read after each step.

    SIGTERM, SIGINT and SIGUSR1 ask to save and stop, SIGUSR2 to save and go on.
    """
    asked = {"stop": False, "save": False}

    def stop(_number: int, _frame: Any) -> None:
        asked["stop"] = True

    def save(_number: int, _frame: Any) -> None:
        asked["save"] = True

    wanted = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGUSR1), stop)
    previous = {}
    for number, handler in (*wanted.items(), (signal.SIGUSR2, save)):
        try:
            previous[number] = signal.signal(number, handler)
        except ValueError:  # not the main thread: the caller handles signals
            break
    try:
        yield asked
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
