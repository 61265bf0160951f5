"""The models of a study and its distillation runs: FLOPs, memory, disk, and what makes one fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rad.estimate import flops
from rad.estimate.activations import Precision
from rad.estimate.jobs import Choice, Hardware, Job, halves, place
from rad.estimate.memory import MEASURE_ROWS, Memory, Step, host, peak
from rad.estimate.shapes import BYTES, Model, Shape, load_shape
from rad.placement import Budget, BudgetError
from rad.settings import NEEDS, StageSettings
from rad.study import Run, Study

STATES = 3  # two are kept while a third is written
COUNTS = (2, 4, 8, 16, 32, 64)
HEAD_WISE = ("retrieval_aware",)


class Distillation:
    """A study on some hardware: its models, and the jobs that distil them."""

    def __init__(self, study: Study, hardware: Hardware, configs: Path | None = None) -> None:
        self.study, self.hardware, self.configs = study, hardware, configs
        self._shapes: dict[str, Shape] = {}
        self._models: dict[tuple[str, str, str, str], Model] = {}

    # --- models -----------------------------------------------------------------------------

    def shape(self, model: str) -> Shape:
        """Shape of a model of the study."""
        if model not in self._shapes:
            self._shapes[model] = load_shape(self.study.models[model].source, self.configs)
        return self._shapes[model]

    def base(self, model: str) -> Model:
        """A model of the study as it is."""
        return Model(self.shape(model))

    def hybrid(self, base: str, kept: tuple[tuple[int, ...], ...], mixer: str) -> Model:
        """The hybrid of a base."""
        return Model(self.shape(base), kept, self.study.mixers[mixer].model_dump(mode="json"))

    def linear(self, base: str, mixer: str) -> Model:
        """The hybrid that keeps nothing."""
        return self.hybrid(base, ((),) * self.shape(base).layers, mixer)

    def dtype(self, model: str) -> str:
        """Dtype of a model's weights."""
        return self.study.models[model].dtype

    def student(self, run: Run) -> Model:
        """The hybrid of a run."""
        key = (run.base, run.selector, run.budget.slug, run.mixer)
        if key not in self._models:
            kept = self._kept(run.base, run.selector, run.budget)
            self._models[key] = self.hybrid(run.base, kept, run.mixer)
        return self._models[key]

    def _kept(self, base: str, selector: str, budget: Budget) -> tuple[tuple[int, ...], ...]:
        """Evenly spaced layers or heads that meet the budget."""
        from rad.selection.uniform import uniform_heads, uniform_layers

        s, settings = self.shape(base), self.study.selector_settings[selector]
        method = str(settings.method)  # type: ignore[attr-defined]
        head_wise = method in HEAD_WISE or getattr(settings, "unit", "") == "heads"
        per_head = 2 * s.head_dim * BYTES[self.dtype(base)]
        every = tuple(range(s.heads))
        try:
            if head_wise and budget.kv_bytes_per_token is not None:
                count = min(s.layers * s.heads, budget.kv_bytes_per_token // per_head)
            elif head_wise:
                count = budget.head_count(s.layers, s.heads)
            else:
                count = budget.layer_count(s.layers, s.heads, per_head * s.kv_heads)
                layers = set(uniform_layers(s.layers, count))
                return tuple(every if layer in layers else () for layer in range(s.layers))
        except BudgetError:
            if budget.kv_bytes_per_token is not None or (method in NEEDS and (method != "preset")):
                raise
            count = budget.head_count(s.layers, s.heads)
        pairs = uniform_heads(s.layers, s.heads, count)
        return tuple(
            tuple(head for layer, head in pairs if layer == index) for index in range(s.layers)
        )

    def _time(self, stage: StageSettings, corpus: str) -> int:
        context = self.study.corpora[corpus].context
        return min(stage.context or context, context)

    def _bf16(self, dtype: str, autocast: bool) -> bool:
        return autocast or dtype != "float32"

    def _narrow(self, choice: Choice, models: list[str]) -> list[Choice]:
        wide = [m for m in dict.fromkeys(models) if m != "self" and self.dtype(m) == "float32"]
        if choice.dtype != "float32" or not wide:
            return []
        said = ", ".join(f"models.{name}.dtype: bfloat16" for name in wide)
        return [replace(choice, dtype="bfloat16", said=(*choice.said, said))]

    # --- runs -------------------------------------------------------------------------------

    def _live(self, run: Run) -> bool:
        """Whether another model than the base is the teacher and in memory."""
        stages = self.study.recipes[run.recipe].stages
        taught = any(stage.loss == "kl" and stage.kl_weight for stage in stages)
        return taught and run.teacher != "self" and run.teacher not in self.study.teacher_outputs

    def _distil(self, run: Run) -> Job:
        study, recipe = self.study, self.study.recipes[run.recipe]
        student, base = self.student(run), self.base(run.base)
        dtype, job = self.dtype(run.base), Job("distil", run.id, users=[run.id])
        size = student.weight_bytes(dtype)
        job.disk = float(size * (2 if recipe.keep == "both" else 1))
        if not recipe.stages:
            job.memory = Memory(weights=size, teacher=base.weight_bytes(dtype), phase="load")
            job.fits = job.memory.total <= self.hardware.gpu.memory
            return job
        ever: set[str] = set()
        for stage in recipe.stages:
            ever |= flops.trainable(student, stage)
        changed = student.weight_bytes(dtype, ever)
        job.scratch = float(STATES * 3 * changed + (changed if recipe.keep != "last" else 0))
        for stage in recipe.stages:
            tokens, work = self._stage_work(run, stage, student)
            job.tokens, job.flops = job.tokens + tokens, job.flops + work
            bf16 = self._bf16(dtype, recipe.autocast)
            job.gpu_hours += self.hardware.hours(work, bf16)

        def worst(choice: Choice) -> Memory:
            steps = (
                self._stage_step(run, stage, student, choice, frozenset(ever))
                for stage in recipe.stages
            )
            return max((peak(step) for step in steps), key=lambda found: found.total)

        rows = max(stage.batch_size // stage.accumulate for stage in recipe.stages)
        live = self._live(run)
        start = Choice(
            recipe.activation_checkpointing,
            run.teacher in study.teacher_outputs,
            rows,
            dtype,
            min(self.hardware.count, rows),
        )
        place(job, self.hardware.gpu.memory, start, self._choices(run, start, live), worst)
        job.gpus = start.count
        # every process measures all rows, without autocast
        measured = self._measured_work(run, student)
        job.flops += job.gpus * measured
        job.gpu_hours += job.gpus * self.hardware.hours(measured, self._bf16(dtype, False))
        if job.gpus > 1:
            stages = (self._stage_step(run, s, student, start, frozenset()) for s in recipe.stages)
            job.host = max(map(host, stages))
        return job

    def _choices(self, run: Run, start: Choice, live: bool) -> Iterable[Choice]:
        """One change at a time, then one after the other on top of each other."""

        def checkpointed(c: Choice) -> list[Choice]:
            said = f"recipes.{run.recipe}.activation_checkpointing: true"
            return [] if c.checkpointing else [replace(c, checkpointing=True, said=(*c.said, said))]

        def stored(c: Choice) -> list[Choice]:
            said = f"teacher_outputs: {{{run.teacher}: {{kind: hidden}}}}"
            return [replace(c, stored=True, said=(*c.said, said))] if live and not c.stored else []

        def smaller(c: Choice) -> list[Choice]:
            return [
                replace(
                    c,
                    rows=r,
                    said=(*c.said, f"recipes.{run.recipe}: micro-batches of {r} rows (accumulate)"),
                )
                for r in halves(c.rows)
                if r >= c.count
            ]

        def narrow(c: Choice) -> list[Choice]:
            return self._narrow(c, [run.base, run.teacher])

        def more(c: Choice) -> list[Choice]:
            return [
                replace(c, count=n, said=(*c.said, f"--count {n} (FSDP2)"))
                for n in COUNTS
                if c.count < n <= c.rows
            ]

        changes = (checkpointed, stored, smaller, narrow, more)
        for change in changes:
            yield from change(start)
        so_far = start
        for change in changes:
            found = change(so_far)
            yield from found
            if found:
                so_far = found[-1] if change is not more else so_far
        yield from more(
            replace(
                so_far, rows=start.rows, said=tuple(w for w in so_far.said if "accumulate" not in w)
            )
        )

    def _first(self, student: Model, trained: set[str]) -> int:
        """Layers that are the base's own and frozen, from the first."""
        if "model.embed_tokens.weight" in trained:
            return 0
        names = flops.trained_by_layer(trained, len(student.layers))
        for index, layer in enumerate(student.layers):
            if layer.mixer is not None or names[index]:
                return index
        return len(student.layers)

    def _stage_work(self, run: Run, stage: StageSettings, student: Model) -> tuple[float, float]:
        """(tokens, FLOPs) of a stage."""
        recipe, base = self.study.recipes[run.recipe], self.base(run.base)
        time, trained = self._time(stage, self.study.corpus), flops.trainable(student, stage)
        tokens = stage.steps(time) * stage.batch_size * time
        if stage.loss == "align":
            work = flops.layerwise(student, base, time, trained, stage.unit).total
            return tokens, tokens / time * work
        if stage.loss == "orientation":
            return tokens, tokens / time * flops.orientation(student, base, time).total
        taught = stage.loss == "kl" and stage.kl_weight > 0
        is_self = run.teacher == "self"
        alone = self.hardware.count == 1
        first = self._first(student, trained) if taught and is_self and alone else 0
        again = recipe.activation_checkpointing
        work = flops.training(student, time, trained, first=first, checkpointing=again).total
        rows, head = student.shape.vocabulary, student.shape.tied
        name = "model.embed_tokens.weight" if head else "lm_head.weight"
        hidden = None
        if taught:
            teacher = self.base(run.base if is_self else run.teacher)
            if run.teacher not in self.study.teacher_outputs:
                work += flops.forward(teacher, time, head=False)
            stored = self.study.teacher_outputs.get(run.teacher)
            hidden = None if stored and stored.kind != "hidden" else teacher.shape.hidden
            work += flops.chunked_loss(
                student, time, teacher_hidden=hidden, rows=rows, head_trained=name in trained
            ).total
        if stage.loss == "ce" or stage.ce_weight:
            work += flops.chunked_loss(
                student, time, teacher_hidden=None, rows=rows, head_trained=name in trained
            ).total
        return tokens, tokens / time * work

    def _measured_rows(self) -> int:
        corpus = self.study.corpora[self.study.corpus]
        return max(1, min(MEASURE_ROWS, corpus.held_out_tokens // corpus.context))

    def _measured_work(self, run: Run, student: Model) -> float:
        """FLOPs of the curve's points: the student, and the logits of base and teacher.

        Their hidden states, once, are left out: less than a point of the curve.
        """
        recipe, time = self.study.recipes[run.recipe], self.study.corpora[self.study.corpus].context
        points = 1 + recipe.log_points * len(recipe.stages) + len(recipe.log_tokens)
        one = flops.forward(student, time)
        for model in {run.base, run.base if run.teacher == "self" else run.teacher}:
            one += 2.0 * time * self.shape(model).vocabulary * self.shape(model).hidden
        return points * self._measured_rows() * one

    def _stage_step(
        self,
        run: Run,
        stage: StageSettings,
        student: Model,
        choice: Choice,
        ever: frozenset[str],
    ) -> Step:
        trained = flops.trainable(student, stage)
        rows = min(choice.rows, stage.batch_size // stage.accumulate)
        live = self._live(run) and not choice.stored
        is_self = run.teacher == "self"
        taught = stage.loss == "kl" and stage.kl_weight > 0
        shared = taught and is_self and choice.count == 1
        theirs = "float32" if is_self else self.dtype(run.teacher)
        narrowed = choice.dtype != self.dtype(run.base)
        return Step(
            student,
            self.base(run.base),
            frozenset(trained),
            -(-rows // choice.count),
            self._time(stage, self.study.corpus),
            Precision(choice.dtype, self.study.recipes[run.recipe].autocast),
            loss=stage.loss,
            unit=stage.unit,
            divergence=stage.divergence,
            both_losses=taught and stage.ce_weight > 0,
            teacher=self.base(run.teacher) if live else None,
            teacher_dtype="bfloat16" if narrowed else theirs,
            stored=choice.stored and self._sparse(run),
            first=self._first(student, trained) if shared else 0,
            accumulated=rows < stage.batch_size,
            checkpointing=choice.checkpointing,
            measured_rows=self._measured_rows(),
            gpus=choice.count,
            ever_trained=ever,
        )

    def _sparse(self, run: Run) -> bool:
        """Whether the stored teacher gives probabilities of a few tokens."""
        settings = self.study.teacher_outputs.get(run.teacher)
        return settings is not None and settings.kind != "hidden"
