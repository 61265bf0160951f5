"""Training the candidates of KL-guided selection side by side, with one teacher for all.

    step s:  tokens --base--> log-probabilities --KL--> candidate 1, candidate 2, ...

All candidates see the same batches in the same order, so that their differences are paired, and
the base runs once per batch. Steps are taken in rounds: within a round the base's logits are kept
and one candidate after the other is trained. When the logits of all steps fit in memory and nobody
asks for an early stop there is one round, and only one student lives at a time; with several
rounds all students do, unless `side_by_side` is off: then one candidate after another is trained to
its end, and the base runs for each. Where the logits of one step are large they are never whole:
the base's final hidden states stand for them, and the loss is that of `rad.distillation.chunked`.
Legend: B rows, T context, E hidden size, V vocabulary.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rad.data.corpus import Corpus
from rad.distillation import losses
from rad.distillation import optimiser as optimisers
from rad.distillation import state as states
from rad.distillation.batches import Batch, Batches, slice_of
from rad.distillation.loop import recomputing
from rad.distillation.speed import precision
from rad.distillation.stages import Stage
from rad.distillation.targets import Targets, check_head, final_hidden, head_of
from rad.distillation.teachers import Teacher
from rad.files import digest, file_digest, read_json, write_json
from rad.mixers import MIXERS
from rad.models.convert import convert
from rad.placement import Placement
from rad.selection.base import SelectionContext, SelectionError, Spent
from rad.selector_settings import SHARED_LOGITS
from rad.settings import KLGuidedSettings, StageSettings

# settings of which a candidate's score is a function
SCORED_BY = (
    *("tokens", "batch_size", "accumulate", "learning_rate", "groups", "schedule"),
    *("warmup_fraction", "decay_vectors", "autocast", "held_out_rows"),
)


@dataclass(frozen=True)
class Candidate:
    """One hybrid to be scored: `layer` is restored or linearised on top of the layers `kept`."""

    name: str
    layer: int
    kept: tuple[int, ...]  # softmax layers of this hybrid


@dataclass
class Result:
    """Held-out KL and recent training loss (nats per token) after `steps` steps."""

    held_out: float
    training_loss: float
    steps: int


# told the losses so far, by candidate and step; True stops all candidates
Check = Callable[[list[list[float]]], bool]


class Shared:
    """What all candidates of a job share: base, mixers, batches with the base's logits, held-out.

    Raises `SelectionError` when a resource is missing.
    """

    def __init__(self, context: SelectionContext, settings: KLGuidedSettings) -> None:
        self.context, self.settings = context, settings
        self.base = context.need_model()
        self.base.requires_grad_(False)
        self.mixer, self.start, self.aligned = _mixer_start(context)
        corpus = Corpus(context.need_corpus())
        self.batches = Batches(corpus, settings.batch_size, seed=0)
        self.steps = max(1, settings.tokens // self.batches.tokens_per_batch)
        if settings.score == "training_loss" and settings.score_step is not None:
            if settings.score_step > self.steps:
                raise SelectionError(
                    f"kl_guided: score_step {settings.score_step} is beyond the {self.steps} steps "
                    f"that {settings.tokens} tokens are"
                )
            self.last = settings.score_step
        else:
            self.last = self.steps
        values = self.batches.tokens_per_batch * self.base.config.vocab_size
        # nothing to save: the plain loss, on logits that are whole
        self.plain = values <= SHARED_LOGITS and settings.accumulate == 1 and not settings.autocast
        width = self.base.config.vocab_size if self.plain else self.base.config.hidden_size
        self.cached_steps = max(1, SHARED_LOGITS // (self.batches.tokens_per_batch * width))
        self._kept: dict[int, Tensor] = {}
        if not self.plain:
            check_head(self.base)
        self.teacher = SharedTeacher(self)
        self.tokens, self.weight = slice_of(
            corpus.rows("held_out"), corpus.weights("held_out"), slice(0, settings.held_out_rows)
        )
        self.tokens = self.tokens.to(self.base.device)
        self.weight = self.weight.to(self.base.device)
        self.held_out_batch = settings.batch_size // settings.accumulate
        self._held_out: list[Tensor] | None = None
        self._keep_held_out = self.tokens.numel() * width <= SHARED_LOGITS
        self.owner = digest(
            {
                "settings": settings.model_dump(mode="json", include=set(SCORED_BY)),
                "loss": [self.last, settings.score_window],
                "corpus": corpus.manifest.get("settings_sha256"),
                "base": [context.base, context.provenance.get("base_weights_sha256")],
                "mixer": dict(self.mixer),
                "aligned": None
                if self.aligned is None
                else file_digest(self.aligned / "mixers.safetensors"),
            }
        )

    def hybrid(self, kept: Sequence[int]) -> Any:
        """The untrained hybrid with softmax in the layers `kept`."""
        placement = Placement.from_layers(
            list(kept),
            layers=self.context.layers,
            heads=self.context.heads,
            kv_heads=self.context.kv_heads,
            base=self.context.base,
            selector="kl_guided",
        )
        student = convert(self.base, placement, self.mixer, self.start, aligned=self.aligned)
        return student.to(self.base.device)

    @torch.no_grad()
    def target(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B,T), weights (B,T) and base logits (B,T,V) of a step."""
        tokens, weight = self.batches(step)
        tokens, weight = tokens.to(self.base.device), weight.to(self.base.device)
        if step not in self._kept:
            while len(self._kept) >= self.cached_steps:
                self._kept.pop(next(iter(self._kept)))
            self._kept[step] = self._base_logits(tokens)
        return tokens, weight, self._kept[step]

    @torch.no_grad()
    def held_out_kl(self, student: Any) -> float:
        """Weighted mean KL to the base on the held-out slice, nats per token."""
        parts = self.tokens.split(self.held_out_batch)
        weights = self.weight.split(self.held_out_batch)
        says = self._base_logits if self.plain else self.base_hidden
        with self.precision():
            if self._keep_held_out and self._held_out is None:
                self._held_out = [says(part) for part in parts]
            total = count = 0.0
            for index, (part, weight) in enumerate(zip(parts, weights, strict=True)):
                known = self._held_out
                target = says(part) if known is None else known[index]
                share = weight[:, 1:].sum().item()
                total += share * self._kl(student, part, target, weight)
                count += share
                self.context.meter.add(part.numel(), weights=self.base.num_parameters())
        return total / max(count, 1e-8)

    def _kl(self, student: Any, tokens: Tensor, target: Tensor, weight: Tensor) -> float:
        """Weighted mean KL on tokens (B,T); target: base logits (B,T,V), hidden states (B,T,E)."""
        if self.plain:
            logits = student(tokens, use_cache=False).logits
            return losses.kl_loss(target, logits, weight).item()
        hidden = final_hidden(student, tokens)
        return losses.distillation_loss(
            hidden, head_of(student), self.as_targets(target), weight
        ).item()

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast, where the settings and the hardware have it."""
        return precision(self.base.device, self.settings.autocast)

    def as_targets(self, hidden: Tensor) -> Targets:
        """What the base says, from its final hidden states (B,T,E)."""
        return Targets("hidden", hidden=hidden, head=head_of(self.base).detach())

    def base_hidden(self, tokens: Tensor) -> Tensor:
        """Final hidden states (B,T,E) of the base on tokens (B,T)."""
        self.context.meter.add(tokens.numel(), weights=self.base.num_parameters())
        return final_hidden(self.base, tokens)

    def _base_logits(self, tokens: Tensor) -> Tensor:
        self.context.meter.add(tokens.numel(), weights=self.base.num_parameters())
        logits: Tensor = self.base(tokens, use_cache=False).logits
        return logits


class SharedTeacher(Teacher):
    """The base as a teacher that runs once per micro-batch, for all candidates of a round."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.vocabulary = shared.base.config.vocab_size
        self._kept: dict[tuple[int, ...], Tensor] = {}

    @torch.no_grad()
    def targets(
        self,
        tokens: Tensor,
        rows: Sequence[int] | Tensor,
        *,
        split: str = "train",
        boundaries: Tensor | None = None,
    ) -> Targets:
        """The base's final hidden states (B,T,E) on tokens (B,T), the corpus's rows `rows`."""
        key = tuple(int(row) for row in rows)
        if key not in self._kept:
            most = self.shared.cached_steps * self.shared.settings.accumulate
            while len(self._kept) >= most:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = self.shared.base_hidden(tokens)
        return self.shared.as_targets(self._kept[key])


def _mixer_start(context: SelectionContext) -> tuple[Any, str, Path | None]:
    """Mixer settings, how it starts, and the alignment's folder where that start needs one."""
    mixer = context.resources.get("mixer")
    if mixer is None:
        raise SelectionError("kl_guided needs the resource 'mixer': the settings of a mixer")
    if "aligned" not in MIXERS[mixer["type"]].initialisations:
        return mixer, "qkvo", None  # nothing to align: it computes with the base's own weights
    if context.resources.get("aligned") is None:
        raise SelectionError(
            f"kl_guided needs the resource 'aligned': the stage-1 alignment of mixer "
            f"{mixer['type']} (`rad align` writes it)"
        )
    return mixer, "aligned", Path(context.resources["aligned"])


class Trainer:
    """One candidate in training: the losses of its steps so far, and what they cost."""

    def __init__(self, shared: Shared, candidate: Candidate) -> None:
        self.shared, self.candidate = shared, candidate
        settings = shared.settings
        self.stage = StageSettings(
            tokens=settings.tokens,
            batch_size=settings.batch_size,
            accumulate=settings.accumulate,
            learning_rate=settings.learning_rate,
            groups=settings.groups,
            schedule=settings.schedule,
            warmup_fraction=settings.warmup_fraction,
            decay_vectors=settings.decay_vectors,
        )
        self.student = shared.hybrid(candidate.kept)
        self.optimiser, self.names = optimisers.build(self.student, self.stage)
        self.parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.weights = self.student.num_parameters()
        self.losses: list[float] = []
        self.spent = Spent()
        self.task = Stage(
            self.stage, self.student, shared.base, shared.teacher, autocast=settings.autocast
        )

    def train(self, until: int) -> None:
        """Steps up to `until` (exclusive); raises `SelectionError` when a gradient is no number."""
        before = self.shared.context.meter.spent()
        with recomputing(self.student, self.shared.settings.activation_checkpointing):
            self._train(until)
        self.spent += self.shared.context.meter.spent() - before

    def _train(self, until: int) -> None:
        batches = self.shared.batches
        self.student.train()
        for step in range(len(self.losses), until):
            optimisers.set_rate(self.optimiser, self.stage, step, self.shared.steps)
            loss = self._gradients(step)
            limit = math.inf if self.stage.clip is None else self.stage.clip
            norm = torch.nn.utils.clip_grad_norm_(self.parameters, limit)
            if not torch.isfinite(norm):
                raise SelectionError(
                    f"kl_guided: candidate {self.candidate.name}: the gradient is not finite at "
                    f"step {step + 1} (loss {loss}); lower learning_rate"
                )
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
            self.losses.append(loss)
            self.shared.context.meter.add(
                batches.tokens_per_batch, weights=self.weights, trained=True
            )

    def _gradients(self, step: int) -> float:
        """Gradients of a step's loss, which is returned."""
        if not self.shared.plain:
            batch = self.shared.batches.batch(step)
            # documents of isolated packing see each other here, as in every other score
            return self.task.backward(Batch(batch.tokens, batch.weight, batch.rows)).total
        tokens, weight, target = self.shared.target(step)
        loss = losses.kl_loss(target, self.student(tokens, use_cache=False).logits, weight)
        loss.backward()
        return loss.item()

    def result(self) -> Result:
        """The candidate's scores as it is now."""
        before = self.shared.context.meter.spent()
        recent = self.losses[-self.shared.settings.score_window :]
        held_out = self.shared.held_out_kl(self.student.eval())
        self.spent += self.shared.context.meter.spent() - before
        return Result(held_out, sum(recent) / len(recent), len(self.losses))

    def save(self, folder: Path, owner: str) -> None:
        """Write weights, optimiser and losses under `folder`."""
        meta = {"digest": owner, "stage": 0, "step": len(self.losses), "losses": self.losses}
        meta |= {"spent": vars(self.spent)}
        states.save(folder, self.student, self.optimiser, self.names, meta)

    def resume(self, folder: Path, owner: str) -> None:
        """Go on from what `save` wrote, if there is something of this owner."""
        try:
            found = states.latest(folder, owner)
        except states.StateError:
            states.discard(folder)  # another specification's: nothing that could be reused
            return
        if found is not None:
            states.restore(found["path"], self.student, self.optimiser, self.names)
            self.losses = list(found["losses"])
            self.spent = Spent(**found["spent"])
            self.shared.context.meter.include(self.spent)


class Candidates:
    """Trains and scores sets of candidates; finished ones are read from the state folder."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        state = shared.context.resources.get("state")
        self.state = Path(state) if state else None
        self.reused: list[str] = []  # candidates that another job has trained

    def score(
        self,
        candidates: Sequence[Candidate],
        check: Check | None = None,
        rule: Mapping[str, Any] | None = None,
    ) -> list[Result]:
        """Results in the order of `candidates`.

        `check` is asked every `check_every` steps and may end the training of all of them; `rule`
        says in JSON what it goes by, because a stopped result is only good for the same rule.
        """
        # a stop depends on who else was trained; a full training depends on nobody
        with_whom = None if check is None else [dict(rule or {}), [c.kept for c in candidates]]
        keys = [
            digest({"owner": self.shared.owner, "kept": c.kept, "stop": with_whom})
            for c in candidates
        ]
        found = [self._read(c, key) for c, key in zip(candidates, keys, strict=True)]
        shared = self.shared
        if check is None and (
            shared.last <= shared.cached_steps or not shared.settings.side_by_side
        ):
            for index, result in enumerate(found):
                if result is None:
                    found[index] = self._alone(candidates[index], keys[index])
        else:
            todo = [i for i, result in enumerate(found) if result is None]
            if check is not None and todo:
                todo = list(range(len(candidates)))
            trainers = [Trainer(self.shared, candidates[index]) for index in todo]
            self._rounds(trainers, [keys[index] for index in todo], check)
            for index, trainer in zip(todo, trainers, strict=True):
                found[index] = self._finish(trainer, keys[index])
        return [result for result in found if result is not None]

    def _alone(self, candidate: Candidate, key: str) -> Result:
        # a function of its own: its student is gone when the next one is made
        trainer = Trainer(self.shared, candidate)
        self._rounds([trainer], [key], None)
        return self._finish(trainer, key)

    def _rounds(self, trainers: list[Trainer], keys: list[str], check: Check | None) -> None:
        """Train all of `trainers` to the end or to where `check` stops them."""
        shared, folders = self.shared, [self._folder(trainer.candidate) for trainer in trainers]
        for trainer, folder, key in zip(trainers, folders, keys, strict=True):
            if folder is not None:
                trainer.resume(folder, key)
        every, done, saved = shared.settings.check_every, 0, time.perf_counter()
        several = len(trainers) > 1
        # a lone candidate shares no logits: it stops after every step to see whether to save
        stride = shared.cached_steps if several or check is not None else 1
        while trainers and done < shared.last:
            asked = shared.last if check is None else (done // every + 1) * every
            done = min(shared.last, done + stride, asked)
            for trainer in trainers:
                trainer.train(done)
            if several:
                shared.context.progress(f"kl_guided: {done} of {shared.last} steps")
            elif done % every == 0:
                name = trainers[0].candidate.name
                loss = trainers[0].losses[done - 1]
                shared.context.progress(
                    f"kl_guided: {name}: {done} of {shared.last} steps, loss {loss:.4f}"
                )
            # an interrupted save may have left some candidates ahead of others
            if check is not None and done == asked and check([t.losses[:done] for t in trainers]):
                break
            due = time.perf_counter() - saved > shared.settings.save_every_seconds
            if due and (several or done < shared.last):
                for trainer, folder, key in zip(trainers, folders, keys, strict=True):
                    if folder is not None:
                        trainer.save(folder, key)
                saved = time.perf_counter()

    def _finish(self, trainer: Trainer, key: str) -> Result:
        result, candidate = trainer.result(), trainer.candidate
        kl = f"held-out KL {result.held_out:.4f}"
        self.shared.context.progress(f"kl_guided: {candidate.name}: {kl}")
        folder = self._folder(candidate)
        if folder is not None:
            record = {"digest": key, "layer": candidate.layer, "kept": candidate.kept}
            record["spent"] = vars(trainer.spent)
            write_json(folder.with_suffix(".json"), {**record, **vars(result)})
            states.discard(folder)
        return result

    def _folder(self, candidate: Candidate) -> Path | None:
        return None if self.state is None else self.state / candidate.name

    def _read(self, candidate: Candidate, key: str) -> Result | None:
        folder = self._folder(candidate)
        file = None if folder is None else folder.with_suffix(".json")
        if file is None or not file.exists():
            return None
        record = read_json(file)
        if record.get("digest") != key:
            return None
        self.shared.context.meter.include(Spent(**record["spent"]))
        self.reused.append(candidate.name)
        return Result(record["held_out"], record["training_loss"], record["steps"])
