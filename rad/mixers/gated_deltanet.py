"""Gated DeltaNet (arXiv 2412.06464) as KL-guided selection uses it, its `gdn_v4` (section 4).

    q, k, v = silu(W u)                        D per query head; optional causal conv before silu
    q, k    = q / (|q| sqrt(D)), k / |k|
    beta    = sigmoid(W_b u)                   one per head
    log a   = -exp(A_log) softplus(W_a u + dt_bias)
    S_t     = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T
    out     = RMSNorm_head(S_t q_t) * silu(W_g u)     then the layer's output projection

No RoPE. Every query head has keys and values of its own, repeated from the base's by whole heads
(`kv_expansion: rows_interleaved` repeats rows instead, as the published code does). Legend: B
batch, T time, E hidden size, M owned heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rad import kernels
from rad.mixers.base import Geometry, Part, State, StateSpec, promote, rms_norm
from rad.mixers.recurrent import RecurrentMixer, draw_dt_bias, l2_norm


class GatedDeltaNet(RecurrentMixer):
    """Gated delta rule with L2-normalised queries and keys."""

    op = "gated_delta"
    copies: Mapping[str, str] = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
    gate, value = "g", "v"

    def __init__(self, geometry: Geometry, owned: Sequence[int], settings: Mapping[str, Any]):
        head, one = Part("head", geometry.head_dim), Part("head", 1)
        super().__init__(
            geometry,
            owned,
            settings,
            parts={"q": head, "k": head, "v": head, "g": head, "a": one, "b": one},
            convolved={"q": head, "k": head, "v": head} if settings["conv_size"] else {},
            bias=geometry.bias and settings["qkv_bias"] == "base",
        )
        self.A_log = nn.Parameter(torch.empty(len(self.owned)))
        self.dt_bias = nn.Parameter(torch.empty(len(self.owned)))
        self.norm_weight = nn.Parameter(torch.empty(len(self.owned), geometry.head_dim))
        for name in ("A_log", "dt_bias", "norm_weight"):
            self.layout[name] = [one]

    def forward(
        self,
        u: Tensor,
        state: State | None = None,
        valid: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """u (B,T,E) -> head outputs (B,T,M,D), the ssm (B,M,D,D) and, if any, conv states."""
        heads = (*u.shape[:2], len(self.owned), self.geometry.head_dim)
        state, after = state or {}, {}
        qkv, g, a, b = self.in_proj(u).split([sum(self.sizes[:3]), *self.sizes[3:]], dim=-1)
        if self.convolved:
            qkv, after["conv"] = self.convolve(qkv, state, valid)
        q, k, v = (t.view(heads) for t in F.silu(qkv).split(self.sizes[:3], dim=-1))  # (B,T,M,D)
        q = l2_norm(promote(q)).to(v.dtype) * self.geometry.head_dim**-0.5
        k = l2_norm(promote(k)).to(v.dtype)
        beta = promote(b).sigmoid()  # (B,T,M)
        log_a = -promote(self.A_log).exp() * F.softplus(promote(a) + promote(self.dt_bias))
        if valid is not None:
            beta, log_a = (t * valid.unsqueeze(-1) for t in (beta, log_a))  # the state stays
        y, after["ssm"] = kernels.gated_delta(
            q, k, v, log_a, beta, state.get("ssm"), chunk=self.chunk, kernel=self.kernel
        )
        y = rms_norm(y, self.norm_weight, self.geometry.norm_eps) * F.silu(promote(g.view(heads)))
        return y.to(u.dtype), after

    def state_spec(self, dtype: torch.dtype) -> StateSpec:
        """S per head in float32 and, with a conv, its last W-1 inputs in the model's dtype."""
        dim = self.geometry.head_dim
        spec: StateSpec = {
            "ssm": ((len(self.owned), dim, dim), torch.promote_types(dtype, torch.float32))
        }
        if self.convolved:
            width = int(self.settings["conv_size"])
            spec["conv"] = ((width - 1, self.conv_channels), dtype)
        return spec

    @torch.no_grad()
    def init_random(self, generator: torch.Generator) -> None:
        """Defaults of flash-linear-attention: A in U(a_range), dt log-uniform, norm = 1."""
        super().init_random(generator)
        low, high = self.settings["a_range"]
        # log of an exact zero would be -inf
        self.A_log.uniform_(low, high, generator=generator).clamp_min_(1e-4).log_()
        draw_dt_bias(self.dt_bias, self.settings["dt_range"], generator)
        self.norm_weight.fill_(1.0)
