"""Discrete Mamba-2 (MOHAWK, arXiv 2408.10189; retrieval-aware distillation, section 4.2).

    [x | B | C | z | alpha] = W_in u           per query head: x, z of D; B, C of N; alpha of 1
    x, B, C = conv(x, B, C)                    causal, depthwise, with bias, no activation
    a_t     = exp(-softplus(alpha_t))          from the input alone: no dt, no A
    S_t     = a_t S_{t-1} + x_t B_t^T          S in R^{D x N}
    y_t     = S_t C_t + D_skip x_t
    out     = y * silu(z)                      then the layer's output projection; no norm

The state size N is free of the head dim. Every query head has B and C of its own: keys and values
of grouped-query attention are repeated by whole heads. Legend: B batch, T time, E hidden size, M
owned heads, D head dim, N state dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rad import kernels
from rad.mixer_settings import DiscreteMamba2Settings
from rad.mixers.base import Geometry, Part, State, StateSpec, promote
from rad.mixers.recurrent import RecurrentMixer

OPEN_GATE = 1.278464542761  # silu of it is 1


class DiscreteMamba2(RecurrentMixer):
    """Multi-head SSD with input-driven decay and a state size of its own."""

    initialisations = DiscreteMamba2Settings.starts
    refused: Mapping[str, str] = {}
    copies: Mapping[str, str] = {"x": "v_proj", "B": "k_proj", "C": "q_proj"}

    def __init__(self, geometry: Geometry, owned: Sequence[int], settings: Mapping[str, Any]):
        dim = geometry.head_dim
        size = int(settings["state_size"] or dim)
        if size > dim:
            raise ValueError(
                f"mixers: discrete_mamba2.state_size {size} is above the head dim {dim} of the "
                f"base; use {dim} or less"
            )
        x, b = Part("head", dim), Part("head", size)
        super().__init__(
            geometry,
            owned,
            settings,
            parts={"x": x, "B": b, "C": b, "z": x, "alpha": Part("head", 1)},
            convolved={"x": x, "B": b, "C": b},
            bias=True,
        )
        self.state_size = size
        self.D = nn.Parameter(torch.empty(len(self.owned)))
        self.layout["D"] = [Part("head", 1)]

    def forward(
        self,
        u: Tensor,
        state: State | None = None,
        valid: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        """u (B,T,E) -> head outputs (B,T,M,D) and the conv (B,W-1,F) and ssm (B,M,D,N) states."""
        heads = (*u.shape[:2], len(self.owned), -1)
        state = state or {}
        xbc, z, alpha = self.in_proj(u).split([self.conv_channels, *self.sizes[3:]], dim=-1)
        xbc, conv_state = self.convolve(xbc, state, valid)
        x, b, c = (t.view(heads) for t in xbc.split(self.sizes[:3], dim=-1))  # (B,T,M,D or N)
        log_a = -F.softplus(promote(alpha))  # (B,T,M)
        if valid is not None:
            log_a = log_a * valid.unsqueeze(-1)  # no decay and, below, no input
            x = x * valid[..., None, None]
        y, ssm_state = kernels.ssd(
            x, log_a, b, c, state.get("ssm"), chunk=self.chunk, kernel=self.kernel
        )
        y = y + self.D.unsqueeze(-1) * x
        y = y * F.silu(z.view(heads))
        return y.to(u.dtype), {"conv": conv_state, "ssm": ssm_state}

    def state_spec(self, dtype: torch.dtype) -> StateSpec:
        """The last W-1 conv inputs in the model's dtype, S per head in float32."""
        dim, width = self.geometry.head_dim, int(self.settings["conv_size"])
        shape = (len(self.owned), dim, self.state_size)
        return {
            "conv": ((width - 1, self.conv_channels), dtype),
            "ssm": (shape, torch.promote_types(dtype, torch.float32)),
        }

    @torch.no_grad()
    def init_random(self, generator: torch.Generator) -> None:
        """alpha bias in `alpha_range`, gate open (silu(z) = 1) or random, D = 1."""
        super().init_random(generator)
        bias = self.in_proj.bias
        assert bias is not None
        bias[self.span("alpha")].uniform_(*self.settings["alpha_range"], generator=generator)
        if self.settings["gate_init"] == "open":
            self._open_gate()
        self.D.fill_(1.0)

    def _open_gate(self) -> None:
        self.in_proj.weight[self.span("z")] = 0
        self.in_proj.bias[self.span("z")] = OPEN_GATE

    def _zero(self, attention: nn.Module) -> None:
        """All of W_in zero, but the gate open: with z = 0 too nothing would get a gradient."""
        self.in_proj.weight.zero_()
        self.in_proj.bias[self.span("x")] = 0
        self._clear_conv_bias("x")
        self._open_gate()

    def _copy(self, attention: nn.Module) -> None:
        """x <- W_V; C, B <- W_Q / sqrt(D), W_K, or their best rank-N product when N < D."""
        dim = self.geometry.head_dim
        self._set("x", *self.source(attention, "v_proj", "head"))
        (q, q_bias), (k, k_bias) = (
            self.source(attention, name, "head") for name in ("q_proj", "k_proj")
        )
        q, q_bias = q / math.sqrt(dim), None if q_bias is None else q_bias / math.sqrt(dim)
        if self.state_size == dim:
            self._set("C", q, q_bias)
            self._set("B", k, k_bias)
            return
        for part, weight in zip(
            "CB", low_rank(q, q_bias, k, k_bias, dim, self.state_size), strict=True
        ):
            self._set(part, weight[:, :-1], weight[:, -1])


def low_rank(
    q: Tensor, q_bias: Tensor | None, k: Tensor, k_bias: Tensor | None, dim: int, size: int
) -> tuple[Tensor, Tensor]:
    """Per head, the rank-`size` factors nearest to W_Q^T W_K in the Frobenius norm.

    q, k (M*D,E) -> (M*N,E+1) each, the bias as last column (the input then ends with a 1).
    """

    def augmented(weight: Tensor, bias: Tensor | None) -> Tensor:
        column = weight.new_zeros(weight.shape[0]) if bias is None else bias
        both = torch.cat([weight, column.unsqueeze(1)], dim=1).double()
        return both.view(-1, dim, both.shape[1]).transpose(1, 2)  # (M,E+1,D)

    # thin QR first: the SVD is then of a D x D matrix instead of an E x E one
    (basis_q, r_q), (basis_k, r_k) = (
        torch.linalg.qr(augmented(weight, bias)) for weight, bias in ((q, q_bias), (k, k_bias))
    )
    left, scale, right = torch.linalg.svd(r_q @ r_k.transpose(1, 2))  # (M,D,D), (M,D), (M,D,D)
    root = scale[:, :size].sqrt().unsqueeze(1)
    c = basis_q @ (left[:, :, :size] * root)  # (M,E+1,N)
    b = basis_k @ (right[:, :size].transpose(1, 2) * root)
    return c.transpose(1, 2).flatten(0, 1), b.transpose(1, 2).flatten(0, 1)  # (M*N,E+1)
