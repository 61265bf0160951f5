"""One nano example, and the rule that keeps the splits apart."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

SPLITS: tuple[str, ...] = ("train", "test", "hard")


@dataclass(frozen=True)
class Example:
    """A prompt and the answer the model should complete before `</s>`.

    `meta["turns"]`, where present, holds further (question, answer) pairs over the same context;
    only training documents have them.
    """

    family: str
    prompt: str
    answer: str
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.prompt + self.answer


def split_of(prompt: str) -> str:
    """The only split that may hold `prompt`: 1/32 of all prompts each for test and hard."""
    bucket = zlib.crc32(prompt.encode("utf-8")) % 32
    return {0: "test", 16: "hard"}.get(bucket, "train")
