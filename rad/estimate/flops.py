"""FLOPs of forward passes and training steps, product by product.

Counted are matrix products, convolutions and triangular solves, as `torch.utils.flop_counter` does
once the in-place products and the CPU's attention are registered with it (tests do). Left out, as
there: what is elementwise (norms, activations, RoPE, softmax, optimiser) and so the recurrence of
`mamba` and `longhorn` themselves, about 14 operations per channel, state and token of a step.

The chunked forms are counted as `rad.kernels` computes them on a CPU, Q x Q products recomputed in
the backward pass; packages for CUDA do the same to within a few products of one chunk. All figures
are for one row of T tokens unless said otherwise. Legend: T tokens of a row, E hidden size, H query
heads, D head dim, F MLP width, V vocabulary, M heads of a mixer, N state dim, Q chunk, Z chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rad.estimate.shapes import Layer, Model, state_size

CAUSAL = 0.5  # share of scores that causal attention computes; the counter assumes all of them
ATTENTION_BACKWARD = 2.5  # five products instead of two: scores are computed again


@dataclass(frozen=True)
class Work:
    """FLOPs of a pass forward and of its gradients."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> float:
        """Both."""
        return self.forward + self.backward


# --- what mixes tokens ----------------------------------------------------------------------


def softmax(heads: int, dim: int, time: int, causal: float = CAUSAL) -> Work:
    """Scores and weighted sum of `heads` heads."""
    forward = 4.0 * time * time * heads * dim * causal
    return Work(forward, ATTENTION_BACKWARD * forward)


def chunk_sizes(time: int, chunk: int) -> tuple[int, int]:
    """(Q, Z): equal chunks of at most `chunk` steps."""
    chunks = -(-time // chunk)
    return -(-time // chunks), chunks


def _ssd(layer: Layer, time: int) -> Work:
    assert layer.mixer is not None
    q, z = chunk_sizes(time, int(layer.mixer["chunk"]))
    p, n = layer.shape.head_dim, state_size(layer.shape, layer.mixer)
    forward = z * 2 * q * q * (n + p) + (2 * z - 1) * 2 * q * n * p
    # scores, their gradient and those of b, c and x; states leave and enter, not at the end
    backward = z * 2 * q * q * (3 * n + 2 * p) + (z - 1) * 4 * 2 * q * n * p
    return Work(float(len(layer.owned) * forward), float(len(layer.owned) * backward))


def _gated_delta(layer: Layer, time: int) -> Work:
    assert layer.mixer is not None
    q, z = chunk_sizes(time, int(layer.mixer["chunk"]))
    p = n = layer.shape.head_dim
    solve = q * q * p
    forward = z * (4 * q * q * n + solve + 2 * q * q * p + 2 * q * n * p)
    forward += (z - 1) * 4 * q * n * p
    backward = z * (12 * q * q * n + 6 * q * q * p + solve) + (z - 1) * 16 * q * n * p
    return Work(float(len(layer.owned) * forward), float(len(layer.owned) * backward))


def _gla(layer: Layer, time: int) -> Work:
    assert layer.mixer is not None
    chunk = min(int(layer.mixer["chunk"]), 1 << (time - 1).bit_length())
    q = 1 << (chunk.bit_length() - 1)
    z = -(-time // q)
    p = n = layer.shape.head_dim
    # blocks joined in pairs: n q (q - 1); then within the chunk, from the state, into the state
    forward = z * (n * q * (q - 1) + 2 * q * q * p + 4 * q * n * p)
    return Work(float(len(layer.owned) * forward), float(len(layer.owned) * 3 * forward))


def _selective_scan(layer: Layer, time: int) -> Work:
    assert layer.mixer is not None
    read = (
        2.0 * time * len(layer.owned) * layer.shape.head_dim * state_size(layer.shape, layer.mixer)
    )
    return Work(read, read)


def _longhorn(layer: Layer, time: int) -> Work:
    scan = _selective_scan(layer, time)
    # the sum over the other keys is a product with an N x N matrix
    return Work(2 * scan.forward, 2 * scan.backward)


def _window(layer: Layer, time: int) -> Work:
    # with a mask: every score is computed whatever the window
    return softmax(len(layer.owned), layer.shape.head_dim, time, 1.0)


KERNELS: dict[str, Callable[[Layer, int], Work]] = {
    "mamba2": _ssd,
    "discrete_mamba2": _ssd,
    "gated_deltanet": _gated_delta,
    "gla": _gla,
    "mamba": _selective_scan,
    "longhorn": _longhorn,
    "sliding_window": _window,
    "skip": lambda layer, time: Work(),
}


# --- one layer ------------------------------------------------------------------------------

READS_INPUT = ("q_proj", "k_proj", "v_proj", "in_proj", "dt_down")


def _size(layer: Layer, name: str) -> float:
    return float(math.prod(layer.parameters[name]))


def layer_work(
    layer: Layer,
    time: int,
    trained: Callable[[str], bool],
    input_gradient: bool,
    *,
    causal: float = CAUSAL,
    mlp: bool = True,
) -> tuple[Work, bool]:
    """Work of a layer on one row, and whether its output requires a gradient.

    `trained` tells of the layer's parameter names; `mlp=False` is the attention module alone.
    """
    total = Work()
    entering = input_gradient or (mlp and trained("input_layernorm.weight"))

    def linear(name: str, gradient_in: bool) -> bool:
        nonlocal total
        cost = 2.0 * time * _size(layer, name)
        total += Work(cost, cost * (gradient_in + trained(name)))
        return gradient_in or trained(name) or trained(name.replace(".weight", ".bias"))

    def projections(prefix: str) -> bool:
        active = entering
        for name, size in layer.parameters.items():
            if not name.startswith(prefix) or "softmax." in name.removeprefix(prefix):
                continue
            part = name.removeprefix(prefix).removesuffix(".weight")
            if part in READS_INPUT and len(size) == 2:
                active |= linear(name, entering)
            elif trained(name) and not part.startswith(("o_proj", "adapter")):
                active = True
        return active

    mixing = False
    if layer.mixer is None:
        mixing = projections("self_attn.")
        total = _add(total, softmax(layer.shape.heads, layer.shape.head_dim, time, causal), mixing)
    else:
        mixing = _mixer(layer, time, linear, projections)
        conv = layer.parameters.get("self_attn.mixer.conv_weight")
        if conv is not None:
            # the counter: forward, gradient of the input and of the weight cost the same
            cost = 2.0 * time * math.prod(conv)
            both = mixing + trained("self_attn.mixer.conv_weight")
            total += Work(cost, cost * both)
        total = _add(total, KERNELS[layer.kind](layer, time), mixing)
    out = linear("self_attn.o_proj.weight", mixing)
    if layer.mixer is not None and layer.kept:
        kept = projections("self_attn.softmax.")
        heads = softmax(len(layer.kept), layer.shape.head_dim, time, causal)
        total = _add(total, heads, kept)
        if layer.parallel:
            kept = linear("self_attn.softmax.o_proj.weight", kept)
            # standardised with the mixer's output, whose gradient then passes the adapter too
            kept |= out and bool(layer.mixer.get("standardise"))
            kept = linear("self_attn.adapter.weight", kept)
            out |= kept
        elif kept:
            if not mixing:  # o_proj's input gradient is for the kept heads alone
                total += Work(0.0, 2.0 * time * _size(layer, "self_attn.o_proj.weight"))
            out = True
    out |= input_gradient
    if mlp:
        inside = out or trained("post_attention_layernorm.weight")
        wide = [linear(f"mlp.{name}.weight", inside) for name in ("gate_proj", "up_proj")]
        out |= linear("mlp.down_proj.weight", any(wide))
    return total, out


def _add(total: Work, more: Work, gradients: bool) -> Work:
    return total + (more if gradients else Work(more.forward))


def _mixer(
    layer: Layer,
    time: int,
    linear: Callable[[str, bool], bool],
    projections: Callable[[str], bool],
) -> bool:
    """Products of a mixer's own projections; whether what it computes requires a gradient."""
    if layer.kind == "skip":
        return False
    if layer.kind == "sliding_window":
        return projections("self_attn.mixer.attention.")
    active = projections("self_attn.mixer.")
    for name in ("self_attn.mixer.gate_weight", "self_attn.mixer.dt_up"):
        if name in layer.parameters:
            active |= linear(name, active)
    return active


# --- whole models ---------------------------------------------------------------------------


def forward(
    model: Model, time: int, *, first: int = 0, head: bool = True, causal: float = CAUSAL
) -> float:
    """A forward pass of one row, from layer `first` on; `head`: logits of every position."""
    found: dict[int, float] = {}
    total = 0.0
    for layer in model.layers[first:]:
        if id(layer) not in found:
            found[id(layer)] = layer_work(layer, time, _nothing, False, causal=causal)[0].forward
        total += found[id(layer)]
    return total + (2.0 * time * model.shape.vocabulary * model.shape.hidden if head else 0.0)


def _nothing(name: str) -> bool:
    return False


def decode(model: Model, cached: int) -> float:
    """One token with `cached` before it."""
    return (
        sum(
            2.0 * sum(math.prod(size) for size in layer.parameters.values() if len(size) == 2)
            + 4.0
            * cached
            * (layer.shape.heads if layer.mixer is None else len(layer.kept))
            * layer.shape.head_dim
            for layer in model.layers
        )
        + 2.0 * model.shape.vocabulary * model.shape.hidden
    )


def training(
    model: Model,
    time: int,
    trained: set[str],
    *,
    first: int = 0,
    checkpointing: bool = False,
    causal: float = CAUSAL,
) -> Work:
    """A pass of the student over one row with its gradients, without the head.

    `trained`: names of the parameters; layers before `first` are run elsewhere; `checkpointing`
    runs each layer again, but for its last product, which nothing needs.
    """
    total = Work()
    gradient = "model.embed_tokens.weight" in trained
    known: dict[tuple[int, frozenset[str], bool], tuple[Work, bool]] = {}
    names = trained_by_layer(trained, len(model.layers))
    for index, layer in enumerate(model.layers):
        if index < first:
            continue
        key = (id(layer), names[index], gradient)
        if key not in known:
            known[key] = layer_work(layer, time, names[index].__contains__, gradient, causal=causal)
        work, after = known[key]
        if checkpointing and (after or gradient):
            again = work.forward - 2.0 * time * _size(layer, "mlp.down_proj.weight")
            work = Work(work.forward, work.backward + again)
        total, gradient = total + work, after
    return total


def trained_by_layer(trained: set[str], layers: int) -> list[frozenset[str]]:
    """Trained names inside each layer."""
    found: list[set[str]] = [set() for _ in range(layers)]
    for name in trained:
        parts = name.split(".", 3)
        if parts[:2] == ["model", "layers"]:
            found[int(parts[2])].add(parts[3])
    return [frozenset(names) for names in found]


def chunked_loss(
    student: Model, time: int, *, teacher_hidden: int | None, rows: int, head_trained: bool
) -> Work:
    """Logits and their gradients of one row, a few tokens at a time; all of it in the forward pass.

    `teacher_hidden`: E of a teacher that gives hidden states, None when it gives probabilities or
    there is none. `rows` of the heads are compared.
    """
    product = 2.0 * (time - 1) * rows
    mine = product * student.shape.hidden * (2 + head_trained)
    return Work(mine + (product * teacher_hidden if teacher_hidden else 0.0))


def layerwise(
    student: Model, base: Model, time: int, trained: set[str], unit: str, *, causal: float = CAUSAL
) -> Work:
    """A layer-wise step on one row: the base without its head, every converted layer on its input.

    `unit`: `mixer` or `layer`.
    """
    total = Work(forward(base, time, head=False, causal=causal))
    for layer, names in zip(
        student.layers, trained_by_layer(trained, len(student.layers)), strict=True
    ):
        if layer.mixer is not None:
            work, _ = layer_work(
                layer, time, names.__contains__, False, causal=causal, mlp=unit == "layer"
            )
            total += work
    return total


def orientation(student: Model, base: Model, time: int) -> Work:
    """Matrix orientation on one row: eager attention in the base, T x T mixing matrices."""
    total = Work(forward(base, time, head=False, causal=1.0))
    for layer in student.layers:
        if layer.mixer is None:
            continue
        size = _size(layer, "self_attn.mixer.in_proj.weight")
        n = state_size(layer.shape, layer.mixer)
        scores = 2.0 * time * time * len(layer.owned) * n
        total += Work(2.0 * time * size + scores, 2.0 * time * size + 2 * scores)
    return total


def matching(model: Model, which: str | list[str]) -> set[str]:
    """Names in a trainable set, as `rad.distillation.optimiser.matching`."""
    from fnmatch import fnmatchcase

    names = list(model.parameters)
    chosen: set[str] = set()
    for entry in which if isinstance(which, list) else [which]:
        if entry == "all":
            chosen |= set(names)
        elif entry == "mixers":
            chosen |= model.mixer_names()
        elif entry == "attention":
            chosen |= {name for name in names if ".self_attn." in name}
        else:
            found = {name for name in names if fnmatchcase(name, entry)}
            if not found:
                raise ValueError(f"trainable: no parameter of the student matches {entry!r}")
            chosen |= found
    return chosen


def trainable(model: Model, stage: Mapping[str, object] | object) -> set[str]:
    """What a stage trains, as `rad.distillation.optimiser.set_trainable`."""
    wanted = matching(model, stage.trainable)  # type: ignore[union-attr]
    new = model.mixer_names()
    if stage.loss not in ("align", "orientation"):  # type: ignore[union-attr]
        return wanted
    if stage.loss == "align" and stage.unit == "layer":  # type: ignore[union-attr]
        layers = tuple({name.split(".self_attn.")[0] + "." for name in new})
        return {name for name in wanted if name.startswith(layers)}
    return wanted & new
