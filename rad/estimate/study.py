"""The jobs of a study and what each costs; a job that several runs share is counted once.

    corpus -> alignment, teacher outputs -> selection -> distil -> evaluate

Which heads a selector will keep is not known yet: layers and heads are taken evenly spaced.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rad.estimate import flops, selection
from rad.estimate.activations import WIDE, Precision, kept
from rad.estimate.distil import STATES, Distillation
from rad.estimate.evaluation import scored
from rad.estimate.jobs import Choice, Hardware, Job, halves, place
from rad.estimate.memory import Memory, Step, peak
from rad.estimate.shapes import BYTES, Model
from rad.selector_settings import SHARED_LOGITS, shares_scores
from rad.settings import needs_of
from rad.study import Run, Study

STAGES = ("corpus", "alignment", "teacher outputs", "selection", "distil", "evaluate")


class Estimate(Distillation):
    """Every job of `study` on `hardware`; raises `ValueError` on a model of unknown shape."""

    def __init__(self, study: Study, hardware: Hardware, configs: Path | None = None) -> None:
        super().__init__(study, hardware, configs)
        self.jobs: list[Job] = []
        self.jobs += [self._corpus(name) for name in self._corpora()]
        self.jobs += [self._alignment(*key, users) for key, users in self._alignments().items()]
        taught = {run.teacher for run in study.run_table.values()}
        self.jobs += [self._teacher(name) for name in study.teacher_outputs if name in taught]
        self.jobs += self._selections()
        self.jobs += [self._distil(run) for run in study.run_table.values()]
        # students are saved, and so loaded, in float32 unless the evaluation says otherwise
        scores = [(run.id, self.student(run), "float32") for run in study.run_table.values()]
        scores += [(f"model-{n}", self.base(n), self.dtype(n)) for n in study.references]
        self.jobs += [
            scored(study.evaluation, hardware, name, model, dtype) for name, model, dtype in scores
        ]

    @property
    def refused(self) -> list[Job]:
        """Jobs that do not fit."""
        return [job for job in self.jobs if not job.fits]

    # --- jobs before the runs ---------------------------------------------------------------

    def _corpora(self) -> list[str]:
        study = self.study
        used = [study.corpus, study.calibration]
        used += [study.alignment.corpus] if study.alignment else []
        return list(dict.fromkeys(used))

    def _corpus(self, name: str) -> Job:
        settings = self.study.corpora[name]
        tokens = settings.tokens + settings.held_out_tokens
        first = self.study.grid[0].base if self.study.grid else next(iter(self.study.models))
        width = 2 if self.shape(first).vocabulary <= 2**16 else 4
        return Job("corpus", name, tokens, disk=tokens * (width + 2), gpus=0)

    def _alignments(self) -> dict[tuple[str, str], list[str]]:
        """(base, mixer) -> who starts from that alignment."""
        found: dict[tuple[str, str], list[str]] = {}
        for run in self.study.run_table.values():
            if run.initialisation == "aligned":
                found.setdefault((run.base, run.mixer), []).append(run.id)
            settings = self.study.selector_settings[run.selector]
            if "aligned" in needs_of(settings):
                key = (run.base, self._selector_mixer(run.selector))
                found.setdefault(key, []).append(f"selector {run.selector}")
        return {key: list(dict.fromkeys(users)) for key, users in found.items()}

    def _selector_mixer(self, selector: str) -> str:
        settings = self.study.selector_settings[selector]
        return str(getattr(settings, "mixer", None) or next(iter(self.study.mixers)))

    def _alignment(self, base: str, mixer: str, users: list[str]) -> Job:
        settings = self.study.alignment
        assert settings is not None
        stage, student = settings.stage(), self.linear(base, mixer)
        time = self._time(stage, settings.corpus)
        trained = flops.trainable(student, stage)
        tokens = stage.steps(time) * stage.batch_size * time
        work = (
            tokens
            / time
            * flops.layerwise(student, self.base(base), time, trained, stage.unit).total
        )
        job = Job("alignment", f"{base} {mixer}", tokens, work, users=users)
        job.disk = student.weight_bytes(self.dtype(base), student.mixer_names())
        job.scratch = STATES * 3 * student.weight_bytes(self.dtype(base), trained)

        def step(choice: Choice) -> Step:
            return Step(
                student,
                self.base(base),
                frozenset(trained),
                choice.rows,
                time,
                Precision(choice.dtype, settings.autocast),
                loss="align",
                unit=stage.unit,
                accumulated=choice.rows < stage.batch_size,
            )

        start = Choice(False, False, stage.batch_size // stage.accumulate, self.dtype(base), 1)
        smaller = [
            replace(start, rows=rows, said=(f"alignment.accumulate: {stage.batch_size // rows}",))
            for rows in halves(start.rows)
            if not stage.batch_size % rows
        ]
        narrow = self._narrow(start, [base])
        both = [n for choice in smaller for n in self._narrow(choice, [base])]
        place(job, self.hardware.gpu.memory, start, [*smaller, *narrow, *both], step)
        job.gpu_hours = self.hardware.hours(work, self._bf16(self.dtype(base), settings.autocast))
        return job

    def _teacher(self, name: str) -> Job:
        study, settings = self.study, self.study.teacher_outputs[name]
        corpus = study.corpora[study.corpus]
        model, time = self.base(name), corpus.context
        tokens = corpus.tokens + corpus.held_out_tokens
        head = settings.kind != "hidden"
        work = tokens / time * flops.forward(model, time, head=head)
        users = [run.id for run in study.run_table.values() if run.teacher == name]
        job = Job("teacher outputs", name, tokens, work, users=users)
        job.disk = tokens * self._stored_bytes(name)
        if settings.kind == "hidden":
            job.disk += model.shape.vocabulary * model.shape.hidden * BYTES[self.dtype(name)]

        def memory(choice: Choice) -> Memory:
            width, count = BYTES[choice.dtype], choice.rows * time
            active = count * width * (3 * model.shape.hidden + 3 * model.shape.mlp)
            logits = 3 * WIDE * min(count, 1024) * model.shape.vocabulary if head else 0.0
            # in pieces: whole layers, so that one GPU has up to a layer more than its share
            weights = model.weight_bytes(choice.dtype) / choice.count
            if choice.count > 1:
                weights += model.weight_bytes(choice.dtype) / model.shape.layers
            return Memory(activations=active, logits=logits, teacher=weights, phase="forward")

        mapped = settings.device_map is not None
        start = Choice(False, False, settings.batch_size, self.dtype(name), 1)
        pieces = [
            replace(start, count=n, said=(f"teacher_outputs.{name}.device_map: auto on {n} GPUs",))
            for n in range(2, self.hardware.count + 1)
        ]
        if mapped:  # the fewest GPUs that have room for it: only one of them works at a time
            room = self.hardware.gpu.memory
            start = next((c for c in [start, *pieces] if memory(c).total <= room), start)
            start = replace(start, said=())
        smaller = [
            replace(start, rows=rows, said=(f"teacher_outputs.{name}.batch_size: {rows}",))
            for rows in halves(settings.batch_size)
        ]
        narrow = self._narrow(start, [name])
        both = [n for choice in smaller for n in self._narrow(choice, [name])]
        place(job, self.hardware.gpu.memory, start, [*smaller, *narrow, *both, *pieces], memory)
        job.gpus = start.count
        job.gpu_hours = job.gpus * self.hardware.hours(work, self._bf16(self.dtype(name), False))
        if job.gpus > 1:
            job.name += f" ({settings.parts} parts of {job.gpus} GPUs)"
        return job

    def _stored_bytes(self, name: str) -> float:
        """Bytes per token; of `sampled`, with a quarter of the draws different."""
        settings, shape = self.study.teacher_outputs[name], self.shape(name)
        width = 2 if shape.vocabulary <= 2**16 else 4
        if settings.kind == "hidden":
            return shape.hidden * BYTES[settings.dtype or self.dtype(name)]
        if settings.kind == "top_k":
            return (settings.k or 64) * (width + BYTES[settings.dtype or "float16"])
        return 5 + (settings.k or 50) / 4 * (width + 1)

    def _selections(self) -> list[Job]:
        """One job per base, selector and budget; scores that budgets share are counted once."""
        jobs: dict[tuple[str, str, str], Job] = {}
        trained: set[tuple[str, str]] = set()
        for run in self.study.run_table.values():
            key = (run.base, run.selector, run.budget.slug)
            if key in jobs:
                jobs[key].users.append(run.id)
                continue
            settings = self.study.selector_settings[run.selector]
            job = self._selection(run, settings, run.selector)
            # what is stopped early, or scored again after every choice, depends on the budget
            whole = not getattr(settings, "early_stop", False)
            shared = (
                shares_scores(settings)
                and whole
                and (getattr(settings, "greedy", "one_shot") == "one_shot")
            )
            if shared and (run.base, run.selector) in trained:
                job.tokens = job.flops = job.gpu_hours = job.scratch = 0.0
            trained.add((run.base, run.selector))
            jobs[key] = job
        return list(jobs.values())

    def _selection(self, run: Run, settings: Any, selector: str) -> Job:
        job = Job("selection", f"{run.base} {selector} {run.budget.slug}", users=[run.id])
        method = selection.METHODS.get(settings.method)
        if method is None:
            job.name += " (external: not known)"
            return job
        base, time = self.base(run.base), self.study.corpora[self.study.calibration].context
        mixer = self._selector_mixer(selector) if "mixer" in needs_of(settings) else None
        linear = None if mixer is None else self.linear(run.base, mixer)
        count = sum(map(bool, self._kept(run.base, selector, run.budget)))
        work = method(selection.Case(settings, base, linear, time, count))
        job.tokens, job.flops = work.tokens, work.flops
        autocast = bool(getattr(settings, "autocast", False))
        job.gpu_hours = self.hardware.hours(work.flops, self._bf16(self.dtype(run.base), autocast))
        if not work.flops:
            job.gpus = 0
            return job

        def memory(choice: Choice) -> Memory:
            if work.students:
                return self._candidates(work, base, linear or base, choice, time, settings)
            return self._ranking(work, base, linear or base, choice, work.time or time)

        start = Choice(
            bool(getattr(settings, "activation_checkpointing", False)),
            not getattr(settings, "side_by_side", True),  # here: one candidate at a time
            self._rows(settings),
            self.dtype(run.base),
            1,
        )
        options = self._selection_choices(start, selector, settings, bool(work.students))
        options += self._narrow(start, [run.base])
        place(job, self.hardware.gpu.memory, start, options, memory)
        if not job.fits and not job.remedy and settings.method == "kl_guided":
            swap = selection.Work(full_logits=True, chunked=True)
            for rows in (1, *reversed(halves(start.rows)), start.rows)[::-1]:
                least = replace(start, rows=rows)
                if self._ranking(swap, base, linear or base, least, time).total <= (
                    self.hardware.gpu.memory
                ):
                    job.remedy = f"selectors.{selector}: variant: swap, batch_size: {rows}"
                    break
        return job

    @staticmethod
    def _rows(settings: Any) -> int:
        """Rows that a selection job computes with at once."""
        rows = int(getattr(settings, "batch_size", getattr(settings, "prompts", 1)))
        return rows // int(getattr(settings, "accumulate", 1))

    @staticmethod
    def _selection_choices(
        start: Choice, selector: str, settings: Any, trains: bool
    ) -> list[Choice]:
        """Fewer rows; of trained candidates one at a time, then checkpointing, on top of it."""
        name = f"selectors.{selector}"
        if not trains or settings.method != "kl_guided":
            return [
                replace(start, rows=r, said=(f"{name}.batch_size: {r}",))
                for r in halves(start.rows)
            ]
        found: list[Choice] = []
        so_far = start
        if not start.stored:
            said: tuple[str, ...] = (f"{name}.side_by_side: false",)
            so_far = replace(so_far, stored=True, said=said)
            found.append(so_far)
        if not start.checkpointing:
            said = (*so_far.said, f"{name}.activation_checkpointing: true")
            so_far = replace(so_far, checkpointing=True, said=said)
            found.append(so_far)
        for rows in halves(start.rows):
            if not settings.batch_size % rows:
                said = (*so_far.said, f"{name}.accumulate: {settings.batch_size // rows}")
                found.append(replace(so_far, rows=rows, said=said))
        return found

    def _ranking(
        self, work: selection.Work, base: Model, student: Model, choice: Choice, time: int
    ) -> Memory:
        """Layers or heads changed in turn: inputs of all layers are kept."""
        width, s, tokens = BYTES[choice.dtype], base.shape, choice.rows * time
        weights = float(base.weight_bytes(choice.dtype))
        other = 0.0 if student is base else float(student.weight_bytes(choice.dtype))
        layer = 3 * s.hidden + 3 * s.mlp
        models = 1 if student is base else 2
        active = float(tokens * width * (layer * work.variants + models * s.layers * s.hidden))
        if work.gates:  # gradients run through both branches of every layer
            active += tokens * _both_branches(base, student, Precision(choice.dtype), time)
        at_once = tokens * s.vocabulary
        if work.chunked:
            at_once = min(at_once, SHARED_LOGITS)
        logits = 2.0 * WIDE * at_once * work.full_logits
        return Memory(other, 0.0, 0.0, active, logits, weights, "forward")

    def _candidates(
        self,
        work: selection.Work,
        base: Model,
        student: Model,
        choice: Choice,
        time: int,
        settings: Any,
    ) -> Memory:
        """Students in training, and what is kept of the base for all of them."""
        width, s, tokens = BYTES[choice.dtype], base.shape, choice.rows * time
        accumulate = max(1, settings.batch_size // choice.rows)
        per_step = settings.batch_size * time
        autocast = bool(getattr(settings, "autocast", False))
        plain = accumulate == 1 and not autocast and per_step * s.vocabulary <= SHARED_LOGITS
        each = s.vocabulary if plain else s.hidden
        steps = max(1, getattr(settings, "tokens", 0) // per_step)
        cached = max(1, SHARED_LOGITS // (per_step * each))
        alone = choice.stored or steps <= cached
        alive = 1 if alone and not getattr(settings, "early_stop", False) else work.students
        step = Step(
            student,
            base,
            frozenset(student.parameters),
            choice.rows,
            time,
            Precision(choice.dtype, autocast),
            accumulated=accumulate > 1,
            checkpointing=choice.checkpointing,
            measured=False,
        )
        worst = peak(step)
        cache = float(min(steps, cached) * per_step * each * width)
        if plain:  # logits whole: both models', their distributions and the gradient
            cache += tokens * s.vocabulary * (6 * WIDE + width)
        mine = float(student.weight_bytes(choice.dtype))
        return replace(
            worst,
            weights=worst.weights + (alive - 1) * mine,
            optimiser=worst.optimiser + (alive - 1) * 2 * mine,
            logits=worst.logits + cache,
        )


def _both_branches(base: Model, linear: Model, precision: Precision, time: int) -> float:
    """Bytes per token kept of frozen layers with attention and mixer side by side."""
    total = 0.0
    for softmax, mixed in zip(base.layers, linear.layers, strict=True):
        total += kept(softmax, precision, time, lambda name: False, True)[0].total
        total += kept(mixed, precision, time, lambda name: False, True)[0].mixing
    return total
