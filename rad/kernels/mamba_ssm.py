"""Adapter of the ssd recurrence onto the Triton kernels of the package `mamba_ssm` (Mamba-2).

`mamba_chunk_scan_combined(x', dt, A, b, c)` computes S_t = exp(dt_t A) S_{t-1} + dt_t x'_t b_t^T.
Ours has the decay and the input apart, so A = -1, dt = -log a and x' = x / dt. Two things keep that
division harmless:

- dt may be tiny, or 0 where a = 1. The decay is therefore shifted by d = 1/T at every step, and b
  and c carry the opposite factors exp(-d s) and exp(d t), between 1/e and e: the product is the
  same, and dt >= 1/T.
- The gradient of log a is a difference in which the path through x / dt cancels: its rounding error
  is that of x' times 1/dt. So the kernels get float32 (TF32 tensor cores on CUDA), never bfloat16.

The kernels run under Triton's interpreter on CPU in tests/test_triton_adapter.py, values and
gradients. On a GPU what guards them is the start-up self-test (`rad.kernels.selftest`).
Legend: B batch, T time, H heads, G groups, P value channels per head, N state dim.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import cast

import torch
from torch import Tensor

Scan = Callable[..., tuple[Tensor, Tensor]]


@cache
def _chunk_scan() -> Scan:
    # Release 2.3.2.post1 imports its compiled Mamba-1 extension unconditionally, also where it was
    # installed without compiling (docs/install.md). Only the Triton kernels of Mamba-2 are used
    # here, so an empty module stands in for the extension while the package is imported.
    stub = "selective_scan_cuda"
    absent = importlib.util.find_spec(stub) is None
    if absent:
        sys.modules[stub] = types.ModuleType(stub)
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    finally:
        if absent:
            del sys.modules[stub]
    return cast(Scan, mamba_chunk_scan_combined)


def ssd_mamba_ssm(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """`ssd_chunked` by mamba_ssm: x (B,T,H,P), log_a (B,T,H), b (B,T,G,N), c (B,T,G',N).

    Returns y (B,T,H,P) in the dtype of x and the state (B,H,P,N) in float32. Raises ImportError if
    mamba_ssm or Triton cannot be imported. Source: arXiv 2405.21060, section 6.
    """
    time = x.shape[1]
    wide_x, wide_b, wide_c = x.float(), b.float(), c.float()
    groups = max(b.shape[2], c.shape[2])
    if b.shape[2] != c.shape[2]:  # the kernels want one count; the heads of the smaller one repeat
        wide_b = wide_b.repeat_interleave(groups // b.shape[2], dim=2)  # (B,T,groups,N)
        wide_c = wide_c.repeat_interleave(groups // c.shape[2], dim=2)

    shift = 1.0 / time
    dt = shift - log_a.float()
    turn = torch.arange(1, time + 1, device=x.device, dtype=torch.float32)[:, None, None] * shift
    y, last = _chunk_scan()(
        wide_x / dt.unsqueeze(-1),
        dt,
        torch.full((x.shape[2],), -1.0, device=x.device, dtype=torch.float32),
        wide_b * torch.exp(-turn),
        wide_c * torch.exp(turn),
        chunk_size=chunk,
        initial_states=None if state is None else state.float(),
        dt_softplus=False,
        return_final_states=True,
    )
    # the state has decayed by `shift` once for each of T steps too many
    return y.to(x.dtype), last * torch.e
