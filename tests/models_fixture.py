"""Small models and mixer settings that several test files build on."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from rad.placement import Placement
from rad.settings import MIXER_SETTINGS

LAYERS, HEADS, KV_HEADS = 3, 4, 2
_CHANGES: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 5, "sinks": 2},
    "skip": {},
    "discrete_mamba2": {"chunk": 8, "state_size": 4},
    "mamba": {"chunk": 8, "state_size": 4},
    "longhorn": {"chunk": 8, "state_size": 4},
}
MIXERS: dict[str, dict[str, Any]] = {
    name: kind(**_CHANGES.get(name, {"chunk": 8})).model_dump()
    for name, kind in MIXER_SETTINGS.items()
}
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FAMILIES: dict[str, Any] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
}


def base_model(family: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A small random base; weights are large enough that attention matters."""
    config_class, model_class, extra = _FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SHAPE, **extra, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def placement(kind: str) -> Placement:
    """`none`, `all`, `layer` (one whole layer), `heads` (single heads of two layers) or `mixed`."""
    every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    chosen = {
        "none": [],
        "all": every,
        "layer": [(1, head) for head in range(HEADS)],
        "heads": [(0, 2), (2, 0), (2, 3)],
        "mixed": [(0, head) for head in range(HEADS)] + [(1, 3)],
    }[kind]
    return Placement(
        base="base", layers=LAYERS, heads=HEADS, kv_heads=KV_HEADS, softmax=chosen, selector="test"
    )


def tokens(rows: int = 2, length: int = 21, seed: int = 1) -> torch.Tensor:
    """Random tokens without specials, (rows, length)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 96, (rows, length), generator=generator)
