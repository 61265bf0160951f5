"""The memory accounting of retrieval-aware distillation (arXiv 2602.11374v1, A.4 and Table 2).

    M(L) = N_SSM x D x N x 2  +  N_KV x D x 2 x 2 x L        bytes, everything in bfloat16

N_SSM and N_KV are the SSM heads and kv heads of all layers together (the paper's text says per
layer; its own example sums), D the head dim, N the state dim (d_state), L the tokens. The published
table is here as facts, beside functions that recompute it for other points: the row of the method
pairs ten kept heads with a state of 8, which no table of the paper evaluates. No torch, except in
`measured`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CONTEXTS = (128, 2048, 4096)
LAYERS, HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 16, 32, 8, 64, 2048  # Llama-3.2-1B
KIB, MB = 1024, 10**6
CONV_WIDTH = 4


def formula_bytes(
    ssm_heads: int, state_size: int, kv_heads: int, tokens: int, head_dim: int = HEAD_DIM
) -> int:
    """M(L) of the paper's appendix A.4: bfloat16 states, keys and values; no convolution."""
    return head_dim * (2 * ssm_heads * state_size + 4 * kv_heads * tokens)


def conv_bytes(ssm_heads: int, state_size: int, head_dim: int = HEAD_DIM) -> int:
    """What the formula leaves out: W columns of the convolution's inputs x, B and C in bfloat16.

    Each SSM head has D channels of x, N of B and N of C; W is 4 in the published code.
    """
    return 2 * CONV_WIDTH * ssm_heads * (head_dim + 2 * state_size)


@dataclass(frozen=True)
class Point:
    """A model of the accounting; `coverage` is its published COV_R, None if never evaluated."""

    name: str
    ssm_heads: int
    state_size: int
    kv_heads: int
    coverage: float | None = None

    def bytes(self, tokens: int, *, conv: bool = False) -> int:
        """M(L), with the convolution's inputs where asked for."""
        extra = conv_bytes(self.ssm_heads, self.state_size) if conv else 0
        return extra + formula_bytes(self.ssm_heads, self.state_size, self.kv_heads, tokens)

    @property
    def state_bytes(self) -> int:
        """The part of M that does not grow."""
        return self.bytes(0)

    @property
    def kv_bytes_per_token(self) -> int:
        """The growth of M per token."""
        return self.bytes(1) - self.bytes(0)


def retrieval_aware(
    kept: int, state_size: int, coverage: float | None = None, ssm_heads: int | None = None
) -> Point:
    """Kept heads with keys and values of their own, every other head an SSM of `state_size`."""
    heads = LAYERS * HEADS - kept if ssm_heads is None else ssm_heads
    return Point(f"k={kept}, d_state {state_size}", heads, state_size, kept, coverage)


def layer_wise(layers: int, state_size: int = 64, coverage: float | None = None) -> Point:
    """`layers` whole attention layers with grouped keys and values, SSMs elsewhere."""
    name = f"layer-wise {100 * layers // LAYERS}%, d_state {state_size}"
    return Point(name, (LAYERS - layers) * HEADS, state_size, layers * KV_HEADS, coverage)


TEACHER = Point("Llama-3.2-1B", 0, 64, LAYERS * KV_HEADS, 100.0)
# A.4 counts 492 SSM heads, which are those of k=20
AS_PRINTED = retrieval_aware(10, 8, ssm_heads=492)
# section 5.3: the 50 % baseline is the annealed one; the best of the fixed 25 % ones is given
BASELINES = (layer_wise(4, coverage=98.3), layer_wise(8, coverage=99.7), TEACHER)
# Tables 1 (k, with d_state 64) and 4 (d_state, with k=20)
EVALUATED = (
    retrieval_aware(0, 64, 49.2),
    retrieval_aware(5, 64, 88.3),
    retrieval_aware(10, 64, 95.0),
    retrieval_aware(20, 64, 95.8),
    retrieval_aware(30, 64, 94.3),
    retrieval_aware(40, 64, 95.4),
    retrieval_aware(20, 32, 93.3),
    retrieval_aware(20, 16, 92.1),
    retrieval_aware(20, 8, 90.0),
    retrieval_aware(20, 4, 81.0),
)


@dataclass(frozen=True)
class PrintedRow:
    """A row of the paper's Table 2: MB at 128, 2048 and 4096 tokens, ratios to the first row."""

    point: Point
    megabytes: tuple[float, ...]
    ratios: tuple[float, ...] | None = None

    @property
    def unit(self) -> str:
        """The unit that reproduces every printed cell to its one decimal.

        Raises `ValueError` when none does.
        """
        for unit, scale in (("10^6 bytes", MB), ("KiB / 1000", 1000 * KIB)):
            values = [self.point.bytes(tokens) / scale for tokens in CONTEXTS]
            if [round(value, 1) for value in values] == list(self.megabytes):
                return unit
        raise ValueError(f"{self.point.name}: no unit reproduces {self.megabytes}")


TABLE_2 = (
    PrintedRow(AS_PRINTED, (0.8, 5.7, 11.0)),
    PrintedRow(BASELINES[0], (4.1, 19.5, 35.8), (5.1, 3.4, 3.3)),
    PrintedRow(BASELINES[1], (4.2, 35.7, 69.2), (5.1, 6.2, 6.3)),
    PrintedRow(TEACHER, (4.2, 67.1, 134.2), (5.1, 11.7, 12.2)),
)


def saving(point: Point, baseline: Point, tokens: int) -> float:
    """How many times the memory of `point` the baseline needs."""
    return baseline.bytes(tokens) / point.bytes(tokens)


def kept_heads(point: Point) -> list[list[int]]:
    """The published heads (or evenly spread layers) of a point, per layer."""
    from rad.selection.published import published

    if point in BASELINES:
        whole = point.kv_heads // KV_HEADS
        step = LAYERS // whole
        return [list(range(HEADS)) if layer % step == step - 1 else [] for layer in range(LAYERS)]
    ranked = next(entry for entry in published() if entry.name == "headrank.ra.llama32_1b")
    assert ranked.pairs is not None
    chosen = ranked.pairs[: point.kv_heads]
    return [sorted(head for at, head in chosen if at == layer) for layer in range(LAYERS)]


@dataclass(frozen=True)
class Measured:
    """What a real cache of a point holds: by this package's formula, and summed over tensors."""

    point: Point
    form: str
    tokens: int
    formula: int
    tensors: int


def measured(point: Point, tokens: int, form: str = "slots") -> Measured:
    """The cache of the point's hybrid of Llama-3.2-1B in this package, built on shapes alone.

    `form` as in the mixers' settings: `slots` (an SSM in every slot that is not kept) or `parallel`
    (SSMs of all heads, as in the published code). States are float32, the convolution keeps W - 1
    inputs; the paper's formula has bfloat16 states and no convolution.
    """
    from transformers import LlamaConfig

    from rad.evaluation.shape_run import cache_of_shape, hybrid_config
    from rad.settings import DiscreteMamba2Settings

    config: Any = LlamaConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=4 * HIDDEN,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=True,
    )
    if point.ssm_heads:
        mixer = DiscreteMamba2Settings(state_size=point.state_size, form=form)
        config = hybrid_config(config, kept_heads(point), mixer.model_dump())
    formula, tensors = cache_of_shape(config, tokens)
    return Measured(point, form, tokens, formula.total, tensors)


def package_bytes(ssm_heads: int, state_size: int, kv_heads: int, tokens: int) -> int:
    """What this package's cache holds: M(L) with float32 states, plus W - 1 conv inputs."""
    conv = conv_bytes(ssm_heads, state_size) // CONV_WIDTH * (CONV_WIDTH - 1)
    return formula_bytes(ssm_heads, 2 * state_size, kv_heads, tokens) + conv


def measured_points(
    tokens: int = CONTEXTS[0], forms: Sequence[str] = ("slots", "parallel")
) -> list[Measured]:
    """Every evaluated point, and the baselines, measured."""
    found = [measured(point, tokens, form) for point in EVALUATED for form in forms]
    return found + [measured(point, tokens) for point in BASELINES]
