"""Speed and memory against context length and batch size: prefill, first token, decoding, cache.

Cache bytes are measured (the sum of the tensors that the model's cache holds after `context`
tokens) and stand beside the formula's (`rad.evaluation.memory`). A point that does not fit is
recorded with the reason.
"""

from __future__ import annotations

import gc
import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rad.evaluation.memory import head_dim, predicted_cache, step_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SCHEMA = 2
# Per element of a recurrent state and token: decay, outer product, sum, read-out (multiply, add).
STATE_FLOPS = 5
Progress = Callable[[str], None]


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors in the layers of a Hugging Face cache: keys, values and states."""
    from rad.evaluation.live_memory import cache_bytes as measured

    return measured(cache)


def _attention_heads(config: Any) -> list[int]:
    """Query heads of softmax attention per layer."""
    kept = getattr(config, "rad_heads", None)
    if kept is not None:
        return [len(heads) for heads in kept]
    return [config.num_attention_heads] * config.num_hidden_layers


def flops_per_token(model: Any, cache: Any, batch_size: int) -> float:
    """FLOPs of decoding one token with `cache` behind it.

    2 per weight outside the embedding look-up (a tied output projection counts), plus per softmax
    layer 4 x query heads x head dim x cached tokens (scores and weighted sum), plus
    `STATE_FLOPS` per element of every recurrent state. Norms, activations and softmax are left out.
    """
    from rad.evaluation.live_memory import layer_tensors

    config = model.config
    weights = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if head is None or head.weight is not embedding:
        weights -= embedding.numel()
    total = 2.0 * weights
    layers = layer_tensors(cache)
    for heads, (pairs, others) in zip(_attention_heads(config), layers, strict=True):
        cached = max((tensor.shape[-2] for tensor in pairs), default=0)
        total += 4.0 * heads * head_dim(config) * cached
        total += STATE_FLOPS * sum(tensor.numel() for tensor in others) / batch_size
    return float(total)


def _line(contexts: Sequence[int], sizes: Sequence[float]) -> tuple[float, float]:
    """(slope, intercept) through the last two points: what growth is left at long context."""
    run = contexts[-1] - contexts[-2]
    slope = (sizes[-1] - sizes[-2]) / run
    return slope, sizes[-1] - slope * contexts[-1]


def _in_turn(parts: Iterable[Iterator[None]]) -> None:
    """Advance each in turn until all are through: what disturbs one disturbs its neighbour too."""
    left = list(parts)
    while left:
        left = [part for part in left if next(part, StopIteration) is None]


class _Meter:
    """Measures one model on fixed random tokens, and remembers what did not fit."""

    def __init__(self, model: PreTrainedModel, decode_tokens: int, peak_memory: bool) -> None:
        import torch

        self.torch, self.model = torch, model
        self.decode_tokens, self.peak_memory = decode_tokens, peak_memory
        self.random = torch.Generator().manual_seed(0)
        # Only the last position's logits are needed; not every custom model can leave out the rest.
        forwards = [
            vars(owner)["forward"] for owner in type(model).__mro__ if "forward" in vars(owner)
        ]
        short = any("logits_to_keep" in inspect.signature(each).parameters for each in forwards)
        self.options: dict[str, Any] = {"logits_to_keep": 1} if short else {}
        self.scratch = 0.0  # bytes per token of a prefill beyond weights and cache, last seen
        self.points: list[dict[str, Any]] = []
        self.skipped: list[dict[str, Any]] = []

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def prefill(self, context: int, batch_size: int) -> tuple[Any, torch.Tensor, float, float]:
        """Run a batch of `context` random tokens.

        Returns the cache, the next tokens (B,1), the seconds until the logits are there, and the
        seconds until the first new token is known on the host.
        """
        shape = (batch_size, context)
        tokens = self.torch.randint(3, self.model.config.vocab_size, shape, generator=self.random)
        start = self._now()
        output = self.model(tokens.to(self.model.device), use_cache=True, **self.options)
        done = self._now()
        following = output.logits[:, -1:].argmax(-1)
        following.tolist()
        first = time.perf_counter()
        return output.past_key_values, following, done - start, first - start

    def decode(self, cache: Any, tokens: torch.Tensor, steps: int) -> float:
        """Tokens per second over the batch, from the median step of `steps`."""
        seconds = []
        for _ in range(steps):
            start = self._now()
            output = self.model(tokens, past_key_values=cache, use_cache=True)
            tokens = output.logits[:, -1:].argmax(-1)
            seconds.append(self._now() - start)
        return len(tokens) / statistics.median(seconds)

    def needs(self, context: int, batch_size: int, held: int) -> int:
        """Bytes that a point is expected to take: weights, cache by formula, activations as seen.

        The activations are extrapolated from the last point, in proportion to its tokens.
        """
        cache = predicted_cache(self.model, context).total
        return round(held + batch_size * (cache + self.scratch * context))

    def _peak(self, context: int, batch_size: int) -> int:
        """Bytes by which memory grows in a prefill and one decoding step."""
        from rad.evaluation.live_memory import peak_growth

        with peak_growth(self.model) as peak:
            cache, tokens, *_ = self.prefill(context, batch_size)
            size = cache_bytes(cache)
            self.decode(cache, tokens, 1)
            del cache, tokens
        self.scratch = max(0, peak.bytes - size) / (context * batch_size)
        return int(peak.bytes)

    def _measure(self, context: int, batch_size: int, weights: int) -> Iterator[None]:
        """Measure one point and add it to `points`; yields between passes, holding no cache."""
        grown = self._peak(context, batch_size) if self.peak_memory else None
        # the better of two passes: what else the machine does only makes them slower
        half, passes = max(1, self.decode_tokens // 2), []
        for steps in (half, max(1, self.decode_tokens - half)):
            yield
            cache, tokens, *seconds = self.prefill(context, batch_size)
            held, flops = cache_bytes(cache), flops_per_token(self.model, cache, batch_size)
            passes.append((*seconds, self.decode(cache, tokens, steps)))
            del cache, tokens
        prefills, first_tokens, speeds = zip(*passes, strict=True)
        formula = predicted_cache(self.model, context)
        self.points.append(
            {
                "context": context,
                "batch_size": batch_size,
                "cache_bytes": int(held / batch_size),
                "cache_formula_bytes": formula.total,
                "kv_formula_bytes": formula.kv,
                "state_formula_bytes": formula.state + formula.conv,
                "flops_per_token": flops,
                "prefill_seconds": min(prefills),
                "prefill_tokens_per_second": batch_size * context / min(prefills),
                "first_token_seconds": min(first_tokens),
                "decode_tokens_per_second": max(speeds),
                "decode_step_bytes": step_bytes(self.model, context, batch_size),
                "peak_memory_bytes": None if grown is None else weights + grown,
            }
        )

    def point(
        self, context: int, batch_size: int, *, held: int, weights: int, limit: int
    ) -> Iterator[None]:
        """Measure a point, or add it to `skipped` with the reason; yields between passes.

        `held` are the bytes of all weights in memory, `weights` those of this model.
        """
        from rad.evaluation.live_memory import is_out_of_memory

        needed = self.needs(context, batch_size, held)
        reason = None
        for earlier in self.skipped:
            if earlier["context"] <= context and earlier["batch_size"] <= batch_size:
                reason = (
                    f"{earlier['context']} tokens x {earlier['batch_size']} did not fit already"
                )
        if reason is None and needed > limit:
            reason = f"needs about {needed:,} bytes, the limit is {limit:,}"
        if reason is None:
            try:
                yield from self._measure(context, batch_size, weights)
                return
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = f"out of memory: {str(error).splitlines()[0] if str(error) else 'host'}"
            # only here the failed point's tensors are out of the traceback's hands
            gc.collect()
            if self.model.device.type == "cuda":
                self.torch.cuda.empty_cache()
        self.skipped.append(
            {
                **{"context": context, "batch_size": batch_size},
                **{"predicted_bytes": needed, "reason": reason},
            }
        )

    def sizes(self) -> tuple[float, float]:
        """(KV bytes per token, state bytes), measured at the two longest contexts that fitted."""
        seen = {point["context"]: float(point["cache_bytes"]) for point in self.points}
        if not seen:
            formula = predicted_cache(self.model, 2).kv / 2
            return formula, float(predicted_cache(self.model, 2).total - 2 * formula)
        if len(seen) == 1:
            half = max(1, next(iter(seen)) // 2)
            seen[half] = float(cache_bytes(self.prefill(half, 1)[0]))
        contexts = sorted(seen)
        return _line(contexts, [seen[context] for context in contexts])

    def record(self, batch_size: int) -> dict[str, Any]:
        """Sizes and points; those of `batch_size` apart from those of other batch sizes."""
        slope, intercept = self.sizes()
        own = [point for point in self.points if point["batch_size"] == batch_size]
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "flops_per_token": own[-1]["flops_per_token"] if own else None,
            "kv_bytes_per_token": round(slope, 3),
            "state_bytes": round(intercept),
            "points": own,
            "batch_points": [p for p in self.points if p["batch_size"] != batch_size],
            "skipped": self.skipped,
        }


def measure(
    model: PreTrainedModel,
    *,
    run: str,
    contexts: Sequence[int],
    decode_tokens: int,
    batch_size: int = 1,
    batch_sizes: Sequence[int] = (),
    memory_limit: float | None = None,
    peak_memory: bool = True,
    compare_base: bool = False,
    base: PreTrainedModel | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The content of `efficiency.json` of a causal model with a Hugging Face cache.

    `cache_bytes` is per sequence. `kv_bytes_per_token` and `state_bytes` are slope and intercept of
    cache bytes through the two longest contexts; `flops_per_token` is at the longest context.
    Times are the better of two passes, each with a prefill and the median step of half of
    `decode_tokens`; the first token's is from the prompt on the host to the token on the host.
    `points` are of the first batch size, `batch_points` of the others. With `compare_base` the base
    takes turns with a hybrid: `base`, or the base's shape where none is given. Raises `ValueError`
    on bad contexts.
    """
    import torch

    from rad.evaluation import live_memory
    from rad.evaluation.unconverted import is_hybrid, unconverted

    ordered = sorted(set(contexts))
    if not ordered or ordered[0] < 2:
        raise ValueError("evaluation.efficiency.contexts: at least one context of 2 tokens or more")
    batches = list(dict.fromkeys(batch_sizes)) or [batch_size]
    models = {"model": model}
    drawn = compare_base and base is None and is_hybrid(model)
    if base is not None or drawn:
        models["base"] = unconverted(model) if base is None else base
    limit = live_memory.default_limit(model.device)
    if memory_limit is not None:
        limit = round(memory_limit * live_memory.GIB)
    held = live_memory.weight_bytes(*models.values())
    weights = {name: live_memory.weight_bytes(each) for name, each in models.items()}
    meters = {name: _Meter(each, decode_tokens, peak_memory) for name, each in models.items()}
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for meter in meters.values():
                meter.decode(*meter.prefill(ordered[0], 1)[:2], 1)  # warm-up
            for batch in batches:
                for context in ordered:
                    if progress is not None:
                        progress(f"{context:,} tokens x {batch}")
                    _in_turn(
                        meter.point(context, batch, held=held, weights=weights[name], limit=limit)
                        for name, meter in meters.items()
                    )
            records = {name: meter.record(batches[0]) for name, meter in meters.items()}
    finally:
        model.train(was_training)
    found = {
        "schema": SCHEMA,
        "run": run,
        **records["model"],
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "weight_bytes": weights["model"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "batch_size": batches[0],
        "decode_tokens": decode_tokens,
        "threads": torch.get_num_threads(),
        "memory_limit_bytes": limit,
        "peak_memory": live_memory.peak_source(model.device) if peak_memory else None,
    }
    if "base" in records:
        source = "shape only, random attention weights" if drawn else "weights"
        found["base"] = {**records["base"], "weight_bytes": weights["base"], "source": source}
    return found
