"""Decoding speed of hybrids against their base: same loop, one thread, batch 8.

    python -m benchmarks.decode

A quarter of the heads stays (whole layers, then single heads), in the embedded base model. Caches
are filled by a real prefill of one sequence, repeated over the batch. Steps of the models take
turns, so that whatever else the machine does hits all of them; the figure is the median step.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import statistics
import time
from typing import Any

import torch

import rad  # noqa: F401  (registers the hybrids)
from rad.evaluation.efficiency import cache_bytes
from rad.models import sources
from rad.models.cache import HybridCache
from rad.models.convert import convert
from rad.models.store import mixer_settings
from rad.models.summary import summarise
from rad.placement import Placement

BATCH, STEPS = 8, 24
CONTEXTS = (512, 2048, 8192)


def placements(config: Any) -> dict[str, list[tuple[int, int]]]:
    """A quarter of the heads: whole layers, and one head in every layer."""
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    whole = [(layer, head) for layer in range(1, layers, 4) for head in range(heads)]
    single = [(layer, head) for layer in range(layers) for head in range(0, heads, 4)]
    return {"whole layers": whole, "single heads": single}


@torch.no_grad()
def filled(model: Any, tokens: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """(cache of `BATCH` equal sequences, their next tokens) after a prefill in pieces."""
    cache = HybridCache(model.config) if hasattr(model.config, "rad_heads") else None
    for piece in tokens.split(512, dim=1):
        output = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
    for layer in cache.layers:
        for name, held in vars(layer).items():
            if isinstance(held, torch.Tensor):
                setattr(layer, name, held.repeat_interleave(BATCH, 0))
            elif isinstance(held, dict):
                for key, value in held.items():
                    if isinstance(value, torch.Tensor):
                        held[key] = value.repeat_interleave(BATCH, 0)
    return cache, output.logits[:, -1:].argmax(-1).repeat(BATCH, 1)


def rows(source: str = "nano:base", mixer: str = "mamba2") -> list[dict[str, Any]]:
    """Tokens per second and cache bytes of every model at every context."""
    torch.set_num_threads(1)
    base = sources.load(source)
    config = base.config
    models = {"base": base}
    for name, kept in placements(config).items():
        placement = Placement(
            base=source,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            softmax=kept,
            selector=name,
        )
        models[name] = convert(base, placement, mixer_settings(mixer), "qkvo")
    table = []
    generator = torch.Generator().manual_seed(0)
    for context in CONTEXTS:
        prompt = torch.randint(3, config.vocab_size, (1, context), generator=generator)
        running = {name: filled(model, prompt) for name, model in models.items()}
        sizes = {name: cache_bytes(cache) // BATCH for name, (cache, _) in running.items()}
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(STEPS):
            for name, model in models.items():
                cache, tokens = running[name]
                start = time.process_time()
                with torch.no_grad():
                    logits = model(tokens, past_key_values=cache, use_cache=True).logits
                seconds[name].append(time.process_time() - start)
                running[name] = cache, logits[:, -1:].argmax(-1)
        speeds = {name: BATCH / statistics.median(times) for name, times in seconds.items()}
        for name, model in models.items():
            facts = summarise(model)
            table.append(
                {
                    "context": context,
                    "model": name,
                    "tokens_per_second": speeds[name],
                    "ratio": speeds[name] / speeds["base"],
                    "cache_bytes": sizes[name],
                    "formula_bytes": facts["kv_bytes_per_token"] * context + facts["state_bytes"],
                }
            )
    return table


def main() -> None:
    """Print one line per context and model; a ratio above 1 is faster than the base."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--base", default="nano:base")
    options.add_argument("--mixer", default="mamba2")
    chosen = options.parse_args()
    head = ("context", "kept", "tokens/s", "ratio", "cache bytes", "formula")
    print("{:>8} {:>14} {:>9} {:>6} {:>12} {:>12}".format(*head))
    for row in rows(chosen.base, chosen.mixer):
        print(
            f"{row['context']:>8} {row['model']:>14} {row['tokens_per_second']:>9.0f} "
            f"{row['ratio']:>6.2f} {row['cache_bytes']:>12,} {row['formula_bytes']:>12,}"
        )


if __name__ == "__main__":
    main()
