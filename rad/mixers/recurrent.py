"""What the recurrent mixers share: one input projection in named parts, a conv, their starts.

    [part_1 | part_2 | ...] = W_in u          rows of a part belong to query heads or to kv heads

Because every row of every parameter belongs to a head, a kv head or to all, the weights of some
heads can be cut out of a full-layer mixer (`take_heads`), whatever the mixer. Legend: B batch, T
time, E hidden size, M owned heads, K kv heads in use, D head dim, F convolved channels, W width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rad import kernels
from rad.mixer_settings import RecurrentSettings
from rad.mixers.base import Geometry, Mixer, Part, head_rows


class RecurrentMixer(Mixer):
    """Base of the mixers with a fixed-size state.

    A subclass names the parts of its input projection, those that pass the convolution, the part
    that attention's values go to, the gate, and which attention projection starts which part.
    """

    state_names: tuple[str, ...] = ("conv", "ssm")
    initialisations = RecurrentSettings.starts
    refused: Mapping[str, str] = {
        "zero": "value and gate multiply: with both at zero no gradient reaches either, see "
        "docs/models.md"
    }
    op = "ssd"  # of rad.kernels
    copies: Mapping[str, str] = {}
    gate, value = "z", "x"

    def __init__(
        self,
        geometry: Geometry,
        owned: Sequence[int],
        settings: Mapping[str, Any],
        *,
        parts: Mapping[str, Part],
        convolved: Mapping[str, Part],
        bias: bool,
    ) -> None:
        super().__init__(geometry, owned, settings)
        self.parts, self.convolved = dict(parts), dict(convolved)
        self.sizes = [self.rows(part) for part in parts.values()]
        self.in_proj = nn.Linear(geometry.hidden_size, sum(self.sizes), bias=bias)
        # parameter -> its parts, for everything whose rows belong to heads
        self.layout: dict[str, list[Part]] = {
            "in_proj.weight": list(parts.values()),
            "in_proj.bias": list(parts.values()),
        }
        self.chunk = int(settings["chunk"])
        self.kernel = str(settings.get("kernel", "auto"))
        self.conv_weight: nn.Parameter | None = None
        self.conv_bias: nn.Parameter | None = None
        if convolved:
            width, channels = int(settings["conv_size"]), self.conv_channels
            self.conv_weight = nn.Parameter(torch.empty(channels, width))
            self.conv_bias = nn.Parameter(torch.empty(channels))
            for name in ("conv_weight", "conv_bias"):
                self.layout[name] = list(convolved.values())

    # --- shapes ---------------------------------------------------------------------------

    def rows(self, part: Part) -> int:
        """Rows that `part` takes for the heads owned here."""
        count = {"head": len(self.owned), "kv": len(self.kv_owned), "all": 1}[part.owner]
        return count * part.width

    @property
    def conv_channels(self) -> int:
        """F: channels that pass the convolution."""
        return sum(self.rows(part) for part in self.convolved.values())

    def span(self, name: str) -> slice:
        """Rows of the input projection that hold part `name`."""
        index = list(self.parts).index(name)
        start = sum(self.sizes[:index])
        return slice(start, start + self.sizes[index])

    def parameter_parts(self, name: str) -> list[Part]:
        """The parts along the rows of parameter `name`; every parameter has them."""
        return self.layout[name]

    def convolve(
        self, x: Tensor, state: Mapping[str, Tensor], valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The causal convolution: x (B,T,F) -> (B,T,F), new conv state (B,W-1,F)."""
        if valid is not None:
            # a padded token must look like the zero history before the first token
            x = x * valid.unsqueeze(-1)
        assert self.conv_weight is not None
        return kernels.causal_conv(x, self.conv_weight, self.conv_bias, state.get("conv"))

    def kernel_case(self) -> dict[str, Any]:
        """The operation and the sizes it is called with (arguments of `kernels.self_test`)."""
        heads, channels, size = self.state_spec(torch.float32)["ssm"][0]
        return {
            "op": self.op,
            "heads": heads,
            "groups": heads,
            "channels": channels,
            "state_size": size,
            "chunk": self.chunk,
            "kernel": self.kernel,
        }

    # --- starts ---------------------------------------------------------------------------

    @torch.no_grad()
    def init_random(self, generator: torch.Generator) -> None:
        """Uniform in 1/sqrt(fan-in) for the projection and, unless `identity`, the convolution."""
        bound = 1 / math.sqrt(self.geometry.hidden_size)
        self.in_proj.weight.uniform_(-bound, bound, generator=generator)
        if self.in_proj.bias is not None:
            self.in_proj.bias.zero_()
        if self.conv_weight is None or self.conv_bias is None:
            return
        tap = 1 / math.sqrt(self.conv_weight.shape[1])
        if self.settings["conv_init"] == "identity":
            self.conv_weight.zero_()
            self.conv_weight[:, -1] = 1.0
            self.conv_bias.zero_()
        else:
            self.conv_weight.uniform_(-tap, tap, generator=generator)
            self.conv_bias.uniform_(-tap, tap, generator=generator)

    @torch.no_grad()
    def init_from_attention(self, attention: nn.Module, variant: str) -> None:
        """Start from Q, K, V; `gate_zero` and `value_zero` then make the output exactly zero.

        `zero` is RAD's start (section 3.2), for the mixers where a gradient survives it.
        """
        if variant == "random":
            return
        self.check_initialisation(str(self.settings["type"]), variant)
        if variant == "zero":
            self._zero(attention)
            return
        self._copy(attention)
        if variant == "gate_zero":
            self._clear(self.gate)
        elif variant == "value_zero":
            self._clear(self.value)
            self._clear_conv_bias(self.value)

    def _copy(self, attention: nn.Module) -> None:
        """Copy the attention projection of every part that has one, with its bias."""
        for part, name in self.copies.items():
            weight, bias = self.source(attention, name, self.parts[part].owner)
            self._set(part, weight, bias)

    def source(self, attention: nn.Module, name: str, owner: str) -> tuple[Tensor, Tensor | None]:
        """Weight (rows,E) and bias of an attention projection, in the order of the owned heads."""
        projection, dim = getattr(attention, name), self.geometry.head_dim
        if name == "q_proj":
            rows = head_rows(self.owned, dim)
        elif owner == "kv":
            rows = head_rows(self.kv_owned, dim)
        elif self.settings.get("kv_expansion") == "rows_interleaved":
            # as published by KL-guided selection: each row repeated, so heads are scrambled
            rows = head_rows(self.owned, dim) // self.geometry.group
        else:
            rows = head_rows([head // self.geometry.group for head in self.owned], dim)
        bias = None if projection.bias is None else projection.bias[rows]
        return projection.weight[rows], bias

    def _set(self, part: str, weight: Tensor, bias: Tensor | None) -> None:
        span = self.span(part)
        self.in_proj.weight[span] = weight.to(self.in_proj.weight.dtype)
        if self.in_proj.bias is not None:
            self.in_proj.bias[span] = 0 if bias is None else bias.to(self.in_proj.bias.dtype)

    def _zero(self, attention: nn.Module) -> None:
        self.in_proj.weight.zero_()
        if self.in_proj.bias is not None:
            self.in_proj.bias.zero_()

    def _clear(self, part: str) -> None:
        self.in_proj.weight[self.span(part)] = 0
        if self.in_proj.bias is not None:
            self.in_proj.bias[self.span(part)] = 0

    def _clear_conv_bias(self, part: str) -> None:
        if self.conv_bias is None:
            return
        start = 0
        for name, rows in self.convolved.items():
            size = self.rows(rows)
            if name == part:
                self.conv_bias[start : start + size] = 0
            start += size

    @torch.no_grad()
    def take_heads(self, full: Mixer) -> None:
        """Cut the owned heads' rows out of a full-layer mixer (stage-1 alignment)."""
        if type(full) is not type(self) or len(full.owned) != self.geometry.heads:
            raise ValueError(
                f"take_heads needs a {self.settings['type']} mixer of every head of the layer"
            )
        whole = dict(full.named_parameters())
        for name, parameter in self.named_parameters():
            parameter.copy_(whole[name][self._indices(name)])

    def _indices(self, name: str) -> Tensor:
        """Rows of a full-layer parameter that the heads owned here use."""
        found, start = [], 0
        for part in self.parameter_parts(name):
            heads = {
                "head": self.owned,
                "kv": self.kv_owned,
                "all": [0],
            }[part.owner]
            found.append(start + head_rows(heads, part.width))
            count = {"head": self.geometry.heads, "kv": self.geometry.kv_heads, "all": 1}
            start += count[part.owner] * part.width
        return torch.cat(found)


def draw_dt_bias(bias: Tensor, low_high: Sequence[float], generator: torch.Generator) -> None:
    """Fill `bias` so that softplus(bias) is log-uniform in [low, high] (Mamba, section 3.6)."""
    low, high = (math.log(value) for value in low_high)
    dt = bias.uniform_(low, high, generator=generator).exp()
    # inverse of softplus
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))


def l2_norm(t: Tensor, eps: float = 1e-6) -> Tensor:
    """Unit length over the last dimension: t / sqrt(sum t^2 + eps)."""
    return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + eps)
