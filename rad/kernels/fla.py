"""Adapters of three recurrences onto the Triton kernels of the package `fla` (fla-core).

    ssd           chunk_simple_gla         q = c, k = b, v = x, g = log a (one decay per head)
    gated_delta   chunk_gated_delta_rule   as named
    gla           chunk_gla                g = log a (one decay per key channel)

They keep the state as (B,H,N,P), key first: ours is transposed on the way in and out. They scale q
by 1/sqrt(N) unless told not to; the callers scale, hence `scale=1`.

Written against fla-core 0.6.0. These kernels have no way to run without a GPU, so nothing here is
covered by the CPU tests: the start-up self-test (`rad.kernels.selftest`) is what guards them. It
matters on Hopper (H100, H200): Triton 3.4 to 3.7.0 miscompiles the gradient of simple_gla and
gated_delta_rule for key tiles of width 64; fla 0.6.0 raises there, older ones return wrong
gradients without a word (fla issues 640 and 983). A newer Triton, mamba_ssm for ssd, or
`kernel: torch` are the ways out. Legend: B batch, T time, H heads, P value channels, N key dim.
"""

from __future__ import annotations

from torch import Tensor


def _chunk(chunk: int, largest: int) -> int:
    """The largest power of two up to `chunk` that the kernels accept, at least 16."""
    return min(largest, max(16, 1 << (chunk.bit_length() - 1)))


def _per_head(t: Tensor, heads: int) -> Tensor:
    """b or c (B,T,G,N) -> (B,T,H,N): head h reads group h // (H // G)."""
    return t.repeat_interleave(heads // t.shape[2], dim=2)


def _key_first(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.float().transpose(-1, -2).contiguous()  # (B,H,N,P)


def ssd_fla(
    x: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """`ssd_chunked` by fla: x (B,T,H,P), log_a (B,T,H), b (B,T,G,N), c (B,T,G',N).

    Returns y (B,T,H,P) in the dtype of x and the state (B,H,P,N) in float32. Raises ImportError if
    fla or Triton cannot be imported. Source: arXiv 2405.21060 (SSD), 2312.06635 (chunked form).
    """
    from fla.ops.simple_gla import chunk_simple_gla

    heads = x.shape[2]
    y, last = chunk_simple_gla(
        q=_per_head(c, heads).to(x.dtype),
        k=_per_head(b, heads).to(x.dtype),
        v=x,
        g=log_a.float(),
        scale=1.0,
        initial_state=_key_first(state),
        output_final_state=True,
        chunk_size=_chunk(chunk, 64),
    )
    return y.to(x.dtype), last.float().transpose(-1, -2)


def gated_delta_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """`gated_delta_chunked` by fla: q, k (B,T,H,N), v (B,T,H,P), log_a, beta (B,T,H).

    Returns y (B,T,H,P) in the dtype of v and the state (B,H,P,N) in float32. Raises ImportError as
    `ssd_fla`. Source: arXiv 2412.06464.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    y, last = chunk_gated_delta_rule(
        q=q.to(v.dtype),
        k=k.to(v.dtype),
        v=v,
        g=log_a.float(),
        beta=beta.to(v.dtype),
        scale=1.0,
        initial_state=_key_first(state),
        output_final_state=True,
        use_qk_l2norm_in_kernel=False,
        chunk_size=_chunk(chunk, 64),
    )
    return y.to(v.dtype), last.float().transpose(-1, -2)


def gla_fla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_a: Tensor,
    state: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """`gla_chunked` by fla: q, k, log_a (B,T,H,N), v (B,T,H,P); the kernel chooses its own chunk.

    Returns y (B,T,H,P) in the dtype of v and the state (B,H,P,N) in float32. Raises ImportError as
    `ssd_fla`. Source: arXiv 2312.06635.
    """
    from fla.ops.gla import chunk_gla

    y, last = chunk_gla(
        q=q.to(v.dtype),
        k=k.to(v.dtype),
        v=v,
        g=log_a.float(),
        scale=1.0,
        initial_state=_key_first(state),
        output_final_state=True,
    )
    return y.to(v.dtype), last.float().transpose(-1, -2)
