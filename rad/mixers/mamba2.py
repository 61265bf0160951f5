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

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rad.kernels import causal_conv, ssd_chunked
from rad.mixers.base import Geometry, Mixer, State, head_rows, take_kv


class Mamba2(Mixer):
    """Grouped Mamba-2 over the owned query heads."""

    state_names = ("conv", "ssm")
    initialisations = ("qkvo", "zero", "gate_zero", "random", "aligned")

    def __init__(self, geometry: Geometry, owned: Sequence[int], settings: Mapping[str, Any]):
        super().__init__(geometry, owned, settings)
        dim = geometry.head_dim
        self.kv_owned = sorted({head // geometry.group for head in owned})
        place = {kv: index for index, kv in enumerate(self.kv_owned)}
        # which of the kv slots each owned head reads
        self.kv_of = [place[head // geometry.group] for head in owned]
        heads, kv = len(owned), len(self.kv_owned)
        self.sizes = [heads * dim, kv * dim, kv * dim, heads * dim, heads]  # z, x, B, C, dt
        self.in_proj = nn.Linear(geometry.hidden_size, sum(self.sizes), bias=geometry.bias)
        width = int(settings["conv_size"])
        convolved = sum(self.sizes[1:4])
        self.conv_weight = nn.Parameter(torch.empty(convolved, width))
        self.conv_bias = nn.Parameter(torch.empty(convolved))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(heads, dim))

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
        z, xbc, dt = self.in_proj(u).split([self.sizes[0], sum(self.sizes[1:4]), heads], dim=-1)
        if valid is not None:
            # a padded token must look like the zero history before the first token
            xbc = xbc * valid.unsqueeze(-1)
        state = state or {}
        xbc, conv_state = causal_conv(xbc, self.conv_weight, self.conv_bias, state.get("conv"))
        x, b, c = F.silu(xbc).split(self.sizes[1:4], dim=-1)
        x = take_kv(x.view(batch, time, -1, dim), 2, self.kv_of)  # (B,T,M,D)
        b = take_kv(b.view(batch, time, -1, dim), 2, self.kv_of)
        c = c.view(batch, time, heads, dim)
        step = F.softplus(dt.float() + self.dt_bias.float())  # (B,T,M)
        if valid is not None:
            step = step * valid.unsqueeze(-1)  # dt = 0: no decay, no input
        log_a = -self.A_log.float().exp() * step
        y, ssm_state = ssd_chunked(
            (x * step.unsqueeze(-1)).float(),
            log_a,
            b.float(),
            c.float(),
            state.get("ssm"),
            chunk=int(self.settings["chunk"]),
        )
        y = y + self.D.unsqueeze(-1) * x
        y = (y * F.silu(z.view(batch, time, heads, dim))).float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.geometry.norm_eps)
        return (y * self.norm_weight).to(u.dtype), {"conv": conv_state, "ssm": ssm_state}

    @torch.no_grad()
    def init_random(self, generator: torch.Generator) -> None:
        """Defaults of mamba-ssm: A in U(a_range), dt log-uniform in dt_range, D = 1, norm = 1."""
        bound = 1 / math.sqrt(self.geometry.hidden_size)
        self.in_proj.weight.uniform_(-bound, bound, generator=generator)
        if self.in_proj.bias is not None:
            self.in_proj.bias.zero_()
        tap = 1 / math.sqrt(self.conv_weight.shape[1])
        if self.settings["conv_init"] == "identity":
            self.conv_weight.zero_()
            self.conv_weight[:, -1] = 1.0
            self.conv_bias.zero_()
        else:
            self.conv_weight.uniform_(-tap, tap, generator=generator)
            self.conv_bias.uniform_(-tap, tap, generator=generator)
        self.A_log.uniform_(*self.settings["a_range"], generator=generator).log_()
        low, high = (math.log(value) for value in self.settings["dt_range"])
        dt = self.dt_bias.uniform_(low, high, generator=generator).exp()
        # inverse of softplus, so that dt starts in the requested range
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.D.fill_(1.0)
        self.norm_weight.fill_(1.0)

    @torch.no_grad()
    def init_from_attention(self, attention: nn.Module, variant: str) -> None:
        """`qkvo`: x, B, C <- V, K, Q; `gate_zero`: the same with z = 0; `zero`: all of in_proj = 0.

        `zero` and `gate_zero` make the output exactly zero (RAD, section 3.2): the hybrid starts as
        the model with this attention skipped. The conv bias keeps its random start there, or no
        gradient would reach `zero` (see docs/models.md).
        """
        if variant == "random":
            return
        if variant == "zero":
            self.in_proj.weight.zero_()
            if self.in_proj.bias is not None:
                self.in_proj.bias.zero_()
            return
        if variant not in ("qkvo", "gate_zero"):
            raise ValueError(f"mamba2 cannot start from {variant!r}: {self.initialisations}")
        dim = self.geometry.head_dim
        rows_q, rows_kv = head_rows(self.owned, dim), head_rows(self.kv_owned, dim)
        starts = [sum(self.sizes[:index]) for index in range(5)]
        sources = {1: ("v_proj", rows_kv), 2: ("k_proj", rows_kv), 3: ("q_proj", rows_q)}
        for part, (name, rows) in sources.items():
            projection = getattr(attention, name)
            span = slice(starts[part], starts[part] + self.sizes[part])
            self.in_proj.weight[span] = projection.weight[rows]
            if projection.bias is not None and self.in_proj.bias is not None:
                self.in_proj.bias[span] = projection.bias[rows]
        if variant == "gate_zero":
            self.in_proj.weight[: self.sizes[0]].zero_()

    @torch.no_grad()
    def take_heads(self, full: Mixer) -> None:
        """Copy the owned heads' rows from a full-layer mixer (stage-1 alignment)."""
        if not isinstance(full, Mamba2) or len(full.owned) != self.geometry.heads:
            raise ValueError("take_heads needs a mamba2 mixer that owns every head of the layer")
        dim = self.geometry.head_dim
        starts = [sum(full.sizes[:index]) for index in range(5)]
        q_rows, kv_rows = head_rows(self.owned, dim), head_rows(self.kv_owned, dim)
        parts = [q_rows, kv_rows, kv_rows, q_rows, torch.tensor(self.owned)]
        rows = torch.cat([part + start for part, start in zip(parts, starts, strict=True)])
        self.in_proj.weight.copy_(full.in_proj.weight[rows])
        if self.in_proj.bias is not None:
            self.in_proj.bias.copy_(full.in_proj.bias[rows])
        conv_rows = torch.cat(
            [part + start - starts[1] for part, start in zip(parts[1:4], starts[1:4], strict=True)]
        )
        self.conv_weight.copy_(full.conv_weight[conv_rows])
        self.conv_bias.copy_(full.conv_bias[conv_rows])
        for name in ("A_log", "dt_bias", "D", "norm_weight"):
            getattr(self, name).copy_(getattr(full, name)[self.owned])
