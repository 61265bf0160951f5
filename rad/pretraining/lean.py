"""A fast forward pass over the parameters of a Llama model, for training on a CPU.

The library's forward spends most of its time in small element-wise operations at these widths.
This one does the same computation (a test compares the logits) with the projections fused,
the attention written out, and one block function that `torch.compile` compiles once for all
layers and all depths.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Block = Callable[..., Tensor]


def tune_malloc() -> None:
    """Keep freed memory in the process: page faults dominate large temporaries otherwise."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 << 20)):
            libc.mallopt(option, value)
    except (OSError, AttributeError):
        return  # another libc: slower, nothing else


def fast_dtype() -> torch.dtype:
    """bf16 where the processor multiplies it in hardware; elsewhere fp32 is faster."""
    supported = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.bfloat16 if supported() else torch.float32


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    scaled = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return (scaled * weight).to(dtype)


def block(
    stream: Tensor,
    weights: tuple[Tensor, ...],
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    shape: tuple[int, int, int],
    eps: float,
) -> Tensor:
    """One decoder layer: stream (batch, time, width) in fp32 -> the same."""
    norm1, q_weight, k_weight, v_weight, o_weight, norm2, gate, up, down = weights
    heads, kv_heads, size = shape
    dtype = mask.dtype
    batch, time, _ = stream.shape
    split = (heads + kv_heads) * size
    stacked = torch.cat([q_weight, k_weight, v_weight]).to(dtype)
    qkv = F.linear(_norm(stream, norm1, eps, dtype), stacked)
    qk = qkv[..., :split].view(batch, time, heads + kv_heads, size)
    qk = (qk * cos + torch.roll(qk, size // 2, -1) * sin).transpose(1, 2)
    v = qkv[..., split:].view(batch, time, kv_heads, size).transpose(1, 2)
    group = heads // kv_heads
    q = qk[:, :heads].reshape(batch, kv_heads, group * time, size)
    scores = (q @ qk[:, heads:].transpose(-1, -2)) * size**-0.5
    attention = (scores.view(batch, kv_heads, group, time, time) + mask).softmax(-1)
    mixed = attention.view(batch, kv_heads, group * time, time) @ v
    mixed = mixed.view(batch, heads, time, size).transpose(1, 2).reshape(batch, time, heads * size)
    stream = stream + F.linear(mixed, o_weight.to(dtype)).float()
    hidden = _norm(stream, norm2, eps, dtype)
    gated, plain = F.linear(hidden, torch.cat([gate, up]).to(dtype)).chunk(2, -1)
    return stream + F.linear(F.silu(gated) * plain, down.to(dtype)).float()


class LeanForward:
    """Logits of a `LlamaForCausalLM` for full rows: ids (batch, time) -> (batch, time, words)."""

    def __init__(self, dtype: torch.dtype | None = None, compiled: bool = False) -> None:
        self.dtype = fast_dtype() if dtype is None else dtype
        usable = compiled and any(shutil.which(name) for name in ("g++", "clang++", "c++"))
        self.compiled = usable
        self._block: Block = torch.compile(block, dynamic=False) if usable else block
        self._tables: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _table(self, config: Any, time: int) -> tuple[Tensor, Tensor, Tensor]:
        if time not in self._tables:
            size = config.head_dim
            theta = float(config.rope_parameters["rope_theta"])
            inverse = theta ** -(torch.arange(0, size, 2) / size)
            angle = torch.arange(time)[:, None] * inverse
            cos = torch.cat([angle.cos(), angle.cos()], -1)[:, None]
            sin = torch.cat([-angle.sin(), angle.sin()], -1)[:, None]
            mask = torch.full((time, time), float("-inf")).triu(1)
            self._tables[time] = (cos.to(self.dtype), sin.to(self.dtype), mask.to(self.dtype))
        return self._tables[time]

    def __call__(self, model: Any, ids: Tensor) -> Tensor:
        config = model.config
        cos, sin, mask = self._table(config, ids.shape[1])
        shape = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        embedding = model.model.embed_tokens.weight
        stream = F.embedding(ids, embedding)
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            weights = (
                layer.input_layernorm.weight,
                attention.q_proj.weight,
                attention.k_proj.weight,
                attention.v_proj.weight,
                attention.o_proj.weight,
                layer.post_attention_layernorm.weight,
                mlp.gate_proj.weight,
                mlp.up_proj.weight,
                mlp.down_proj.weight,
            )
            stream = self._block(stream, weights, cos, sin, mask, shape, config.rms_norm_eps)
        final = _norm(stream, model.model.norm.weight, config.rms_norm_eps, self.dtype)
        return F.linear(final, embedding.to(self.dtype))
