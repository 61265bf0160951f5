"""Pretraining of a nano model: phases, progress, resumable state."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rad.data.nano import mixture
from rad.data.nano.tokenizer import VOCABULARY, asset_folder, load
from rad.pretraining import growth, state
from rad.pretraining.induction import induction_batch, transition_made
from rad.pretraining.lean import LeanForward, tune_malloc
from rad.pretraining.recipes import RECIPES, Phase, PretrainRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SAVE_SECONDS = 60.0
_CHUNK = 100  # steps of data drawn from one seed: a resumed run replays at most that many


@dataclass
class _Progress:
    """Where a run stands; saved as JSON beside the tensors."""

    digest: str
    phase: int = 0
    step: int = 0
    attempt: int = 0
    tokens: int = 0
    seconds: float = 0.0
    layers: int = 0
    losses: list[float] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)


def _rate(phase: Phase, step: int) -> float:
    """Warm-up, then a cosine from the peak to `final` of it."""
    if step < phase.warmup:
        return phase.learning_rate * (step + 1) / phase.warmup
    done = (step - phase.warmup) / max(1, phase.steps - phase.warmup)
    low = phase.final
    return phase.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def _mixture_batches(
    phase: Phase, seed: int, start: int, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches from step `start` on: ids and weights (rows, context)."""
    step = start
    while True:
        chunk, skip = divmod(step, _CHUNK)
        documents = mixture.training_documents(
            seed * 1_000_003 + chunk,
            shares=dict(phase.shares) if phase.shares else None,
            hard_share=phase.hard_share,
            top_share=phase.top_share,
            crux_turns=phase.crux_turns,
            trace_share=phase.trace_share,
            trace=phase.trace,
        )
        stream = mixture.rows(documents, tokenizer, phase.context)
        for index in range(_CHUNK):
            rows = [next(stream) for _ in range(phase.rows)]
            if index < skip:
                continue
            yield (
                torch.from_numpy(np.stack([ids for ids, _ in rows])),
                torch.from_numpy(np.stack([weights for _, weights in rows])),
            )
            step += 1


def _induction_batches(phase: Phase, seed: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator()
    step = start
    while True:
        generator.manual_seed(seed * 1_000_003 + step)
        yield induction_batch(generator, phase.rows, phase.context, VOCABULARY, phase.block)
        step += 1


class _Run:
    """One pretraining run; `pretrain` is the function to call."""

    def __init__(
        self,
        recipe: PretrainRecipe,
        seed: int,
        folder: Path,
        parent: Path | None,
        say: Callable[[str], None],
        compiled: bool,
    ) -> None:
        self.recipe, self.seed, self.folder, self.say = recipe, seed, folder, say
        self.parent = parent
        self.forward = LeanForward(compiled=compiled)
        self.tokenizer = load()
        self.progress = _Progress(recipe.digest(seed))
        self.model: Any = None
        self.optimizer: torch.optim.Optimizer
        self.saved_at = time.monotonic()

    def _optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.model.parameters(),
            lr=1e-3,
            betas=(0.9, self.recipe.beta2),
            weight_decay=self.recipe.weight_decay,
            fused=True,
        )

    def _fresh(self, layers: int, seed: int) -> Any:
        recipe = self.recipe
        return growth.new_model(
            layers=layers,
            width=recipe.width,
            heads=recipe.heads,
            kv_heads=recipe.kv_heads,
            head_dim=recipe.head_dim,
            mlp=recipe.mlp,
            seed=seed,
        )

    def _start(self) -> Any:
        """The model before the first phase: random, or the parent."""
        if self.parent is None:
            return self._fresh(self.recipe.layers, self._phase_seed())
        from transformers import LlamaForCausalLM

        return LlamaForCausalLM.from_pretrained(str(self.parent), dtype=torch.float32)

    def _phase_seed(self) -> int:
        return self.seed * 10_000 + self.progress.phase * 100 + self.progress.attempt

    def _prepare(self, phase: Phase, resumed: bool) -> list[Any]:
        """Model, optimiser and hooks at the start (or the middle) of a phase."""
        progress = self.progress
        if resumed:
            self.model = self._fresh(progress.layers, 0)  # its weights come from the state
        else:
            if self.model is None or phase.kind == "induction":
                self.model = self._start()  # a retry starts over
            if phase.rounded:
                with torch.no_grad():
                    for parameter in self.model.parameters():
                        parameter.copy_(parameter.bfloat16().float())
            if phase.grow is not None:
                self.model = growth.grow(self.model, phase.grow, self._phase_seed())
        progress.layers = self.model.config.num_hidden_layers
        self.model.train()
        self.optimizer = self._optimizer()
        if resumed:
            state.load_state(self.folder, self.model, self.optimizer)
        if phase.active_heads is not None:
            return growth.silence_heads(self.model, phase.active_heads)
        return []

    def _update(self, phase: Phase, ids: Tensor, weights: Tensor) -> float:
        """One optimiser step in micro-batches; the weighted mean loss."""
        rate = _rate(phase, self.progress.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        total = weights[:, 1:].sum()
        summed = 0.0
        size = self.recipe.micro_rows
        for part, weight in zip(ids.split(size), weights.split(size), strict=True):
            logits = self.forward(self.model, part)[:, :-1].float()
            each = F.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), part[:, 1:].reshape(-1), reduction="none"
            )
            loss = (each * weight[:, 1:].reshape(-1)).sum() / total
            loss.backward()
            summed += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return summed

    def _save(self) -> None:
        record = dict(vars(self.progress))
        record["losses"] = self.progress.losses[-50:]
        state.save_state(self.folder, self.model, self.optimizer, record)
        self.saved_at = time.monotonic()

    def _phase(self, phase: Phase, resumed: bool) -> bool:
        """Run one phase; False when the induction transition did not come."""
        progress = self.progress
        handles = self._prepare(phase, resumed)
        seed = self._phase_seed()
        batches = (
            _induction_batches(phase, seed, progress.step)
            if phase.kind == "induction"
            else _mixture_batches(phase, seed, progress.step, self.tokenizer)
        )
        last, before = time.monotonic(), progress.tokens
        made, end = False, phase.steps if phase.stop is None else phase.stop
        while progress.step < end and not made:
            started = time.monotonic()
            ids, weights = next(batches)
            loss = self._update(phase, ids, weights)
            progress.step += 1
            progress.tokens += ids.numel()
            progress.seconds += time.monotonic() - started
            progress.losses = [*progress.losses[-49:], loss]
            made = phase.kind == "induction" and transition_made(progress.losses, phase.threshold)
            if progress.step % 50 == 0 or progress.step == end or made:
                now = time.monotonic()
                speed = (progress.tokens - before) / max(1e-9, now - last)
                left = (end - progress.step) * ids.numel() / max(1.0, speed)
                mean = sum(progress.losses) / len(progress.losses)
                self.say(
                    f"phase {progress.phase} {phase.kind} layers {progress.layers} step "
                    f"{progress.step}/{end} loss {mean:.4f} {speed:.0f} tokens/s "
                    f"{progress.tokens / 1e6:.2f} M tokens {left:.0f} s left in phase"
                )
                progress.log.append({"phase": progress.phase, "step": progress.step, "loss": mean})
                last, before = now, progress.tokens
            if time.monotonic() - self.saved_at > _SAVE_SECONDS:
                self._save()
        for handle in handles:
            handle.remove()
        return made or phase.kind != "induction"

    def run(self) -> Any:
        """All phases, from the saved state if there is one; the trained model."""
        record = state.read_record(self.folder)
        if record is not None:
            if record["digest"] != self.progress.digest:
                raise ValueError(f"{self.folder} holds the state of another recipe or seed")
            self.progress = _Progress(**record)
            self.say(f"resuming phase {self.progress.phase} at step {self.progress.step}")
        resumed = record is not None
        while self.progress.phase < len(self.recipe.phases):
            phase = self.recipe.phases[self.progress.phase]
            if self._phase(phase, resumed):
                self.progress.phase, self.progress.attempt = self.progress.phase + 1, 0
            else:
                self.progress.attempt += 1
                self.say(f"no induction transition; attempt {self.progress.attempt + 1}")
                if self.progress.attempt >= phase.attempts:
                    raise RuntimeError(f"no induction transition in {phase.attempts} attempts")
            self.progress.step, self.progress.losses, resumed = 0, [], False
            # The finished phase is not saved: a resume repeats at most the last minute of it.
        return self.model


def pretrain(
    size: str,
    output: Path,
    *,
    seed: int = 0,
    threads: int = 1,
    progress: bool = True,
    parents: Path | None = None,
    recipe: PretrainRecipe | None = None,
    compiled: bool = True,
) -> None:
    """Train the nano model `size` from nothing (or from its parent in `parents`) into `output`.

    The state folder `output`/state makes an interrupted call continue where it was. `compiled`
    compiles the layer where a C++ compiler is found (twice as fast, other rounding).
    """
    if recipe is None:
        if size not in RECIPES:
            raise ValueError(f"unknown nano size {size!r}; known: {', '.join(RECIPES)}")
        recipe = RECIPES[size]
    parent = None
    if recipe.parent is not None:
        if parents is None:
            raise ValueError(f"nano:{size} grows from nano:{recipe.parent}; pass `parents`")
        parent = parents / recipe.parent
        if not (parent / "config.json").exists():
            raise FileNotFoundError(f"no checkpoint of nano:{recipe.parent} in {parent}")
    torch.set_num_threads(threads)
    tune_malloc()
    started = time.time()

    def say(line: str) -> None:
        if progress:
            print(f"[nano:{size} {time.time() - started:6.0f} s] {line}", flush=True)

    run = _Run(recipe, seed, output / "state", parent, say, compiled)
    model = run.run()
    save_checkpoint(model, output)
    training = {
        "size": size,
        "seed": seed,
        "tokens": run.progress.tokens,
        "seconds": round(run.progress.seconds),
        "parent": recipe.parent,
        "hardware": f"{threads} thread(s), {run.forward.dtype}"
        + (", compiled" if run.forward.compiled else ""),
        "log": run.progress.log,
    }
    (output / "training.json").write_text(json.dumps(training, indent=1), encoding="utf-8")
    shutil.rmtree(output / "state", ignore_errors=True)


def save_checkpoint(model: Any, output: Path) -> None:
    """A Hugging Face folder: weights stored in bf16 (half the bytes), opened as fp32."""
    from transformers import GenerationConfig

    output.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=2, pad_token_id=0, do_sample=False
    )
    model.eval().to(torch.bfloat16).save_pretrained(str(output))
    config_path = output / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    # `from_pretrained` follows this entry; bf16 arithmetic is slow on most processors.
    config["dtype"] = "float32"
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (output / "model.safetensors").chmod(0o644)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = asset_folder() / "base" / name
        if source.resolve() != (output / name).resolve():
            shutil.copyfile(source, output / name)
