"""Gated linear attention (arXiv 2312.06635) as KL-guided selection uses it, its `gla_v1`.

    q, k, v = W u                              D per query head; no conv, no feature map
    log a   = logsigmoid(W_up W_down u + b) / 16      one per key channel, W_down of rank 16
    S_t     = S_{t-1} diag(a_t) + v_t k_t^T
    out     = RMSNorm_head(S_t q_t / sqrt(D)) * silu(W_g u)   then the layer's output projection

Every query head has keys and values of its own, repeated from the base's by whole heads. Legend: B
batch, T time, E hidden size, M owned heads, D head dim, R gate rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rad import kernels
from rad.mixers.base import Geometry, Part, State, StateSpec, promote, rms_norm
from rad.mixers.recurrent import RecurrentMixer


class GLA(RecurrentMixer):
    """Linear attention with a data-dependent decay per key channel."""

    state_names = ("ssm",)
    op = "gla"
    copies: Mapping[str, str] = {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
    gate, value = "g", "v"

    def __init__(self, geometry: Geometry, owned: Sequence[int], settings: Mapping[str, Any]):
        dim, rank = geometry.head_dim, int(settings["gate_rank"])
        head = Part("head", dim)
        super().__init__(
            geometry,
            owned,
            settings,
            # the low-rank gate's first half is shared by all heads
            parts={"q": head, "k": head, "v": head, "g": head, "a": Part("all", rank)},
            convolved={},
            bias=geometry.bias and settings["qkv_bias"] == "base",
        )
        self.gate_weight = nn.Parameter(torch.empty(len(self.owned) * dim, rank))
        self.gate_bias = nn.Parameter(torch.empty(len(self.owned) * dim))
        self.norm_weight = nn.Parameter(torch.empty(len(self.owned), dim))
        self.layout["gate_weight"] = self.layout["gate_bias"] = [head]
        self.layout["norm_weight"] = [Part("head", 1)]

    def forward(
        self,
        u: Tensor,
        state: State | None = None,
        valid: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """u (B,T,E) -> head outputs (B,T,M,D) and the ssm state (B,M,D,D)."""
        heads = (*u.shape[:2], len(self.owned), self.geometry.head_dim)
        q, k, v, g, low = self.in_proj(u).split(self.sizes, dim=-1)
        q, k, v, g = (t.view(heads) for t in (q, k, v, g))  # (B,T,M,D)
        gate = F.linear(low, self.gate_weight, self.gate_bias).view(heads)
        log_a = F.logsigmoid(promote(gate)) / float(self.settings["gate_scale"])  # (B,T,M,D)
        if valid is not None:
            log_a, v = (t * valid[..., None, None] for t in (log_a, v))  # the state stays
        y, ssm_state = kernels.gla(
            q * self.geometry.head_dim**-0.5,
            k,
            v,
            log_a,
            (state or {}).get("ssm"),
            chunk=self.chunk,
            kernel=self.kernel,
        )
        y = rms_norm(y, self.norm_weight, self.geometry.norm_eps) * F.silu(promote(g))
        return y.to(u.dtype), {"ssm": ssm_state}

    def state_spec(self, dtype: torch.dtype) -> StateSpec:
        """S per head in float32."""
        dim = self.geometry.head_dim
        return {"ssm": ((len(self.owned), dim, dim), torch.promote_types(dtype, torch.float32))}

    @torch.no_grad()
    def init_random(self, generator: torch.Generator) -> None:
        """Uniform in 1/sqrt(fan-in) for the gate's second half, its bias zero, norm = 1."""
        super().init_random(generator)
        bound = 1 / math.sqrt(self.gate_weight.shape[1])
        self.gate_weight.uniform_(-bound, bound, generator=generator)
        self.gate_bias.zero_()
        self.norm_weight.fill_(1.0)
