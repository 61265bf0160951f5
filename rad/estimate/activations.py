"""What a layer keeps for its backward pass, and what that pass needs on top: bytes per token.

Every term is a tensor that PyTorch saves, in the order of the code that saves it. Three precisions:
float32, bfloat16, and float32 weights under bfloat16 autocast (residual stream in float32, products
in bfloat16, one cast copy of an input per product). Recurrences run in float32 in all of them.
Legend: E hidden size, H query heads, K kv heads, D head dim, F MLP width, M heads of a mixer, N
state dim, T tokens, Z chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from rad.estimate.flops import chunk_sizes
from rad.estimate.shapes import Layer, dt_rank, kv_slots, state_size

WIDE = 4  # bytes of float32


@dataclass(frozen=True)
class Precision:
    """`dtype` of the weights; `autocast` only means something for float32 weights."""

    dtype: str
    autocast: bool = False

    @property
    def casts(self) -> bool:
        """Whether products work on bfloat16 copies of float32 tensors."""
        return self.autocast and self.dtype == "float32"

    @property
    def product(self) -> int:
        """Bytes of what matrix products read and write."""
        return 2 if self.casts or self.dtype != "float32" else 4

    @property
    def stream(self) -> int:
        """Bytes of the residual stream and of norms' outputs."""
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True)
class Kept:
    """Bytes per token: `mixing` and `mlp` kept for the backward pass, `extra` alive beside them
    while each of the two is run backwards."""

    mixing: float = 0.0
    mlp: float = 0.0
    mixing_extra: float = 0.0
    mlp_extra: float = 0.0

    @property
    def total(self) -> float:
        """What is kept until the layer's turn comes."""
        return self.mixing + self.mlp


@dataclass(frozen=True)
class _Case:
    """A layer in a certain precision, on rows of `time` tokens, and what of it is trained."""

    layer: Layer
    precision: Precision
    time: int
    trained: Callable[[str], bool]

    @property
    def width(self) -> int:
        """M D of the mixer."""
        return len(self.layer.owned) * self.layer.shape.head_dim

    @property
    def states(self) -> float:
        """Bytes of the states that enter each chunk and of the last, per token."""
        assert self.layer.mixer is not None
        _, chunks = chunk_sizes(self.time, int(self.layer.mixer["chunk"]))
        size = self.width * state_size(self.layer.shape, self.layer.mixer)
        return WIDE * size * (chunks + 1) / self.time

    def rows(self, name: str) -> int:
        """Rows of a parameter of the mixer; 0 when it has none of that name."""
        return self.layer.parameters.get(f"self_attn.mixer.{name}", (0,))[0]


def kept(
    layer: Layer,
    precision: Precision,
    time: int,
    trained: Callable[[str], bool],
    input_gradient: bool,
    *,
    mlp: bool = True,
) -> tuple[Kept, bool]:
    """What a layer keeps per token, and whether its output requires a gradient.

    Arguments as of `flops.layer_work`.
    """
    case, s, p = _Case(layer, precision, time, trained), layer.shape, precision.product
    entering = input_gradient or (mlp and trained("input_layernorm.weight"))
    mixing, extra = 0.0, 0.0
    if mlp:
        mixing += _norm(precision, s.hidden, input_gradient, trained("input_layernorm.weight"))
    inside = [name for name in layer.parameters if _inside(name)]
    mixer_runs = entering or any(trained(name) for name in inside if "softmax." not in name)
    soft_runs = entering or any(trained(name) for name in inside if "softmax." in name)
    mixing += _inputs(case, inside)
    if layer.mixer is None:
        if mixer_runs:
            mixing += _attention(case, s.heads, s.kv_heads)
            extra = 3 * p * (s.heads + s.kv_heads) * s.head_dim
        elif trained("self_attn.o_proj.weight"):
            mixing += p * s.heads * s.head_dim
    else:
        if mixer_runs and layer.kind != "skip":
            own, extra = MIXERS[layer.kind](case)
            mixing += own
        if mixer_runs or trained("self_attn.o_proj.weight"):
            mixing += p * case.width  # input of the output projection
        if layer.kept:
            mixing += _hybrid(case, soft_runs, mixer_runs)
    out = input_gradient or mixer_runs or soft_runs
    out |= trained("self_attn.o_proj.weight") or trained("self_attn.adapter.weight")
    after = 0.0
    after_extra = 0.0
    if mlp:
        scale = trained("post_attention_layernorm.weight")
        after += _norm(precision, s.hidden, out, scale)
        names = [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        wide = [trained(name) for name in names]
        copies = sum(wide[:2]) if precision.casts else min(1, sum(wide[:2]))
        after += p * s.hidden * copies
        if out or scale or any(wide[:2]):
            after += 3 * p * s.mlp
            # gradients of the product, of both its factors; the product itself is gone by then
            after_extra = (
                3 * p * s.mlp - (p * s.mlp if wide[2] else 0) + 2 * precision.stream * s.hidden
            )
        if wide[2]:
            after += p * s.mlp
        out = out or scale or any(wide)
    if mlp:
        extra += 2 * precision.stream * s.hidden  # gradients of the residual stream
    return Kept(mixing, after, extra, after_extra), out


def _inside(name: str) -> bool:
    """Whether a parameter works before the output projection."""
    return name.startswith("self_attn.") and not name.startswith(
        ("self_attn.o_proj", "self_attn.adapter", "self_attn.softmax.o_proj")
    )


def _norm(precision: Precision, width: int, gradient: bool, trained: bool) -> float:
    """Input in float32, and the normed one for the weight's gradient."""
    return WIDE * width * gradient + precision.stream * width * trained


def _inputs(case: _Case, inside: list[str]) -> float:
    """The normed input, for the gradients of the projections that read it."""
    names = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "in_proj.weight", "dt_down")
    count = sum(case.trained(name) for name in inside if name.endswith(names))
    copies = count if case.precision.casts else min(1, count)
    return case.precision.product * case.layer.shape.hidden * copies


def _attention(case: _Case, heads: int, kv: int) -> float:
    """Queries, keys, values, output and the scores' sums."""
    shape = case.layer.shape
    kept = case.precision.product * 2 * (heads + kv) * shape.head_dim + WIDE * heads
    if shape.qk_norm:
        kept += (WIDE + case.precision.stream) * (heads + kv) * shape.head_dim
    return kept


def _hybrid(case: _Case, soft_runs: bool, mixer_runs: bool) -> float:
    """Kept heads beside the mixer: their attention, what standardising saves, the joined output."""
    layer, p = case.layer, case.precision.product
    assert layer.mixer is not None
    width, hidden = len(layer.kept) * layer.shape.head_dim, layer.shape.hidden
    found = 0.0
    if soft_runs:
        found += _attention(case, len(layer.kept), len(layer.kept))
    standardise = bool(layer.mixer.get("standardise"))
    if layer.parallel:
        found += p * hidden  # input of the adapter
        return found + p * hidden * standardise * (2 + 2 * soft_runs)
    found += p * width  # the joined output is wider than the mixer's
    if layer.kind == "sliding_window":
        found += p * case.width  # and not its output any more
    if standardise:
        found += (1 + soft_runs) * p * width + case.precision.stream * case.width * mixer_runs
    return found


# --- mixers: (kept, alive beside it in the backward pass), without input and output ----------


def _mamba2(case: _Case) -> tuple[float, float]:
    p, width, heads = case.precision.product, case.width, len(case.layer.owned)
    channels = case.rows("conv_weight")
    found: float = p * case.rows("in_proj.weight")
    found += 2 * p * channels  # input and output of the convolution
    # after silu: a copy of x for every head, or where each has its own all of it
    found += p * (width if case.layer.kv_owned < heads else channels)
    found += 3 * WIDE * width + case.states  # x dt, B, C
    found += WIDE * width + p * width  # y + D x, silu(z)
    found += 2 * WIDE * width  # gated y, normed
    found += 6 * WIDE * heads
    return found, _kernel_grads(case, 3, 4)


def _discrete_mamba2(case: _Case) -> tuple[float, float]:
    assert case.layer.mixer is not None
    p, width, heads = case.precision.product, case.width, len(case.layer.owned)
    channels = case.rows("conv_weight")
    found: float = p * case.rows("in_proj.weight")
    found += 2 * p * channels + WIDE * channels + case.states
    found += WIDE * width + p * width + 3 * WIDE * heads
    return found, _kernel_grads(case, channels / width, 3)


def _gated_deltanet(case: _Case) -> tuple[float, float]:
    p, width, heads = case.precision.product, case.width, len(case.layer.owned)
    narrow = p != WIDE
    found: float = p * case.rows("in_proj.weight")
    found += 2 * p * case.rows("conv_weight")
    # after silu, or q and k widened for their norms
    found += 2 * WIDE * width if narrow else 3 * p * width
    found += 2 * WIDE * width + WIDE * width * narrow  # q, k, v of the kernel
    found += WIDE * width + case.states  # writes
    found += 3 * WIDE * width  # y, normed, weighted
    found += WIDE * width + WIDE * width * narrow  # silu(g), g widened
    found += 8 * WIDE * heads
    return found, _kernel_grads(case, 3, 5)


def _gla(case: _Case) -> tuple[float, float]:
    p, width, heads = case.precision.product, case.width, len(case.layer.owned)
    narrow = p != WIDE
    found: float = p * case.rows("in_proj.weight")
    found += WIDE * width + 2 * WIDE * width * narrow  # q, k, v
    found += 3 * WIDE * width + case.states  # gate, its buffer, log a
    found += 3 * WIDE * width + WIDE * width + WIDE * width * narrow
    found += 2 * WIDE * heads
    return found, _kernel_grads(case, 4, 5)


def _scan(case: _Case, outer: int, wide: int) -> tuple[float, float]:
    """`outer` tensors of M D x N per token, `wide` of M D in float32 beside those of both."""
    layer, p, width = case.layer, case.precision.product, case.width
    assert layer.mixer is not None
    size = width * state_size(layer.shape, layer.mixer)
    found: float = p * case.rows("in_proj.weight") + p * dt_rank(layer)
    found += 3 * p * width  # conv: input, output, after silu
    found += wide * WIDE * width + outer * WIDE * size + case.states
    found += WIDE * width * (p != WIDE)  # C widened
    found += WIDE * width + p * width  # y, silu(z)
    return found, 2 * WIDE * size + 2 * WIDE * width


def _sliding_window(case: _Case) -> tuple[float, float]:
    layer, p, width = case.layer, case.precision.product, case.width
    slots = kv_slots(layer.shape, layer.owned)
    found: float = 3 * p * width  # q, and k, v of every head
    found += WIDE * len(layer.owned) + case.precision.stream * case.time  # the mask
    if slots < len(layer.owned):
        found += 2 * p * slots * layer.shape.head_dim  # what the bounded cache was taken from
    return found, 4 * p * width


def _kernel_grads(case: _Case, inputs: float, gone: int) -> float:
    """Gradients of a recurrence's `inputs` and output, float32, while blocks of rows are joined.

    `gone`: tensors of M D kept for what comes after the recurrence, which are no more by then.
    """
    return max(1 + 2 * inputs - gone, 3) * WIDE * case.width


MIXERS: dict[str, Callable[[_Case], tuple[float, float]]] = {
    "mamba2": _mamba2,
    "discrete_mamba2": _discrete_mamba2,
    "gated_deltanet": _gated_deltanet,
    "gla": _gla,
    # dt before and after softplus, dt x, B; decay, update
    "mamba": lambda case: _scan(case, 2, 4),
    # beta, B, others, total, beta / total, its product with x; numerator, decay, update
    "longhorn": lambda case: _scan(case, 3, 6),
    "sliding_window": _sliding_window,
}
