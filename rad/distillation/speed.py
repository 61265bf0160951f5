"""Precision, peak memory and the arithmetic that a training token costs.

Legend: B batch, T time, E hidden size, L layers.
"""

from __future__ import annotations

import contextlib
import resource
from typing import Any

import torch
from torch import nn

from rad.models.hybrid import HybridAttention


def bfloat16_in_hardware(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones there, not emulated."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported())
    return False


def precision(device: torch.device, autocast: bool) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 autocast where it is wanted and the hardware has it, else nothing."""
    if autocast and bfloat16_in_hardware(device):
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def peak_memory_mib(device: torch.device) -> float:
    """Most memory held so far: of the device's tensors, or of this process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)) / 2**20
    # ru_maxrss is in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def matrix_weights(module: nn.Module) -> int:
    """Weights that multiply every token: all matrices (a depthwise convolution too)."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() >= 2)


def _attention_flops(layer: Any, config: Any, time: int) -> float:
    """Scores and weighted sum of the layer's softmax heads, causal: 2 x T x width per token."""
    attention = layer.self_attn
    heads = config.num_attention_heads
    if isinstance(attention, HybridAttention):
        heads = len(attention.kept)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return float(2 * time * heads * width)


def forward_flops(model: Any, time: int, first_layer: int = 0) -> float:
    """FLOPs per token of a forward pass from a layer on, output head included.

    2 per weight, and the softmax heads'; norms, activations and the recurrences' own arithmetic
    (under 1 % at 8B) are left out.
    """
    layers = list(model.base_model.layers)[first_layer:]
    head = model.get_output_embeddings().weight.numel()
    body = sum(
        2.0 * matrix_weights(layer) + _attention_flops(layer, model.config, time)
        for layer in layers
    )
    return float(body + 2.0 * head)


def training_flops(student: Any, time: int, *, teacher: Any, shared: int) -> float:
    """FLOPs per token of a step of distillation as it is run: T tokens, `shared` layers run once.

    teacher forward (0 when `teacher` is None), student forward above the shared layers, gradients
    of activations from the lowest trained layer up, gradients of the trained weights.
    """
    trained = [p for p in student.parameters() if p.requires_grad]
    layers = list(student.base_model.layers)
    lowest = next(
        (i for i, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())),
        len(layers),
    )
    if student.get_input_embeddings().weight.requires_grad:
        lowest = 0
    total = 0.0 if teacher is None else forward_flops(teacher, time)
    total += forward_flops(student, time, shared) + forward_flops(student, time, lowest)
    return float(total + 2.0 * sum(p.numel() for p in trained if p.dim() >= 2))


def layerwise_flops(student: Any, base: Any, time: int) -> float:
    """FLOPs per token of a layer-wise step: the base without its head, thrice the converted."""
    head = 2.0 * base.get_output_embeddings().weight.numel()
    converted = [
        layer.self_attn
        for layer in student.base_model.layers
        if isinstance(layer.self_attn, HybridAttention)
    ]
    return float(forward_flops(base, time) - head + 6.0 * sum(map(matrix_weights, converted)))
