"""Self-speculative decoding: draft with some attention sub-layers skipped, verify with all.

The draft is the same model with the attention of chosen layers bypassed (their MLPs stay); one
forward pass of the full model verifies a draft. With the greedy rule tokens are accepted while they
equal the full model's choice, so the output is the full model's greedy output whatever was skipped;
with the sampled rule it has the full model's distribution (`rad.selection.sampling`). Draft and
verification share one cache of verified tokens (`rad.selection.rollback`), also in a hybrid. A pass
over several tokens rounds differently from a pass over one: where the two likeliest tokens are that
close, and half precision makes many such, greedy outputs can part. (RAD, section 3.1; Draft &
Verify, arXiv 2309.08168.)

Legend: B prompts, T tokens, V vocabulary, W draft length.

Try it: `speculative_generate(model, prompt, skip={2, 5}, new_tokens=32)`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rad.selection.base import CostMeter, SelectionError, decoder_layers
from rad.selection.rollback import SharedCache
from rad.selection.sampling import Greedy, Rule


@contextmanager
def skip_attention(
    model: Any, layers: Collection[int], *, fill_cache: bool = True
) -> Iterator[None]:
    """Within the block, attention of `layers` is not computed and contributes zero.

    A cache that is passed along gets zeros where a skipped layer would have put keys and values:
    transformers reads the number of cached tokens off a single layer, so that without them
    `generate` would number its tokens wrongly whenever that layer is skipped. `fill_cache=False` is
    for callers whose cache counts by itself. Raises `SelectionError` for a layer that does not
    exist.
    """
    modules = decoder_layers(model)
    unknown = [layer for layer in layers if not 0 <= layer < len(modules)]
    if unknown:
        raise SelectionError(
            f"cannot skip layer {unknown[0]}: the model has layers 0 to {len(modules) - 1}"
        )
    chosen = sorted(set(layers))
    for layer in chosen:
        # An instance attribute hides the class's method and is gone when deleted.
        modules[layer].self_attn.forward = _bypass(modules[layer].self_attn, layer, fill_cache)
    try:
        yield
    finally:
        for layer in chosen:
            del modules[layer].self_attn.forward


def _bypass(attention: Any, layer: int, fill_cache: bool) -> Any:
    """What a skipped attention module does instead: nothing but, if asked, fill the cache."""
    own = getattr(attention, "softmax", attention)  # the kept heads of a hybrid's layer, or None

    def bypass(
        hidden_states: Tensor, *args: Any, past_key_values: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        del args, kwargs
        if fill_cache and past_key_values is not None and own is not None:
            width = own.head_dim
            kv_heads = own.k_proj.out_features // width
            shape = (hidden_states.shape[0], kv_heads, hidden_states.shape[1], width)  # (B,K,T,D)
            nothing = hidden_states.new_zeros(()).expand(shape)
            past_key_values.update(nothing, nothing, layer)
        return torch.zeros_like(hidden_states), None

    return bypass


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

    def add(self, other: Statistics) -> None:
        """Count another loop's in."""
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.verifications += other.verifications
        self.emitted += other.emitted

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


def _step(
    model: Any, tokens: Tensor, shared: SharedCache, meter: CostMeter | None, weights: int
) -> Tensor:
    """Logits (B,T,V) of `tokens` (B,T) after those in the cache, which grows."""
    count, start = tokens.shape[1], shared.cache.tokens
    positions = torch.arange(start, start + count, device=tokens.device)
    logits: Tensor = model(
        input_ids=tokens,
        position_ids=positions[None],
        past_key_values=shared.cache,
        use_cache=True,
    ).logits
    shared.cache.tokens = start + count
    if meter is not None:
        meter.add(tokens.numel(), weights=weights)
    return logits


@torch.no_grad()
def greedy_generate(
    model: Any, prompts: Tensor, new_tokens: int, meter: CostMeter | None = None
) -> Tensor:
    """Plain greedy continuations (B, new_tokens) of equally long `prompts` (B, T)."""
    shared, weights = SharedCache(model), model.num_parameters()
    found: list[Tensor] = []
    tokens = prompts
    for _ in range(new_tokens):
        logits = _step(model, tokens, shared, meter, weights)
        tokens = logits[:, -1:].argmax(-1)
        found.append(tokens)
    return torch.cat(found, dim=1) if found else prompts[:, :0]


@torch.no_grad()
def plain_generate(
    model: Any,
    prompt: Tensor,
    new_tokens: int,
    *,
    rule: Rule | None = None,
    stop_token: int | None = None,
    meter: CostMeter | None = None,
) -> list[int]:
    """The continuation of one prompt (T,) without any draft: the reference of a speed-up."""
    rule = rule or Greedy()
    shared, weights = SharedCache(model), model.num_parameters()
    tokens = prompt.reshape(1, -1)
    output: list[int] = []
    while len(output) < new_tokens and (not output or output[-1] != stop_token):
        output.append(rule.choose(_step(model, tokens, shared, meter, weights)[0, -1]))
        tokens = prompt.new_tensor([[output[-1]]])
    return output


@torch.no_grad()
def speculative_generate(
    model: Any,
    prompt: Tensor,
    skip: Collection[int],
    new_tokens: int,
    *,
    max_draft: int = 8,
    draft_exit: DraftExit | None = None,
    rule: Rule | None = None,
    stop_token: int | None = None,
    meter: CostMeter | None = None,
) -> tuple[list[int], Statistics]:
    """The continuation of `prompt` (T,), drafted with the attention of `skip` left out.

    Returns at most `new_tokens` tokens, ending with `stop_token` when that comes first, and the
    loop's counts. With the greedy `rule` (default) the tokens equal those of `greedy_generate`.
    """
    draft_exit, rule = draft_exit or DraftExit(), rule or Greedy()
    statistics = Statistics()
    shared, weights = SharedCache(model), model.num_parameters()
    prompt = prompt.reshape(1, -1)
    with shared.verification():
        logits = _step(model, prompt, shared, meter, weights)
    shared.accept(prompt.shape[1], prompt.shape[1])
    output = [rule.choose(logits[0, -1])] if new_tokens > 0 else []
    while 0 < len(output) < new_tokens and output[-1] != stop_token:
        drafted: list[int] = []
        drafts: list[Tensor] = []
        # One token of the room is the full model's own.
        room = min(max_draft, new_tokens - len(output) - 1)
        with skip_attention(model, skip, fill_cache=False):
            last = output[-1]
            while len(drafted) < room and last != stop_token:
                step = prompt.new_tensor([[last]])
                logits = _step(model, step, shared, meter, weights)[0, -1]
                last, confidence, distribution = rule.propose(logits)
                drafted.append(last)
                drafts.append(distribution)
                # The token is proposed whatever its probability: dropping it here would make the
                # output's distribution depend on the draft's.
                if draft_exit.stops(confidence):
                    break
        checked = prompt.new_tensor([[output[-1], *drafted]])  # (1,W+1)
        with shared.verification():
            logits = _step(model, checked, shared, meter, weights)[0]
        accepted, own = rule.verify(drafted, drafts, logits)
        shared.accept(accepted + 1, len(drafted) + 1)
        statistics.record(len(drafted), accepted)
        draft_exit.update(len(drafted), accepted, max_draft)
        for token in [*drafted[:accepted], own]:
            output.append(token)
            if token == stop_token:
                break
    return output, statistics
