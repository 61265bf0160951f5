"""Mamba-1 (arXiv 2312.00752) as a stand-in for attention (the Mamba in the Llama, section 3).

    [z | x | B | C] = W_in u                   z, C: D per query head; x, B: D per kv head
    x     = silu(conv(repeat(x)))              repeated over the query group before the conv
    dt    = softplus(W_up W_down u + dt_bias)  one per channel
    A     = -exp(A_log)                        one per channel and state
    S_t   = exp(dt_t A) * S_{t-1} + dt_t x_t B_t^T
    y_t   = S_t C_t + D_skip x_t
    out   = y * silu(z)                        then the layer's output projection; no norm

A head of D channels is cut into D / N blocks of N channels with a state of N each: block i uses the
i-th N rows of B and C of its own head. Legend: B batch, T time, E hidden size, M owned heads, D
head dim, N state dim, J = D / N blocks per head, R rank of dt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rad import kernels
from rad.mixer_settings import MambaSettings
from rad.mixers.base import Geometry, Part, State, StateSpec, promote, take_kv
from rad.mixers.recurrent import RecurrentMixer, draw_dt_bias


class Mamba(RecurrentMixer):
    """Selective state spaces with a decay per channel and state."""

    initialisations = MambaSettings.starts
    refused: Mapping[str, str] = {}
    op = "selective_scan"
    copies: Mapping[str, str] = {"x": "v_proj", "B": "k_proj", "C": "q_proj"}

    def __init__(self, geometry: Geometry, owned: Sequence[int], settings: Mapping[str, Any]):
        dim, size = geometry.head_dim, int(settings["state_size"])
        if dim % size:
            raise ValueError(
                f"mixers: {settings['type']}.state_size {size} does not divide the head dim {dim} "
                "of the base"
            )
        head, kv = Part("head", dim), Part("kv", dim)
        super().__init__(
            geometry,
            owned,
            settings,
            parts={"z": head, "x": kv, "B": kv, "C": head},
            convolved={"x": head},  # after the repetition
            bias=geometry.bias,
        )
        self.state_size = size
        rank = int(settings["dt_rank"] or math.ceil(geometry.hidden_size / 16))
        channels = len(self.owned) * dim
        self.dt_down = nn.Parameter(torch.empty(rank, geometry.hidden_size))
        self.dt_up = nn.Parameter(torch.empty(channels, rank))
        self.dt_bias = nn.Parameter(torch.empty(channels))
        self.D = nn.Parameter(torch.empty(channels))
        self.layout["dt_down"] = [Part("all", rank)]
        for name in ("dt_up", "dt_bias", "D"):
            self.layout[name] = [head]
        self._add_decay(channels)

    def _add_decay(self, channels: int) -> None:
        self.A_log = nn.Parameter(torch.empty(channels, self.state_size))
        self.layout["A_log"] = [Part("head", self.geometry.head_dim)]

    def forward(
        self,
        u: Tensor,
        state: State | None = None,
        valid: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """u (B,T,E) -> head outputs (B,T,M,D), the conv (B,W-1,M*D) and ssm (B,M*J,N,N) states."""
        batch, time, _ = u.shape
        dim, state = self.geometry.head_dim, state or {}
        z, x, b, c = self.in_proj(u).split(self.sizes, dim=-1)
        x, b = (take_kv(t.view(batch, time, -1, dim), 2, self.kv_of) for t in (x, b))  # (B,T,M,D)
        x, conv_state = self.convolve(x.flatten(2), state, valid)
        blocks = (batch, time, -1, self.state_size)
        x = F.silu(x).view(blocks)  # (B,T,M*J,N)
        dt = F.linear(F.linear(u, self.dt_down), self.dt_up)
        dt = (promote(dt) + promote(self.dt_bias)).view(blocks)
        decay, update = self._dynamics(x, dt, b.reshape(blocks), valid)  # (B,T,M*J,N,N) each
        y, ssm_state = kernels.selective_scan(
            decay, update, c.view(blocks), state.get("ssm"), chunk=self.chunk, kernel=self.kernel
        )
        y = y.to(x.dtype) + self.D.view(-1, self.state_size) * x
        y = y.reshape(batch, time, -1, dim) * F.silu(z.view(batch, time, -1, dim))  # (B,T,M,D)
        return y.to(u.dtype), {"conv": conv_state, "ssm": ssm_state}

    def _dynamics(
        self, x: Tensor, dt: Tensor, b: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Decay and update of the state: x, dt, b (B,T,M*J,N) -> (B,T,M*J,N,N) twice."""
        dt = F.softplus(dt)
        if valid is not None:
            dt = dt * valid[..., None, None]  # dt = 0: no decay, no input
        a = -promote(self.A_log).exp().view(-1, self.state_size, self.state_size)
        decay = (dt.unsqueeze(-1) * a).exp()
        return decay, (dt * x).unsqueeze(-1) * promote(b).unsqueeze(-2)

    def state_spec(self, dtype: torch.dtype) -> StateSpec:
        """The last W-1 conv inputs in the model's dtype, S per block in float32."""
        size, width = self.state_size, int(self.settings["conv_size"])
        blocks = len(self.owned) * self.geometry.head_dim // size
        return {
            "conv": ((width - 1, self.conv_channels), dtype),
            "ssm": ((blocks, size, size), torch.promote_types(dtype, torch.float32)),
        }

    @torch.no_grad()
    def init_random(self, generator: torch.Generator) -> None:
        """Defaults of mamba-ssm: A = -1..-N (S4D-real), dt log-uniform in dt_range, D = 1."""
        super().init_random(generator)
        bound = 1 / math.sqrt(self.geometry.hidden_size)
        self.dt_down.uniform_(-bound, bound, generator=generator)
        bound = 1 / math.sqrt(self.dt_up.shape[1])
        self.dt_up.uniform_(-bound, bound, generator=generator)
        draw_dt_bias(self.dt_bias, self.settings["dt_range"], generator)
        self.D.fill_(1.0)
        if hasattr(self, "A_log"):
            steps = torch.arange(1, self.state_size + 1, dtype=torch.float32)
            self.A_log.copy_(steps.log().expand_as(self.A_log))

    def _zero(self, attention: nn.Module) -> None:
        """x and z zero, B and C copied: Mamba-1's "input projection" is of x and z only."""
        self._copy(attention)
        self._clear("x")
        self._clear("z")
