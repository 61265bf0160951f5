"""Peak memory of one step on one GPU: what is there throughout, and the worst moment of the step.

    load       the models, whole (one process; several cut them group by group as they come)
    measure    forward on held-out rows, without gradients, and logits of a few tokens
    loss       activations of all layers, logits of a chunk, the head's gradient
    backward   layer by layer from the last: activations go, gradients come
    optimiser  weights, gradients and moments

The peak is the largest of these; its parts are weights, gradients, optimiser, activations, logits
and teacher (a live teacher, the base that the student is measured against, and what both have
said). AdamW keeps two moments in the weights' dtype, fused, without temporaries.
Legend: E hidden size, F MLP width, V vocabulary, T tokens of a row, R rows of a micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from functools import cached_property

from rad.estimate.activations import WIDE, Kept, Precision, kept
from rad.estimate.flops import trained_by_layer
from rad.estimate.shapes import BYTES, Layer, Model, item_bytes

# elements of a chunk's logits, as `rad.distillation.chunked` has them
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
# as `rad.distillation.measure`: rows, rows and tokens of a forward pass, tokens of a chunk
MEASURE_ROWS, MEASURE_BATCH, MEASURE_FORWARD, MEASURE_TOKENS = 64, 32, 2**15, 1024
# logits of a chunk held at once in a loss: both models' and both distributions; a stored teacher
# has none; and what the other divergences add
DENSE_COPIES, SPARSE_COPIES = 4, 3
MORE_COPIES = {"forward_kl": 0, "ce_teacher": 0, "reverse_kl": 1, "jsd": 3}
MEASURE_COPIES = 6


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU at the worst moment, which `phase` names."""

    weights: float = 0.0
    gradients: float = 0.0
    optimiser: float = 0.0
    activations: float = 0.0
    logits: float = 0.0
    teacher: float = 0.0
    phase: str = ""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Name -> bytes."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "phase"}


@dataclass(frozen=True)
class Step:
    """What decides the memory of a training step.

    `rows` of a micro-batch on this GPU; `trained`: parameter names; `teacher`: a live one other
    than the base; `stored`: the teacher's outputs are read from disk; `first`: layers run once for
    base and student; `gpus` that share weights (FSDP2).
    """

    student: Model
    base: Model
    trained: frozenset[str]
    rows: int
    time: int
    precision: Precision
    loss: str = "kl"
    unit: str = "mixer"
    divergence: str = "forward_kl"
    both_losses: bool = False
    teacher: Model | None = None
    teacher_dtype: str = "float32"
    stored: bool = False
    first: int = 0
    accumulated: bool = False
    checkpointing: bool = False
    measured: bool = True
    measured_rows: int = MEASURE_ROWS
    gpus: int = 1
    device: str = "cuda"
    ever_trained: frozenset[str] = field(default_factory=frozenset)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on this GPU."""
        return self.rows * self.time

    @cached_property
    def throughout(self) -> Memory:
        """What is there at every moment once training has begun."""
        return Memory(
            weights=own_weights(self) + _whole(self),
            optimiser=2 * _bytes(self, self.trained) / self.gpus,
            teacher=_others(self) + _held(self),
        )

    @property
    def layerwise(self) -> bool:
        """Whether layers learn one by one."""
        return self.loss in ("align", "orientation")


def peak(step: Step) -> Memory:
    """The worst moment of the step."""
    return max(moments(step), key=lambda moment: moment.total)


def moments(step: Step) -> list[Memory]:
    """The candidates for the worst moment."""
    found = [_load(step)] if step.gpus == 1 else []
    if step.measured and not step.layerwise:
        found.append(_measure(step))
    found += _layerwise(step) if step.layerwise else _step(step)
    return found


# --- what is there throughout ---------------------------------------------------------------


def _bytes(step: Step, names: set[str] | frozenset[str] | None = None) -> float:
    """Bytes of the student's parameters, or of those named."""
    wanted = None if names is None else set(names)
    return float(step.student.weight_bytes(step.precision.dtype, wanted))


def own_weights(step: Step) -> float:
    """Bytes of the student's weights that are not the base's own tensors."""
    if step.gpus > 1:
        return _bytes(step) / step.gpus
    theirs = step.base.parameters
    shared = {
        name
        for name, size in step.student.parameters.items()
        if name not in step.trained
        and theirs.get(name) == size
        # an output projection that was trained before is no longer the base's
        and name not in step.ever_trained
    }
    return _bytes(step) - _bytes(step, shared)


def _others(step: Step) -> float:
    """Bytes of the base and of a live teacher."""
    total = float(step.base.weight_bytes(step.precision.dtype))
    if step.teacher is not None:
        total += step.teacher.weight_bytes(step.teacher_dtype)
    return total / step.gpus


def _held(step: Step) -> float:
    """Bytes of the held-out hidden states of base and teacher, kept for the whole job.

    With several GPUs their heads too, whole.
    """
    if not step.measured or step.layerwise:
        return 0.0
    models = [(step.base, step.precision.dtype)]
    if step.teacher is not None:
        models.append((step.teacher, step.teacher_dtype))
    total = 0.0
    for model, dtype in models:
        s = model.shape
        head = s.vocabulary * (step.gpus > 1)
        total += (step.measured_rows * step.time + head) * s.hidden * BYTES[dtype]
    return total


def host(step: Step) -> float:
    """Bytes that all processes of a job together load to the machine's own memory, at most."""
    models = _bytes(step) + step.base.weight_bytes(step.precision.dtype)
    if step.teacher is not None:
        models += step.teacher.weight_bytes(step.teacher_dtype)
    return step.gpus * models


def _static(
    step: Step,
    phase: str,
    *,
    gradients: float = 0.0,
    activations: float = 0.0,
    logits: float = 0.0,
) -> Memory:
    """Weights, moments, base and teacher, with what a moment adds."""
    more = {"gradients": gradients, "activations": activations, "logits": logits}
    return replace(step.throughout, phase=phase, **more)


def _whole(step: Step) -> float:
    """With several GPUs: what is whole on each while it is computed.

    Embeddings, norm and head of student, base and teacher for the whole step; two layers of the
    largest model (one computed, one on its way) and the trained gradients of one.
    """
    if step.gpus == 1:
        return 0.0
    total = 0.0
    models = [(step.student, step.precision.dtype), (step.base, step.precision.dtype)]
    if step.teacher is not None:
        models.append((step.teacher, step.teacher_dtype))
    widest = 0.0
    for model, dtype in models:
        for name, size in model.parameters.items():
            if not name.startswith("model.layers."):
                total += math.prod(size) * BYTES[dtype]
        hybrid = model.mixer is not None
        for layer in {id(each): each for each in model.layers}.values():
            widest = max(widest, _layer_bytes(layer, dtype, hybrid))
    return total + 2 * widest


def _layer_bytes(layer: Layer, dtype: str, hybrid: bool) -> float:
    return float(
        sum(math.prod(n) * item_bytes(k, dtype, hybrid) for k, n in layer.parameters.items())
    )


# --- moments --------------------------------------------------------------------------------


def _load(step: Step) -> Memory:
    """One process, before anything is shared: the models whole."""
    teacher = float(step.base.weight_bytes(step.precision.dtype))
    if step.teacher is not None:
        teacher += step.teacher.weight_bytes(step.teacher_dtype)
    return Memory(weights=_bytes(step), teacher=teacher, phase="load")


def _measure(step: Step) -> Memory:
    """A forward pass over held-out rows: the widest part of a layer, then logits of a chunk."""
    s, width = step.student.shape, BYTES[step.precision.dtype]
    rows = max(1, min(MEASURE_BATCH, step.measured_rows, MEASURE_FORWARD // step.time))
    tokens = rows * step.time
    forward = tokens * (3 * width * s.hidden + 3 * width * s.mlp)
    chunk = min(MEASURE_TOKENS, _chunk(step), tokens)
    logits = MEASURE_COPIES * WIDE * chunk * s.vocabulary
    if forward > logits + tokens * width * s.hidden:
        return _static(step, "measure", activations=forward)
    return _static(step, "measure", activations=tokens * width * s.hidden, logits=logits)


def _chunk(step: Step) -> int:
    """Tokens whose logits exist at a time."""
    return max(16, CHUNK_ELEMENTS[step.device] // step.student.shape.vocabulary)


def _head(step: Step) -> str:
    return "model.embed_tokens.weight" if step.student.shape.tied else "lm_head.weight"


def _loss_memory(step: Step) -> float:
    """Logits of a chunk, gradients of hidden states and head, the hidden states themselves."""
    s, p = step.student.shape, step.precision.product
    chunk = min(_chunk(step), step.rows * (step.time - 1))
    taught = step.loss == "kl"
    copies: float = 2  # of cross entropy alone
    if taught:
        copies = SPARSE_COPIES if step.stored else DENSE_COPIES + MORE_COPIES[step.divergence]
    logits = copies * WIDE * chunk * s.vocabulary
    head = s.vocabulary * s.hidden
    heads = 1 + (taught and not step.stored)
    if step.precision.casts:
        logits += heads * 2 * head  # heads cast once, before the chunks
    losses = 1 + step.both_losses
    kept_gradients = losses * (
        WIDE * head * (_head(step) in step.trained) + p * step.tokens * s.hidden
    )
    # hidden states of student and teacher, and copies without the last position
    states = 2 * step.tokens * s.hidden * p
    if taught:
        other = step.teacher.shape.hidden if step.teacher is not None else s.hidden
        states += (1 + (not step.stored)) * step.tokens * other * p
    return logits + kept_gradients + states


def _layers(step: Step) -> list[tuple[Kept, float, float]]:
    """What each layer keeps, and bytes of the gradients of its mixing part and of its MLP."""
    names = trained_by_layer(set(step.trained), len(step.student.layers))
    gradient = "model.embed_tokens.weight" in step.trained
    found: list[tuple[Kept, float, float]] = []
    known: dict[tuple[int, frozenset[str], bool], tuple[Kept, bool]] = {}
    for index, layer in enumerate(step.student.layers):
        if index < step.first:
            found.append((Kept(), 0.0, 0.0))
            continue
        key = (id(layer), names[index], gradient)
        if key not in known:
            known[key] = kept(layer, step.precision, step.time, names[index].__contains__, gradient)
        each, gradient = known[key]
        grads = {"mlp": 0.0, "other": 0.0}
        for name, size in layer.parameters.items():
            if name in names[index]:
                part = "mlp" if name.startswith("mlp.") else "other"
                grads[part] += math.prod(size) * item_bytes(name, step.precision.dtype, True)
        if step.precision.casts and each.total:
            # bfloat16 copies of the weights are kept for the gradients of the inputs
            copies = sum(2 * math.prod(n) for n in layer.parameters.values() if len(n) == 2)
            more = copies / step.tokens
            each = Kept(each.mixing + more, each.mlp, each.mixing_extra, each.mlp_extra)
        found.append((each, grads["other"], grads["mlp"]))
    return found


def _step(step: Step) -> list[Memory]:
    """Loss, backward pass layer by layer, optimiser."""
    s, tokens = step.student.shape, step.tokens
    layers = _layers(step)
    last = float(tokens * s.hidden)
    norm = last * (WIDE + step.precision.stream * ("model.norm.weight" in step.trained))
    kept_of = [tokens * each.total for each, _, _ in layers]
    if step.checkpointing:
        width = step.precision.stream
        kept_of = [last * width if value else 0.0 for value in kept_of]
    activations = sum(kept_of) + norm
    earlier = _bytes(step, step.trained) / step.gpus if step.accumulated else 0.0
    at_loss = _loss_memory(step)
    found = [_static(step, "loss", activations=activations, logits=at_loss, gradients=earlier)]
    # gradients that exist before the layers': of norm and head, in float32 until they are used
    trained = set(step.trained)
    done = _bytes(step, {_head(step)} & trained) / step.gpus
    head = _bytes(step, {_head(step)} & trained) if s.tied else 0.0
    below = sum(kept_of)
    for index in reversed(range(len(layers))):
        each, mixing, mlp = layers[index]
        below -= kept_of[index]
        if not each.total:
            continue
        # the last product's gradient comes while all is there, the others as the rest goes
        stages = [
            (each.total + each.mlp_extra, mlp / 3),
            (each.mixing + each.mixing_extra, mlp + mixing / 2),
            (0.0, mlp + mixing),
        ]
        for part, grads in stages:
            gradients = max(earlier, done + head + grads / step.gpus)
            here = below + tokens * part
            found.append(_static(step, "backward", activations=here, gradients=gradients))
        done += (mlp + mixing) / step.gpus
    everything = _bytes(step, step.trained) / step.gpus
    # a tied embedding has two gradients, which are added
    embedding = "model.embed_tokens.weight"
    twice = _bytes(step, {embedding} & trained) * (1 + s.tied) if embedding in trained else 0.0
    found.append(_static(step, "optimiser", gradients=everything + twice))
    return found


def _layerwise(step: Step) -> list[Memory]:
    """Base layer and student layer one after the other; gradients of all layers stay."""
    names = trained_by_layer(set(step.trained), len(step.student.layers))
    s, tokens = step.student.shape, step.tokens
    width = step.precision.stream
    everything = _bytes(step, step.trained) / step.gpus
    # the base's own forward: input, attention's output, the layer's output
    base = tokens * 3 * width * s.hidden
    worst = 0.0
    for layer, trained in zip(step.student.layers, names, strict=True):
        if layer.mixer is None:
            continue
        each, _ = kept(
            layer, step.precision, step.time, trained.__contains__, False, mlp=step.unit == "layer"
        )
        loss = 3 * WIDE * s.hidden  # the output, its difference and the square of that
        part = max(each.total + max(each.mlp_extra, loss), each.mixing + each.mixing_extra)
        matrices = 0.0
        if step.loss == "orientation":
            # attention's weights of all heads, the mixer's matrix and what it was made of
            matrices = WIDE * step.time * (s.heads + 6 * len(layer.owned))
        worst = max(worst, tokens * (part + matrices))
    widest = tokens * 3 * step.precision.product * s.mlp
    return [_static(step, "backward", activations=base + max(worst, widest), gradients=everything)]
