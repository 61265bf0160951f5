"""Cache bytes, prefill time and decode speed against context length; parameters and FLOPs.

Cache bytes are measured, not computed: the sum of the tensors that the model's cache holds after
`context` tokens.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SCHEMA = 1
# Per element of a recurrent state and token: decay, outer product, sum, read-out (multiply, add).
STATE_FLOPS = 5


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor reachable through lists, tuples and dictionaries."""
    import torch

    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _layer_tensors(cache: Any) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Per layer: (keys and values, everything else), each tensor once."""
    layers = []
    for layer in cache.layers:
        held = vars(layer)
        pairs = {id(t): t for name in ("keys", "values") for t in _tensors(held.get(name))}
        others = {id(t): t for t in _tensors(held) if id(t) not in pairs}
        layers.append((list(pairs.values()), list(others.values())))
    return layers


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors in the layers of a Hugging Face cache: keys, values and states."""
    return sum(
        tensor.numel() * tensor.element_size()
        for pairs, others in _layer_tensors(cache)
        for tensor in (*pairs, *others)
    )


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
    config = model.config
    weights = sum(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    if head is None or head.weight is not embedding:
        weights -= embedding.numel()
    total = 2.0 * weights
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = _layer_tensors(cache)
    for heads, (pairs, others) in zip(_attention_heads(config), layers, strict=True):
        cached = max((tensor.shape[-2] for tensor in pairs), default=0)
        total += 4.0 * heads * width * cached
        total += STATE_FLOPS * sum(tensor.numel() for tensor in others) / batch_size
    return float(total)


def _line(contexts: Sequence[int], sizes: Sequence[float]) -> tuple[float, float]:
    """(slope, intercept) through the last two points: what growth is left at long context."""
    run = contexts[-1] - contexts[-2]
    slope = (sizes[-1] - sizes[-2]) / run
    return slope, sizes[-1] - slope * contexts[-1]


class _Meter:
    """Runs one model on fixed random tokens."""

    def __init__(self, model: PreTrainedModel, batch_size: int) -> None:
        import torch

        self.torch, self.model, self.batch_size = torch, model, batch_size
        self.random = torch.Generator().manual_seed(0)
        # Only the last position's logits are needed; not every custom model can leave out the rest.
        forwards = [
            vars(owner)["forward"] for owner in type(model).__mro__ if "forward" in vars(owner)
        ]
        short = any("logits_to_keep" in inspect.signature(each).parameters for each in forwards)
        self.options: dict[str, Any] = {"logits_to_keep": 1} if short else {}

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            self.torch.cuda.synchronize()
        return time.perf_counter()

    def prefill(self, context: int) -> tuple[Any, torch.Tensor, float]:
        """(cache, next tokens (B,1), seconds) after `context` random tokens."""
        vocabulary = self.model.config.vocab_size
        shape = (self.batch_size, context)
        tokens = self.torch.randint(3, vocabulary, shape, generator=self.random)
        start = self._now()
        output = self.model(tokens.to(self.model.device), use_cache=True, **self.options)
        following = output.logits[:, -1:].argmax(-1)
        return output.past_key_values, following, self._now() - start

    def decode(self, cache: Any, tokens: torch.Tensor, steps: int) -> float:
        """Tokens per second over the batch, from the median step of `steps`."""
        seconds = []
        for _ in range(steps):
            start = self._now()
            output = self.model(tokens, past_key_values=cache, use_cache=True)
            tokens = output.logits[:, -1:].argmax(-1)
            seconds.append(self._now() - start)
        return self.batch_size / statistics.median(seconds)


def measure(
    model: PreTrainedModel,
    *,
    run: str,
    contexts: Sequence[int],
    decode_tokens: int,
    batch_size: int,
) -> dict[str, Any]:
    """The content of `efficiency.json` of a causal model with a Hugging Face cache.

    `cache_bytes` is per sequence. `kv_bytes_per_token` and `state_bytes` are slope and intercept of
    cache bytes through the two longest contexts; `flops_per_token` is at the longest context.
    Prefill is the faster of two passes, decoding the median of `decode_tokens` steps.
    """
    import torch

    ordered = sorted(set(contexts))
    if not ordered or ordered[0] < 2:
        raise ValueError("evaluation.efficiency.contexts: at least one context of 2 tokens or more")
    meter = _Meter(model, batch_size)
    was_training = model.training
    model.eval()
    points: list[dict[str, Any]] = []
    flops = 0.0
    try:
        with torch.no_grad():
            meter.decode(*meter.prefill(ordered[0])[:2], 1)  # warm-up
            for context in ordered:
                _, _, first = meter.prefill(context)
                cache, tokens, second = meter.prefill(context)
                size = cache_bytes(cache) / batch_size
                flops = flops_per_token(model, cache, batch_size)
                points.append(
                    {
                        "context": context,
                        "cache_bytes": int(size),
                        "flops_per_token": flops,
                        "prefill_seconds": min(first, second),
                        "decode_tokens_per_second": meter.decode(cache, tokens, decode_tokens),
                    }
                )
            sizes = [float(point["cache_bytes"]) for point in points]
            at = list(ordered)
            if len(at) == 1:
                at.insert(0, at[0] // 2)
                sizes.insert(0, cache_bytes(meter.prefill(at[0])[0]) / batch_size)
    finally:
        model.train(was_training)
    slope, intercept = _line(at, sizes)
    parameters = list(model.parameters())
    return {
        "schema": SCHEMA,
        "run": run,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "flops_per_token": flops,
        "kv_bytes_per_token": round(slope, 3),
        "state_bytes": round(intercept),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "batch_size": batch_size,
        "decode_tokens": decode_tokens,
        "threads": torch.get_num_threads(),
        "points": points,
    }
