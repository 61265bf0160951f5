"""The one place that decides which code computes a recurrence: what the mixers call.

The choice depends on the device type, its compute capability and the `kernel` setting, never on
whether an import happened to succeed:

- CPU and every other device that is not CUDA: our PyTorch forms, whatever `kernel` says (the
  setting names the kernel *on CUDA*).
- CUDA, `kernel: torch`: the same PyTorch forms. `kernel: mamba_ssm` or `fla`: that package.
  `kernel: auto`: the first package of `PREFERENCE` that is installed, else PyTorch. A package that
  is installed but cannot be imported raises its own error.
- Inside `with use_reference():` the plain recurrence, everywhere.

A single token (T = 1) takes the step form, on every device.

Legend: B batch, T time, H heads, G groups, P value channels per head, N state dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from rad.kernels.delta import gated_delta_chunked, gated_delta_recurrent, gated_delta_step
from rad.kernels.gla import gla_chunked, gla_recurrent, gla_step
from rad.kernels.scan import (
    selective_scan_chunked,
    selective_scan_recurrent,
    selective_scan_step,
)
from rad.kernels.ssd import ssd_chunked, ssd_recurrent, ssd_step

KERNELS = ("auto", "torch", "mamba_ssm", "fla")
"""What the `kernel` setting may say."""

Form = Callable[..., tuple[Tensor, Tensor]]
Inputs = tuple[Tensor, ...]


class KernelError(ValueError):
    """A kernel that does not exist, is not installed, or gives wrong numbers."""


@dataclass(frozen=True)
class Op:
    """One recurrence: its PyTorch forms and the adapters onto packages for CUDA."""

    inputs: tuple[str, ...]
    """Names of the tensors, in order; all have time as their second dimension."""
    value: str
    """The input whose dtype the output takes."""
    reference: Form
    chunked: Form
    step: Form
    state_shape: Callable[[Inputs], tuple[int, int, int, int]]
    """(B,H,P,N) from the inputs."""
    cuda: Mapping[str, Callable[[], Form]] = field(default_factory=dict)
    """Package -> loader of its adapter; the import happens when the adapter is first used."""


def _ssd_mamba_ssm() -> Form:
    from rad.kernels.mamba_ssm import ssd_mamba_ssm

    return ssd_mamba_ssm


def _ssd_fla() -> Form:
    from rad.kernels.fla import ssd_fla

    return ssd_fla


def _gated_delta_fla() -> Form:
    from rad.kernels.fla import gated_delta_fla

    return gated_delta_fla


def _gla_fla() -> Form:
    from rad.kernels.fla import gla_fla

    return gla_fla


def _ssd_state(inputs: Inputs) -> tuple[int, int, int, int]:
    x, _, b, _ = inputs
    return x.shape[0], x.shape[2], x.shape[3], b.shape[3]


def _linear_attention_state(inputs: Inputs) -> tuple[int, int, int, int]:
    _, k, v = inputs[:3]
    return v.shape[0], v.shape[2], v.shape[3], k.shape[3]


def _scan_state(inputs: Inputs) -> tuple[int, int, int, int]:
    batch, _, heads, channels, size = inputs[1].shape
    return batch, heads, channels, size


OPS: dict[str, Op] = {
    "ssd": Op(
        inputs=("x", "log_a", "b", "c"),
        value="x",
        reference=ssd_recurrent,
        chunked=ssd_chunked,
        step=ssd_step,
        state_shape=_ssd_state,
        cuda={"mamba_ssm": _ssd_mamba_ssm, "fla": _ssd_fla},
    ),
    "gated_delta": Op(
        inputs=("q", "k", "v", "log_a", "beta"),
        value="v",
        reference=gated_delta_recurrent,
        chunked=gated_delta_chunked,
        step=gated_delta_step,
        state_shape=_linear_attention_state,
        cuda={"fla": _gated_delta_fla},
    ),
    "gla": Op(
        inputs=("q", "k", "v", "log_a"),
        value="v",
        reference=gla_recurrent,
        chunked=gla_chunked,
        step=gla_step,
        state_shape=_linear_attention_state,
        cuda={"fla": _gla_fla},
    ),
    "selective_scan": Op(
        inputs=("a", "u", "c"),
        value="u",
        reference=selective_scan_recurrent,
        chunked=selective_scan_chunked,
        step=selective_scan_step,
        state_shape=_scan_state,
    ),
}

PREFERENCE: dict[str, dict[int, tuple[str, ...]]] = {
    # op -> least major compute capability -> packages in order. Both packages' kernels are written
    # for bfloat16 tensor cores, hence 8 (Ampere) and up. On 9 (Hopper) fla refuses the gradient of
    # ssd and gated_delta under Triton 3.4 to 3.7.0 (a compiler fault); mamba_ssm is not affected.
    "ssd": {8: ("mamba_ssm", "fla")},
    "gated_delta": {8: ("fla",)},
    "gla": {8: ("fla",)},
    "selective_scan": {},
}

_reference: ContextVar[bool] = ContextVar("reference", default=False)


@contextmanager
def use_reference() -> Iterator[None]:
    """Within it, every operation runs its plain recurrence (in the promoted dtype)."""
    token = _reference.set(True)
    try:
        yield
    finally:
        _reference.reset(token)


@cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def chosen(
    op: str,
    device: torch.device | str,
    kernel: str = "auto",
    *,
    dtype: torch.dtype | None = None,
    capability: tuple[int, int] | None = None,
    installed: Collection[str] | None = None,
) -> str:
    """Name of what computes `op` on `device`: `torch`, `mamba_ssm`, `fla` (or `reference`).

    `capability` and `installed` (names of packages) default to what the machine has. Raises
    KernelError if `kernel` is no known name, or on CUDA not made for `op`, its dtype, or absent.
    """
    device = torch.device(device)
    if op not in OPS:
        raise KernelError(f"unknown operation {op!r}: one of {', '.join(OPS)}")
    if kernel not in KERNELS:
        raise KernelError(f"unknown kernel {kernel!r}: one of {', '.join(KERNELS)}")
    # a compiler cannot look into a context variable; it traces the forms that run in earnest
    if not torch.compiler.is_compiling() and _reference.get():
        return "reference"
    if device.type != "cuda" or kernel == "torch":
        return "torch"

    def there(package: str) -> bool:
        return _installed(package) if installed is None else package in installed

    if kernel != "auto":
        if kernel not in OPS[op].cuda:
            names = ", ".join(["auto", "torch", *OPS[op].cuda])
            raise KernelError(f"kernel: {kernel} has no {op}: set one of {names}")
        if dtype == torch.float64:
            raise KernelError(f"kernel: {kernel} has no float64: set `kernel: torch`")
        if not there(kernel):
            raise KernelError(
                f"kernel: {kernel} is not installed: pip install 'radbench[cuda]' as "
                "docs/install.md describes, or set `kernel: torch`"
            )
        return kernel
    if dtype == torch.float64:
        return "torch"
    major, _ = torch.cuda.get_device_capability(device) if capability is None else capability
    levels = [level for level in PREFERENCE[op] if level <= major]
    packages = PREFERENCE[op][max(levels)] if levels else ()
    return next((package for package in packages if there(package)), "torch")


def _run(
    name: str, inputs: Inputs, state: Tensor | None, chunk: int, kernel: str
) -> tuple[Tensor, Tensor]:
    op = OPS[name]
    value = inputs[op.inputs.index(op.value)]
    wide = any(t.dtype == torch.float64 for t in inputs)
    dtype = torch.float64 if wide else torch.float32
    choice = chosen(name, value.device, kernel, dtype=dtype)
    single = value.shape[1] == 1
    if choice in op.cuda and not single:
        return op.cuda[choice]()(*inputs, state, chunk=chunk)

    # matmuls within must not fall back to the autocast dtype: decays and sums need the width
    guard = (
        torch.autocast(value.device.type, enabled=False)
        if torch.is_autocast_enabled(value.device.type)
        else nullcontext()
    )
    with guard:
        promoted = tuple(t.to(dtype) for t in inputs)
        state = None if state is None else state.to(dtype)
        if choice == "reference":
            y, state = op.reference(*promoted, state)
        elif single:
            if state is None:
                state = promoted[0].new_zeros(op.state_shape(promoted))
            y, state = op.step(*(t.squeeze(1) for t in promoted), state)
            y = y.unsqueeze(1)  # (B,1,H,P)
        else:
            y, state = op.chunked(*promoted, state, chunk=chunk)
    return y.to(value.dtype), state


def ssd(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int = 64,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} + x_t b_t^T, y_t = S_t c_t: the recurrence of Mamba-2 (arXiv 2405.21060).

    x (B,T,H,P), log_a (B,T,H), b (B,T,G,N), c (B,T,G',N) -> y (B,T,H,P) in the dtype of x, and the
    state (B,H,P,N) in float32 (float64 if an input is). Raises KernelError, see `chosen`.
    """
    return _run("ssd", (x, log_a, b, c), state, chunk, kernel)


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int = 64,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, y_t = S_t q_t.

    q, k (B,T,H,N), v (B,T,H,P), log_a, beta (B,T,H) -> y (B,T,H,P), state (B,H,P,N). The caller
    normalises k and scales q; dtypes and errors as in `ssd`. Source: arXiv 2412.06464.
    """
    return _run("gated_delta", (q, k, v, log_a, beta), state, chunk, kernel)


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int = 64,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = S_{t-1} diag(a_t) + v_t k_t^T, y_t = S_t q_t: gated linear attention (GLA).

    q, k, log_a (B,T,H,N), v (B,T,H,P) -> y (B,T,H,P), state (B,H,P,N). The caller scales q; dtypes
    and errors as in `ssd`.
    """
    return _run("gla", (q, k, v, log_a), state, chunk, kernel)


def selective_scan(
    a: Tensor,
    u: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int = 64,
    kernel: str = "auto",
) -> tuple[Tensor, Tensor]:
    """S_t = a_t * S_{t-1} + u_t elementwise, y_t = S_t c_t: Mamba-1 (arXiv 2312.00752), Longhorn.

    a, u (B,T,H,P,N) with a in [0, 1], c (B,T,H,N) -> y (B,T,H,P), state (B,H,P,N). Dtypes (u is
    the value) and errors as in `ssd`.
    """
    return _run("selective_scan", (a, u, c), state, chunk, kernel)
