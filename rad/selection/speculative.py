"""Self-speculative decoding: draft with some attention sub-layers skipped, verify with all.

The draft is the same model with the attention of chosen layers bypassed (their MLPs stay); one
forward pass of the full model verifies a draft; tokens are accepted while they equal the full
model's greedy choice, so the output is the full model's greedy output whatever was skipped. Draft
and verification share the key/value cache of verified tokens; entries that the draft added are
cropped before verification. (RAD, section 3.1; Draft & Verify, arXiv 2309.08168.)

Legend: B prompts, T tokens, S window starts, W draft length.

Try it: `speculative_generate(model, prompt, skip={2, 5}, new_tokens=32)`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rad.selection.base import CostMeter, decoder_layers


@contextmanager
def skip_attention(model: Any, layers: Collection[int]) -> Iterator[None]:
    """Within the block, attention of `layers` is not computed and contributes zero.

    A skipped layer adds nothing to a key/value cache either, so calls with a cache must pass
    `attention_mask` and `position_ids` themselves: transformers reads the length off one layer.
    Raises `IndexError` for a layer that does not exist.
    """
    modules = decoder_layers(model)
    unknown = [layer for layer in layers if not 0 <= layer < len(modules)]
    if unknown:
        raise IndexError(f"no layer {unknown[0]} in a model of {len(modules)} layers")

    def bypass(hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        del args, kwargs
        return torch.zeros_like(hidden_states), None

    skipped = [modules[layer].self_attn for layer in set(layers)]
    for attention in skipped:
        # An instance attribute hides the class's method and is gone when deleted.
        attention.forward = bypass
    try:
        yield
    finally:
        for attention in skipped:
            del attention.forward


@dataclass
class DraftExit:
    """When a draft stops early: once a drafted token's probability is below `threshold`.

    The token that falls below is still proposed. With `adaptive`, every verification moves the
    threshold so that the smoothed acceptance rate approaches `target` (Draft & Verify, eq. 4 and
    its code: step 0.01, both smoothing factors as below); the state carries over prompts.
    """

    threshold: float = 0.6
    adaptive: bool = True
    target: float = 0.9
    step: float = 0.01
    rate_smoothing: float = 0.5
    threshold_smoothing: float = 0.9
    acceptance: float = 0.0

    def stops(self, probability: float) -> bool:
        """Whether the draft ends with a token of this top-1 probability."""
        return probability < self.threshold

    def update(self, drafted: int, accepted: int, max_draft: int) -> None:
        """Adapt the threshold after a verification."""
        if not self.adaptive or drafted == 0:
            return
        share = accepted / drafted
        beta = self.rate_smoothing
        self.acceptance = beta * self.acceptance + (1 - beta) * share
        if self.acceptance < self.target:
            proposal = self.threshold + self.step
        elif drafted < max_draft:
            proposal = self.threshold - self.step
        else:
            proposal = self.threshold
        beta = self.threshold_smoothing
        self.threshold = min(1.0, max(0.0, beta * self.threshold + (1 - beta) * proposal))


@dataclass
class Statistics:
    """Counts of a draft-and-verify loop."""

    drafted: int = 0
    accepted: int = 0
    verifications: int = 0
    emitted: int = 0  # tokens after each prompt's first, which the prefill yields

    def record(self, drafted: int, accepted: int) -> None:
        """Count one verification; it emits the accepted tokens and one of the full model."""
        self.drafted += drafted
        self.accepted += accepted
        self.verifications += 1
        self.emitted += accepted + 1

    @property
    def acceptance_rate(self) -> float:
        """Accepted share of the drafted tokens; 0 when none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_length(self) -> float:
        """Tokens emitted per pass of the full model."""
        return self.emitted / self.verifications if self.verifications else 0.0

    def speed_up(self, draft_cost: float) -> float:
        """Modelled tokens per unit of time against plain decoding.

        `draft_cost` is the cost of a draft step in units of a full step; a verification counts
        as one full step, as in memory-bound decoding (RAD, section 3.1).
        """
        spent = self.verifications + draft_cost * self.drafted
        return self.emitted / spent if spent else 0.0


def crop_cache(cache: Any, length: int) -> None:
    """Shorten every layer of `cache` to at most `length` tokens.

    Layers may differ in length (a skipped one has no draft entries), and `DynamicCache.crop`
    removes the same number from each.
    """
    for layer in cache.layers:
        surplus = layer.get_seq_length() - length
        if surplus > 0:
            layer.crop(-surplus)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, keys) booleans -> (1, 1, T, keys) mask for eager and SDPA attention alike."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[None, None]


def _step(model: Any, tokens: Tensor, cache: Any, start: int, meter: CostMeter | None) -> Tensor:
    """Logits (B, T, vocabulary) of `tokens` (B, T) at positions from `start`; grows `cache`."""
    count = tokens.shape[1]
    positions = torch.arange(start, start + count, device=tokens.device)
    keys = torch.arange(start + count, device=tokens.device)
    logits: Tensor = model(
        input_ids=tokens,
        attention_mask=additive_mask(keys[None] <= positions[:, None], model.dtype),
        position_ids=positions[None],
        past_key_values=cache,
        use_cache=True,
    ).logits
    if meter is not None:
        meter.add(tokens.numel())
    return logits


def _new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


@torch.no_grad()
def greedy_generate(
    model: Any, prompts: Tensor, new_tokens: int, meter: CostMeter | None = None
) -> Tensor:
    """Plain greedy continuations (B, new_tokens) of equally long `prompts` (B, T)."""
    cache = _new_cache(model)
    found: list[Tensor] = []
    tokens, start = prompts, 0
    for _ in range(new_tokens):
        logits = _step(model, tokens, cache, start, meter)
        start += tokens.shape[1]
        tokens = logits[:, -1:].argmax(-1)
        found.append(tokens)
    return torch.cat(found, dim=1) if found else prompts[:, :0]


@torch.no_grad()
def speculative_generate(
    model: Any,
    prompt: Tensor,
    skip: Collection[int],
    new_tokens: int,
    *,
    max_draft: int = 8,
    draft_exit: DraftExit | None = None,
    stop_token: int | None = None,
    meter: CostMeter | None = None,
) -> tuple[list[int], Statistics]:
    """The greedy continuation of `prompt` (T,), drafted with the attention of `skip` left out.

    Returns at most `new_tokens` tokens, ending with `stop_token` when that comes first, and the
    loop's counts. The tokens equal those of `greedy_generate`.
    """
    draft_exit = draft_exit or DraftExit()
    statistics = Statistics()
    cache = _new_cache(model)
    prompt = prompt.reshape(1, -1)
    length = prompt.shape[1]  # tokens in the cache: all but the last one emitted
    output = [int(_step(model, prompt, cache, 0, meter)[0, -1].argmax())]
    while len(output) < new_tokens and output[-1] != stop_token:
        drafted: list[int] = []
        # One token of the room is the full model's own.
        room = min(max_draft, new_tokens - len(output) - 1)
        with skip_attention(model, skip):
            last = output[-1]
            for index in range(room):
                step = prompt.new_tensor([[last]])
                logits = _step(model, step, cache, length + index, meter)[0, -1]
                last = int(logits.argmax())
                drafted.append(last)
                if draft_exit.stops(float(logits.float().softmax(-1)[last])):
                    break
        crop_cache(cache, length)
        checked = prompt.new_tensor([[output[-1], *drafted]])
        choices = _step(model, checked, cache, length, meter)[0].argmax(-1).tolist()
        accepted = 0
        while accepted < len(drafted) and drafted[accepted] == choices[accepted]:
            accepted += 1
        length += accepted + 1
        crop_cache(cache, length)
        statistics.record(len(drafted), accepted)
        draft_exit.update(len(drafted), accepted, max_draft)
        for token in choices[: accepted + 1]:
            output.append(token)
            if token == stop_token:
                break
    return output, statistics
