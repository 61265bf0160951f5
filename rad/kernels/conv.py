"""Causal depthwise convolution with a carried state.

Legend: B batch, T time, E channels, W width. The state holds the last W-1 inputs (B,W-1,E).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_w weight[:, w] x_{t-W+1+w}, one step at a time; x (B,T,E), weight (E,W)."""
    width = weight.shape[1]
    window = state
    outputs = []
    for x_t in x.unbind(1):
        window = torch.cat([window, x_t.unsqueeze(1)], dim=1)  # (B,W,E)
        y = (window * weight.t()).sum(1)
        outputs.append(y if bias is None else y + bias)
        window = window[:, window.shape[1] - (width - 1) :]
    return torch.stack(outputs, dim=1), window


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Equal to the reference, as one grouped convolution: x (B,T,E) -> y (B,T,E), new state."""
    batch, time, channels = x.shape
    width = weight.shape[1]
    if state is None:
        state = x.new_zeros(batch, width - 1, channels)
    if time == 1:
        # the library's convolution costs several times its arithmetic for a single token
        y, state = causal_conv_step(x.squeeze(1), weight, bias, state)
        return y.unsqueeze(1), state
    padded = torch.cat([state, x], dim=1)  # (B,W-1+T,E)
    y = F.conv1d(padded.transpose(1, 2), weight.unsqueeze(1), bias, groups=channels)
    return y.transpose(1, 2), padded[:, time:]


def causal_conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step: x (B,E), weight (E,W), bias (E,), state (B,W-1,E) -> y (B,E), new state."""
    window = torch.cat([state, x.unsqueeze(1)], dim=1)  # (B,W,E)
    y = (window * weight.t()).sum(1)
    return (y if bias is None else y + bias), window[:, 1:]
