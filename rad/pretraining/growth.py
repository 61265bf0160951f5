"""Deeper models from shallower ones: inserted layers whose outputs start at zero."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def new_model(
    *, layers: int, width: int, heads: int, kv_heads: int, head_dim: int, mlp: int, seed: int
) -> Any:
    """A fresh nano Llama with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        rms_norm_eps=1e-5,
    )
    return LlamaForCausalLM(config).float()


def grow(model: Any, plan: Sequence[int | None], seed: int) -> Any:
    """A model with one layer per entry of `plan`: that layer, or (None) a fresh one.

    An index that comes again stands for a silent copy: the layer's weights with zero outputs, so
    that for instance a second looking-up layer need not be discovered anew. Fresh layers and
    copies add nothing until trained: the grown model computes what the old one did.
    """
    from transformers import LlamaForCausalLM

    used = list(dict.fromkeys(index for index in plan if index is not None))
    if used != list(range(model.config.num_hidden_layers)):
        raise ValueError(f"plan {list(plan)} must keep every layer, in order")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(plan)
    if getattr(config, "layer_types", None):
        config.layer_types = None
    torch.manual_seed(seed)
    grown = LlamaForCausalLM(config).float()
    grown.model.embed_tokens.load_state_dict(model.model.embed_tokens.state_dict())
    grown.model.norm.load_state_dict(model.model.norm.state_dict())
    for index, source in enumerate(plan):
        layer = grown.model.layers[index]
        if source is not None:
            layer.load_state_dict(model.model.layers[source].state_dict())
        if source is None or source in plan[:index]:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    return grown


def silence_heads(model: Any, active: Sequence[int]) -> list[Any]:
    """Let only the first `active[i]` query heads of layer i act and learn; returns hook handles.

    A transition made with few active heads leaves looking-up in few heads: the others, freed
    later, find the work done.
    """
    handles = []
    for layer, count in zip(model.model.layers, active, strict=True):
        weight = layer.self_attn.o_proj.weight
        mask = torch.zeros_like(weight)
        mask[:, : count * model.config.head_dim] = 1.0
        with torch.no_grad():
            weight.mul_(mask)
        handles.append(weight.register_hook(lambda grad, mask=mask: grad * mask))
    return handles
