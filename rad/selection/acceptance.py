"""What draft-and-verify decoding would do for many skip sets, without running its serial loop.

Verification is lossless, so whatever is skipped the output is the full model's greedy
continuation, and a draft that starts at a given position of it always sees the same verified
tokens with the full model's keys and values. `draft_windows` therefore drafts from *every*
position of every calibration prompt at once, `replay` then walks through the windows that the
serial loop would have visited. The counts are those of `speculative_generate` (up to rounding in
argmax ties), at `max_draft` model calls per skip set.

Legend: B prompts, T prompt tokens, N new tokens, S = N - 1 window starts, W draft length.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rad.selection.base import CostMeter, SelectionError, decoder_layers
from rad.selection.matchness import Matchness, check_finite
from rad.selection.rollback import is_hybrid
from rad.selection.speculative import DraftExit, Statistics, greedy_generate, skip_attention


@dataclass
class Windows:
    """Drafts from every start: `tokens` and top-1 `probabilities`, both (B, S, W)."""

    tokens: Tensor
    probabilities: Tensor


class Calibration:
    """Prompts, the full model's greedy continuations and its keys and values for both.

    `prompts` is (B, T), `continuation` (B, N), `text` both, (B, T + N). Raises `SelectionError`
    for a hybrid, whose states cannot be drafted from at every position at once.
    """

    def __init__(
        self, model: Any, prompts: Tensor, new_tokens: int, meter: CostMeter | None = None
    ) -> None:
        if new_tokens < 2:
            raise SelectionError(f"new_tokens is {new_tokens}: a draft needs at least 2")
        if is_hybrid(model):
            raise SelectionError(
                f"{type(model).__name__} is a hybrid: skip sets are searched on its base; "
                "speculative decoding itself takes both"
            )
        self.model = model
        self._weights = model.num_parameters()
        self.meter = meter or CostMeter()
        self.prompts = prompts.to(model.device)
        self.continuation = greedy_generate(model, self.prompts, new_tokens, self.meter)
        self.text = torch.cat([self.prompts, self.continuation], dim=1)
        self._verified: list[tuple[Tensor, Tensor]] | None = None
        self._agreement: Matchness | None = None

    @torch.no_grad()
    def _keys_and_values(self) -> list[tuple[Tensor, Tensor]]:
        """The full model's, of all layers; computed when first asked for."""
        if self._verified is None:
            output = self.model(input_ids=self.text[:, :-1], use_cache=True)
            self.meter.add(self.text[:, :-1].numel(), weights=self._weights)
            self._verified = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
        return self._verified

    @torch.no_grad()
    def draft_windows(self, skip: Collection[int], max_draft: int) -> Windows:
        """Draft `max_draft` tokens from every position, with the attention of `skip` left out.

        All starts of a prompt are queries of one call. A query sees the verified tokens before
        its start and the tokens of its own window: slot i of window s is key T + N - 1 + i S + s.
        """
        from transformers import DynamicCache

        batch, length = self.prompts.shape
        verified = self.text.shape[1] - 1
        starts = torch.arange(length, verified, device=self.text.device)
        cache = DynamicCache(config=self.model.config)
        for index, (keys, values) in enumerate(self._keys_and_values()):
            cache.update(keys, values, index)
        own = torch.eye(len(starts), dtype=torch.bool, device=self.text.device)
        visible = torch.arange(verified, device=self.text.device)[None] < starts[:, None]
        tokens = self.text[:, length:verified]
        drafted: list[Tensor] = []
        probabilities: list[Tensor] = []
        with skip_attention(self.model, skip, fill_cache=False):
            for index in range(max_draft):
                visible = torch.cat([visible, own], dim=1)
                logits = self.model(
                    input_ids=tokens,
                    attention_mask=additive_mask(visible, self.model.dtype),
                    position_ids=(starts + index)[None].expand(batch, -1),
                    past_key_values=cache,
                    use_cache=True,
                ).logits
                self.meter.add(tokens.numel(), weights=self._weights)
                logits = logits.float()
                top, tokens = logits.max(-1)
                drafted.append(tokens)
                probabilities.append((top - logits.logsumexp(-1)).exp())
        found = Windows(torch.stack(drafted, -1), torch.stack(probabilities, -1))
        check_finite(found.probabilities, skip)
        return found

    def replay(self, windows: Windows, draft_exit: DraftExit | None = None) -> Statistics:
        """The counts of the serial loop over all prompts in order, from its drafts."""
        state = replace(draft_exit or DraftExit())
        total = Statistics()
        max_draft = windows.tokens.shape[-1]
        tokens = windows.tokens.tolist()
        probabilities = windows.probabilities.tolist()
        for row, truth in enumerate(self.continuation.tolist()):
            emitted = 1
            while emitted < len(truth):
                room = min(max_draft, len(truth) - emitted - 1)
                draft, confidence = tokens[row][emitted - 1], probabilities[row][emitted - 1]
                drafted = 0
                while drafted < room:
                    drafted += 1
                    if state.stops(confidence[drafted - 1]):
                        break
                accepted = 0
                while accepted < drafted and draft[accepted] == truth[emitted + accepted]:
                    accepted += 1
                total.record(drafted, accepted)
                state.update(drafted, accepted, max_draft)
                emitted += accepted + 1
        return total

    def statistics(
        self, skip: Collection[int], max_draft: int, draft_exit: DraftExit | None = None
    ) -> Statistics:
        """Counts of decoding all prompts with the attention of `skip` left out of the draft."""
        return self.replay(self.draft_windows(skip, max_draft), draft_exit)

    def matchness(self, skip: Collection[int]) -> float:
        """Share of the continuation that the skipped model predicts, teacher-forced (SWIFT)."""
        if self._agreement is None:
            start = self.prompts.shape[1]
            self._agreement = Matchness(self.model, self.text, start, self.meter)
        return self._agreement(skip)


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, keys) booleans -> (1, 1, T, keys) mask for eager and SDPA attention alike."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[None, None]


def draft_cost(model: Any, skip: Collection[int]) -> float:
    """Cost of a draft step in full steps, as the share of weights read (memory-bound decoding)."""
    layers = decoder_layers(model)
    skipped = sum(
        parameter.numel()
        for layer in set(skip)
        for parameter in layers[layer].self_attn.parameters()
    )
    # An untied head is read in full for every token, an embedding table is not.
    total = sum(parameter.numel() for parameter in model.parameters())
    if not model.config.tie_word_embeddings:
        total -= model.get_input_embeddings().weight.numel()
    return 1.0 - float(skipped / total)
