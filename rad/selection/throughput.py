"""Measured speed of speculative decoding, interleaved with plain decoding of the same prompts.

A clock drifts with heat and neighbours by more than skipping some attention gains (RAD, appendix
C: timing is noisy), so every prompt is decoded both ways in turn, and what is reported is the
ratio. Times include the prefill, as in Draft & Verify.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rad.selection.base import CostMeter
from rad.selection.sampling import Greedy, Rule
from rad.selection.speculative import (
    DraftExit,
    Statistics,
    plain_generate,
    speculative_generate,
)


@dataclass
class Comparison:
    """Both ways of decoding the same prompts."""

    statistics: Statistics = field(default_factory=Statistics)
    outputs: list[list[int]] = field(default_factory=list)
    plain_outputs: list[list[int]] = field(default_factory=list)
    seconds: float = 0.0
    plain_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of speculative decoding."""
        return sum(map(len, self.outputs)) / self.seconds

    @property
    def plain_tokens_per_second(self) -> float:
        """Of plain decoding."""
        return sum(map(len, self.plain_outputs)) / self.plain_seconds

    @property
    def speed_up(self) -> float:
        """Tokens per second against plain decoding."""
        return self.tokens_per_second / self.plain_tokens_per_second

    @property
    def identical(self) -> int:
        """Prompts whose two outputs are equal, token for token."""
        return sum(
            mine == plain for mine, plain in zip(self.outputs, self.plain_outputs, strict=True)
        )


def compare(
    model: Any,
    prompts: Iterable[Tensor],
    skip: Collection[int],
    new_tokens: int,
    *,
    max_draft: int = 8,
    draft_exit: DraftExit | None = None,
    rule: Callable[[], Rule] = Greedy,
    stop_token: int | None = None,
    meter: CostMeter | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Decode every prompt (T,) plainly and speculatively, in alternating order.

    `rule` makes the rule of each of the two, so that sampled ones start from the same seed; the
    exit's state carries over prompts.
    """
    found = Comparison()
    leave = replace(draft_exit or DraftExit())
    rules = rule(), rule()

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return clock()

    def plain(prompt: Tensor) -> None:
        start = now()
        output = plain_generate(
            model, prompt, new_tokens, rule=rules[0], stop_token=stop_token, meter=meter
        )
        found.plain_seconds += now() - start
        found.plain_outputs.append(output)

    def speculative(prompt: Tensor) -> None:
        start = now()
        output, counts = speculative_generate(
            model,
            prompt,
            skip,
            new_tokens,
            max_draft=max_draft,
            draft_exit=leave,
            rule=rules[1],
            stop_token=stop_token,
            meter=meter,
        )
        found.seconds += now() - start
        found.outputs.append(output)
        found.statistics.add(counts)

    for index, prompt in enumerate(prompts):
        for run in (plain, speculative) if index % 2 == 0 else (speculative, plain):
            run(prompt)
    return found
