"""Mamba-2 as a stand-in for grouped-query attention (the Mamba in the Llama, arXiv 2408.15237).

    [z | x | B | C | dt] = W_in u              z, C: one D-wide slot per query head
                                               x, B: one per kv head, shared by its query heads
    x, B, C = silu(conv(x, B, C))              causal, depthwise, with bias
    dt      = softplus(dt + dt_bias)           a = exp(-exp(A_log) dt)
    S_t     = a_t S_{t-1} + dt_t x_t B_t^T     N = P = D
    y_t     = S_t C_t + D_skip x_t
    out     = RMSNorm_head(y * silu(z))        then the layer's output projection

Weights start as x <- W_V, B <- W_K, C <- W_Q (linear attention without softmax); RoPE has no
counterpart. Legend: B batch, T time, E hidden size, M owned heads, K kv heads in use, D head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rad import kernels
from rad.mixer_settings import Mamba2Settings
from rad.mixers.base import Geometry, Part, State, StateSpec, promote, rms_norm, take_kv
from rad.mixers.recurrent import RecurrentMixer, draw_dt_bias


class Mamba2(RecurrentMixer):
    """Grouped Mamba-2 over the owned query heads."""

    initialisations = Mamba2Settings.starts
    refused: Mapping[str, str] = {}
    copies: Mapping[str, str] = {"x": "v_proj", "B": "k_proj", "C": "q_proj"}

    def __init__(self, geometry: Geometry, owned: Sequence[int], settings: Mapping[str, Any]):
        dim = geometry.head_dim
        head, kv = Part("head", dim), Part("kv", dim)
        super().__init__(
            geometry,
            owned,
            settings,
            parts={"z": head, "x": kv, "B": kv, "C": head, "dt": Part("head", 1)},
            convolved={"x": kv, "B": kv, "C": head},
            bias=geometry.bias,
        )
        heads = len(self.owned)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(heads, dim))
        for name in ("A_log", "dt_bias", "D", "norm_weight"):
            self.layout[name] = [Part("head", 1)]

    def forward(
        self,
        u: Tensor,
        state: State | None = None,
        valid: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """u (B,T,E) -> head outputs (B,T,M,D) and the conv (B,W-1,F) and ssm (B,M,D,D) states."""
        batch, time, _ = u.shape
        dim, heads = self.geometry.head_dim, len(self.owned)
        state = state or {}
        z, xbc, dt = self.in_proj(u).split([self.sizes[0], self.conv_channels, heads], dim=-1)
        xbc, conv_state = self.convolve(xbc, state, valid)
        x, b, c = F.silu(xbc).split(self.sizes[1:4], dim=-1)
        x = take_kv(x.view(batch, time, -1, dim), 2, self.kv_of)  # (B,T,M,D)
        b = take_kv(b.view(batch, time, -1, dim), 2, self.kv_of)
        c = c.view(batch, time, heads, dim)
        step = F.softplus(promote(dt) + promote(self.dt_bias))  # (B,T,M)
        if valid is not None:
            step = step * valid.unsqueeze(-1)  # dt = 0: no decay, no input
        log_a = -promote(self.A_log).exp() * step
        y, ssm_state = kernels.ssd(
            (x * step.unsqueeze(-1)).to(x.dtype),
            log_a,
            b,
            c,
            state.get("ssm"),
            chunk=self.chunk,
            kernel=self.kernel,
        )
        y = y + self.D.unsqueeze(-1) * x
        y = y * F.silu(z.view(batch, time, heads, dim))
        y = rms_norm(y, self.norm_weight, self.geometry.norm_eps)
        return y.to(u.dtype), {"conv": conv_state, "ssm": ssm_state}

    def state_spec(self, dtype: torch.dtype) -> StateSpec:
        """The last W-1 conv inputs in the model's dtype, S per head in float32."""
        dim, width = self.geometry.head_dim, int(self.settings["conv_size"])
        return {
            "conv": ((width - 1, self.conv_channels), dtype),
            "ssm": ((len(self.owned), dim, dim), torch.promote_types(dtype, torch.float32)),
        }

    @torch.no_grad()
    def init_random(self, generator: torch.Generator) -> None:
        """Defaults of mamba-ssm: A in U(a_range), dt log-uniform in dt_range, D = 1, norm = 1."""
        super().init_random(generator)
        self.A_log.uniform_(*self.settings["a_range"], generator=generator).log_()
        draw_dt_bias(self.dt_bias, self.settings["dt_range"], generator)
        self.D.fill_(1.0)
        self.norm_weight.fill_(1.0)
