"""Steps of distillation against a straightforward implementation, in turns in one process.

    python -m benchmarks.distillation [--source nano:medium] [--rows 4] [--context 512]

Mixers-only self-distillation. The peer is what one would write first: two Hugging Face models, the
teacher a copy of its own, full logits of both, `kl_div`, AdamW on the mixers. It comes in two
forms, with everything else frozen (`frozen`) and with gradients for all weights of which the
optimiser takes the mixers' (`all gradients`). Ours: the loop's own step, with and without the
layers below the first converted one run once for teacher and student, and in bfloat16 autocast
(where the hardware has it; it is the same as without elsewhere).

Alignment of all layers. The peer trains layer after layer, each with its own pass of the base.

Figures are medians of CPU time over steps that take turns, so that whatever else the machine does
hits all of them.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rad  # noqa: F401  (registers the hybrids)
from rad.distillation import optimiser as optimisers
from rad.distillation.batches import Batch
from rad.distillation.shared_prefix import share_frozen
from rad.distillation.stages import Stage
from rad.models import sources
from rad.models.convert import convert
from rad.models.store import mixer_settings
from rad.placement import Placement
from rad.settings import StageSettings

Step = Callable[[Batch], float]
# what `rad select rad --budget f0.7` converts of nano:medium
RAD_CHOICE = [1, 3, 7]


def hybrid(base: Any, converted: Sequence[int]) -> Any:
    """The base with Mamba-2 in the layers `converted`."""
    config = base.config
    placement = Placement.from_layers(
        [layer for layer in range(config.num_hidden_layers) if layer not in converted],
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        base="base",
        selector="benchmark",
    )
    return convert(base, placement, mixer_settings("mamba2"), "qkvo").train()


def plain_step(base: Any, converted: Sequence[int], frozen: bool) -> Step:
    """Self-distillation as one would write it first."""
    teacher, student = copy.deepcopy(base).eval(), hybrid(base, converted)
    names = optimisers.mixer_parameters(student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names or not frozen)
    mixers = [p for name, p in student.named_parameters() if name in names]
    adamw = torch.optim.AdamW(mixers, lr=1e-4)

    def step(batch: Batch) -> float:
        with torch.no_grad():
            target = F.log_softmax(teacher(batch.tokens).logits[:, :-1].float(), dim=-1)
        logits = student(batch.tokens, use_cache=False).logits[:, :-1].float()
        values = F.kl_div(F.log_softmax(logits, -1), target, reduction="none", log_target=True)
        weight = batch.weight[:, 1:]
        loss: Tensor = (values.sum(-1) * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mixers, 1.0)
        adamw.step()
        student.zero_grad(set_to_none=True)
        return loss.item()

    return step


def our_step(
    base: Any,
    settings: StageSettings,
    converted: Sequence[int],
    share: bool = True,
    autocast: bool = False,
) -> Step:
    """One step of the loop."""
    student = hybrid(base, converted)
    adamw, _ = optimisers.build(student, settings)
    if share:
        share_frozen(student, base)
    stage = Stage(settings, student, base, base, share=share, autocast=autocast)
    parameters = [p for group in adamw.param_groups for p in group["params"]]

    def step(batch: Batch) -> float:
        optimisers.set_rate(adamw, settings, 50, 100)
        found = stage.backward(batch)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        return found.total

    return step


def layer_by_layer(base: Any) -> Step:
    """Every layer's mixer trained on its own: a pass of the base for each."""
    student = hybrid(base, range(base.config.num_hidden_layers))
    layers = student.model.layers
    optimizers = [torch.optim.AdamW(layer.self_attn.parameters(), lr=1e-4) for layer in layers]

    def step(batch: Batch) -> float:
        total = 0.0
        for index, adamw in enumerate(optimizers):
            seen: dict[str, Any] = {}

            def keep(
                _module: Any, _args: Any, settings: Any, output: Any, seen: Any = seen
            ) -> None:
                seen.update(settings, target=output[0])

            attention = base.model.layers[index].self_attn
            handle = attention.register_forward_hook(keep, with_kwargs=True)
            with torch.no_grad():
                base(batch.tokens, use_cache=False)
            handle.remove()
            output, _ = layers[index].self_attn(
                seen["hidden_states"], position_embeddings=seen["position_embeddings"]
            )
            distance = (seen["target"] - output).norm(dim=-1)
            loss = (distance * batch.weight).sum() / batch.weight.sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(layers[index].parameters(), 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            total += loss.item()
        return total

    return step


def in_turns(steps: dict[str, Step], batch: Batch, repeats: int) -> dict[str, float]:
    """Median seconds of CPU time of each step."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.process_time()
            step(batch)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def placements(layers: int) -> dict[str, list[int]]:
    """Which layers are converted, by what the table calls it."""
    return {
        "top quarter": list(range(layers - layers // 4, layers)),
        "top half": list(range(layers - layers // 2, layers)),
        "every second": list(range(1, layers, 2)),
        "RAD's choice": RAD_CHOICE,
    }


def main() -> None:
    """Print tokens per second and ratios to the peers."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--source", default="nano:medium")
    options.add_argument("--rows", type=int, default=4)
    options.add_argument("--context", type=int, default=512)
    options.add_argument("--repeats", type=int, default=12)
    chosen = options.parse_args()
    torch.set_num_threads(1)
    base = sources.load(chosen.source)
    base.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    shape = (chosen.rows, chosen.context)
    tokens = torch.randint(3, base.config.vocab_size, shape, generator=generator)
    batch = Batch(tokens, torch.ones(shape), torch.arange(chosen.rows))
    count = tokens.numel()
    mixers = StageSettings(tokens=count, batch_size=chosen.rows, trainable="mixers")
    print(f"{chosen.source}, {chosen.rows} x {chosen.context} tokens, one thread")
    head = ("converted", "step", "tokens/s", "to frozen", "to all gradients")
    print("{:>13} {:>24} {:>9} {:>10} {:>17}".format(*head))
    for where, converted in placements(base.config.num_hidden_layers).items():
        found = in_turns(
            {
                "peer, all gradients": plain_step(base, converted, frozen=False),
                "peer, frozen": plain_step(base, converted, frozen=True),
                "ours, nothing shared": our_step(base, mixers, converted, share=False),
                "ours": our_step(base, mixers, converted),
                "ours, bfloat16": our_step(base, mixers, converted, autocast=True),
            },
            batch,
            chosen.repeats,
        )
        for name, seconds in found.items():
            print(
                f"{where:>13} {name:>24} {count / seconds:>9.0f} "
                f"{found['peer, frozen'] / seconds:>9.2f}x "
                f"{found['peer, all gradients'] / seconds:>16.2f}x"
            )
    align = StageSettings(loss="align", tokens=count, batch_size=chosen.rows, trainable="mixers")
    every = list(range(base.config.num_hidden_layers))
    found = in_turns(
        {
            "layer by layer": layer_by_layer(base),
            "ours": our_step(base, align, every),
        },
        batch,
        max(4, chosen.repeats // 2),
    )
    ratio = found["layer by layer"] / found["ours"]
    print(f"alignment of all {len(every)} layers: {ratio:.2f}x as fast as layer by layer")


if __name__ == "__main__":
    main()
