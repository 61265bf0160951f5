"""Start-up self-test of a kernel: values, gradients and final state against the plain recurrence.

A wrong kernel trains without complaint: fla's gated kernels returned wrong gradients on Hopper for
months (fla issues 640, 983). So before training, run what `dispatch` chose at the exact head sizes,
dtype and chunk of the run, on the device of the run, and refuse to go on when it is wrong. About a
second; the record belongs in the run's manifest.

Legend: B batch, T time, H heads, G groups, P value channels per head, N state dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rad.kernels import dispatch
from rad.kernels.dispatch import Form, KernelError

_MOST_HEADS = 4
_BATCH = 2
_DECAYS = ("log_a", "a")

_RUN: dict[str, Form] = {
    "ssd": dispatch.ssd,
    "gated_delta": dispatch.gated_delta,
    "gla": dispatch.gla,
    "selective_scan": dispatch.selective_scan,
}


def threshold(kernel: str, dtype: torch.dtype) -> float:
    """Largest relative error allowed of `kernel` in `dtype`.

    1e-4 for PyTorch in float32 or wider, 1e-3 for Triton (it multiplies float32 in TF32), 2e-2 for
    the 16-bit types, where rounding the outputs alone makes 4e-3.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return 2e-2
    return 1e-4 if kernel == "torch" else 1e-3


def _inputs(
    op: str, time: int, heads: int, groups: int, channels: int, size: int, seed: int
) -> tuple[list[Tensor], Tensor]:
    """Random inputs of `op` in the order of `OPS[op].inputs`, and an initial state, in float32.

    Decays run from nearly 1 to nearly 0, so that slow and fast heads are both covered.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def log_decay(*shape: int) -> Tensor:
        return F.logsigmoid(2.0 * normal(*shape) + 3.0)

    lead = (_BATCH, time)
    state = normal(_BATCH, heads, channels, size)
    if op == "ssd":
        b, c = (normal(*lead, groups, size) * size**-0.5 for _ in range(2))
        return [normal(*lead, heads, channels), log_decay(*lead, heads), b, c], state
    if op == "selective_scan":
        shape = (*lead, heads, channels, size)
        c = normal(*lead, heads, size) * size**-0.5
        return [log_decay(*shape).exp(), normal(*shape), c], state
    # keys of unit length and a scaled query, as the callers make them
    q = normal(*lead, heads, size) * size**-0.5
    k = F.normalize(normal(*lead, heads, size), dim=-1)
    v = normal(*lead, heads, channels)
    if op == "gla":
        return [q, k, v, log_decay(*lead, heads, size)], state
    return [q, k, v, log_decay(*lead, heads), normal(*lead, heads).sigmoid()], state


def _outcome(
    op: str, inputs: list[Tensor], state: Tensor, weights: list[Tensor], chunk: int, kernel: str
) -> dict[str, Tensor]:
    """Values, final state and the gradient of every input for one fixed loss, by name."""
    leaves = [t.detach().clone().requires_grad_() for t in (*inputs, state)]
    y, last = _RUN[op](*leaves, chunk=chunk, kernel=kernel)
    loss = (y.double() * weights[0]).sum() + (last.double() * weights[1]).sum()
    gradients = torch.autograd.grad(loss, leaves)
    names = [f"gradient of {name}" for name in (*dispatch.OPS[op].inputs, "initial state")]
    return {
        "y": y.detach(),
        "final state": last.detach(),
        **dict(zip(names, gradients, strict=True)),
    }


def _error(value: Tensor, truth: Tensor) -> float:
    """max |value - truth| / max |truth|; infinite where the value is not finite."""
    if not bool(value.isfinite().all()):
        return float("inf")
    scale = truth.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return float((value.double() - truth).abs().max() / scale)


def self_test(
    op: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    heads: int,
    groups: int,
    channels: int,
    state_size: int,
    chunk: int,
    kernel: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Run the kernel chosen for `op` and the plain recurrence on the same rounded inputs.

    The sizes are those of the run: `channels` P, `state_size` N, `chunk`; no more than 4 heads are
    run, over 2 chunks and a remainder. `groups` counts for ssd alone. Decays and the state are
    never rounded to 16 bits. The recurrence runs in float64, which no TF32 setting touches. Returns
    a record for the manifest; `require` judges it. Raises KernelError as `dispatch.chosen`, and
    whatever the kernel itself raises.
    """
    device = torch.device(device)
    name = dispatch.chosen(op, device, kernel, dtype=dtype)
    tested_heads = min(heads, _MOST_HEADS)
    # where heads share a group, two groups of two: both the sharing and the indexing are run
    tested_groups = tested_heads if groups == heads else gcd(groups, max(1, tested_heads // 2))
    time = 2 * chunk + max(1, chunk // 3)

    raw, state = _inputs(op, time, tested_heads, tested_groups, channels, state_size, seed)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [
        t.to(device, wide if label in _DECAYS else dtype)
        for label, t in zip(dispatch.OPS[op].inputs, raw, strict=True)
    ]
    state = state.to(device, wide)
    generator = torch.Generator().manual_seed(seed + 1)
    shapes = ((_BATCH, time, tested_heads, channels), tuple(state.shape))
    weights = [torch.randn(shape, generator=generator).double().to(device) for shape in shapes]

    got = _outcome(op, inputs, state, weights, chunk, kernel)
    with dispatch.use_reference():
        exact = [t.double() for t in inputs]
        truth = _outcome(op, exact, state.double(), weights, chunk, kernel)
    errors = {label: _error(got[label], truth[label]) for label in truth}
    limit = threshold(name, dtype)
    return {
        "op": op,
        "kernel": name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "heads": tested_heads,
        "groups": tested_groups if op == "ssd" else None,
        "channels": channels,
        "state_size": state_size,
        "chunk": chunk,
        "time": time,
        "errors": errors,
        "threshold": limit,
        "passed": all(error <= limit for error in errors.values()),
    }


def require(records: Iterable[dict[str, Any]]) -> None:
    """Raise KernelError, one line, for the first record that did not pass."""
    for record in records:
        if record["passed"]:
            continue
        tensor, error = max(record["errors"].items(), key=lambda item: item[1])
        remedy = (
            "set `kernel: torch`"
            if record["kernel"] != "torch"
            else "set another chunk, or float32"
        )
        raise KernelError(
            f"kernel {record['kernel']} computes {record['op']} wrongly on {record['device']} in "
            f"{record['dtype']} (head size {record['channels']}, state size "
            f"{record['state_size']}, chunk {record['chunk']}): relative error {error:.1e} in "
            f"{tensor}, allowed {record['threshold']:.0e}; {remedy}"
        )
