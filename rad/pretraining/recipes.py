"""What the nano models are and how each is trained: the table that `pretrain` follows."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Phase:
    """One stretch of training, started with fresh optimiser moments."""

    kind: str  # "induction" or "mixture"
    steps: int
    learning_rate: float
    rows: int = 32
    context: int = 128
    warmup: int = 50
    final: float = 1.0  # learning rate at the end as a part of the peak (cosine)
    grow: tuple[int | None, ...] | None = None  # layers after the change, see growth.grow
    hard_share: float = 0.3  # of documents above the easy level,
    top_share: float = 0.0  # and of those at the level of the `hard` split
    shares: tuple[tuple[str, float], ...] | None = None
    crux_turns: int = 1  # calls asked of each function
    trace_share: float | None = None  # of variable tracing within ruler_nano
    trace: str = "path"  # what a variable-tracing question asks for, see ruler_nano
    stop: int | None = None  # the phase ends here, its schedule being that of `steps`
    rounded: bool = False  # weights go through bf16 before the phase
    # induction only
    active_heads: tuple[int, ...] | None = None
    block: tuple[int, int] = (6, 32)
    threshold: float = 0.4
    attempts: int = 5


@dataclass(frozen=True)
class PretrainRecipe:
    """Architecture of the first phase and the phases in order."""

    width: int
    mlp: int
    phases: tuple[Phase, ...]
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    parent: str | None = None
    beta2: float = 0.98
    weight_decay: float = 0.01
    clip: float = 1.0
    micro_rows: int = 16

    def digest(self, seed: int) -> str:
        text = json.dumps([dataclasses.asdict(self), seed], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


_CODE_HEAVY = (("gsm_nano", 0.18), ("crux_nano", 0.52), ("ruler_nano", 0.23), ("text_nano", 0.07))


def _code_heavy(
    trace: str, hard_share: float, shares: tuple[tuple[str, float], ...] = _CODE_HEAVY
) -> dict[str, Any]:
    """Settings of the later phases, where only code was still missing."""
    return {
        "hard_share": hard_share,
        "shares": shares,
        "crux_turns": 3,
        "trace_share": 0.3 if trace == "path" else 0.5,
        "trace": trace,
    }


_MORE_CODE = (("gsm_nano", 0.12), ("crux_nano", 0.65), ("ruler_nano", 0.18), ("text_nano", 0.05))
_FOUR = (0, None, 1, None)
_EIGHT = (0, None, 1, None, 2, None, 3, None)
# A silent copy of the looking-up layer 4, meant for variable tracing (`path` is what helped).
_TEN = (0, 1, 2, 3, 4, 5, 4, None, 6, 7)
_TWELVE = (0, 1, 2, None, 3, 4, 5, 6, 7, None, 8, 9)

# What medium and large have in common; a checkpoint was written at its end, hence the rounding.
_WIDE: tuple[Phase, ...] = (
    Phase("induction", 700, 3e-3, rows=64, context=96, active_heads=(2, 1)),
    Phase("mixture", 700, 3e-3, grow=_FOUR, trace="end"),
    Phase(
        "mixture",
        4500,
        2e-3,
        grow=_EIGHT,
        final=0.02,
        hard_share=0.45,
        stop=1649,
        trace="end",
    ),
    Phase("mixture", 3200, 2e-3, final=0.02, stop=1668, **_code_heavy("every", 0.45)),
    Phase(
        "mixture",
        1500,
        2e-3,
        grow=_TEN,
        final=0.02,
        stop=376,
        **_code_heavy("every", 0.45),
    ),
    Phase("mixture", 1200, 1.5e-3, final=0.01, **_code_heavy("path", 0.45)),
)

# The early phases asked for the end of a chain only (`end`, then `every` variable's value), which
# never rose above a guess among the values; answering with the way there is what worked.
RECIPES: dict[str, PretrainRecipe] = {
    "base": PretrainRecipe(
        width=96,
        mlp=192,
        phases=(
            Phase("induction", 700, 3e-3, rows=64, context=96, active_heads=(2, 1)),
            Phase("mixture", 700, 3e-3, grow=_FOUR, trace="end"),
            Phase("mixture", 5000, 2.5e-3, grow=_EIGHT, final=0.02, stop=1868, trace="end"),
            Phase("mixture", 3600, 2e-3, final=0.02, stop=2867, **_code_heavy("every", 0.3)),
            Phase("mixture", 1100, 1e-3, final=0.01, **_code_heavy("path", 0.3)),
            # A checkpoint was written in between, hence the rounding.
            Phase("mixture", 1300, 1.2e-3, final=0.01, rounded=True, **_code_heavy("path", 0.3)),
            Phase(
                "mixture",
                800,
                1.2e-3,
                final=0.01,
                rounded=True,
                top_share=0.4,
                **_code_heavy("path", 0.3),
            ),
        ),
    ),
    "medium": PretrainRecipe(
        width=128,
        mlp=256,
        phases=(
            *_WIDE,
            Phase(
                "mixture",
                2000,
                1.5e-3,
                final=0.01,
                rounded=True,
                stop=484,
                **_code_heavy("path", 0.5, _MORE_CODE),
            ),
            Phase("mixture", 1400, 1.5e-3, final=0.01, top_share=0.4, **_code_heavy("path", 0.5)),
        ),
    ),
    "large": PretrainRecipe(
        width=128,
        mlp=256,
        phases=(
            *_WIDE,
            Phase(
                "mixture",
                2100,
                1.5e-3,
                grow=_TWELVE,
                final=0.01,
                rounded=True,
                stop=793,
                **_code_heavy("path", 0.6, _MORE_CODE),
            ),
            Phase("mixture", 1250, 1.5e-3, final=0.01, top_share=0.4, **_code_heavy("path", 0.6)),
            Phase(
                "mixture",
                1400,
                1.5e-3,
                final=0.01,
                rounded=True,
                top_share=0.4,
                **_code_heavy("path", 0.5),
            ),
        ),
    ),
}
