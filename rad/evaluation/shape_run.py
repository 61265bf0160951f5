"""A model's forward pass on shapes alone: the real code, every cache tensor, no memory.

What the cache of a configuration of any size holds is read from the cache itself this way, on a
machine that could not hold the weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from rad.evaluation.live_memory import cache_bytes
from rad.evaluation.memory import CacheBytes, predicted_cache
from rad.models.families import PREFIX, hybrid_classes


@torch.no_grad()
def cache_of_shape(
    config: Any, tokens: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[CacheBytes, int]:
    """(bytes by formula, bytes of the tensors in the cache) of one sequence after `tokens`."""
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        prompt = torch.ones(1, tokens, dtype=torch.long)
        cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        return predicted_cache(model, tokens), cache_bytes(cache)


def hybrid_config(base: Any, kept: list[list[int]], mixer: dict[str, Any]) -> Any:
    """The configuration of the hybrid of `base` (a configuration) with the heads `kept` per layer.

    Raises `ValueError` when `kept` is for another number of layers.
    """
    if len(kept) != base.num_hidden_layers:
        raise ValueError(f"{len(kept)} lists of heads for {base.num_hidden_layers} layers")
    if base.model_type.startswith(PREFIX):
        raise ValueError(f"a {base.model_type!r} configuration is a hybrid's already")
    config_class, _ = hybrid_classes(base.model_type)
    fields = {key: value for key, value in base.to_dict().items() if key != "model_type"}
    return config_class(**{**fields, "rad_heads": kept, "rad_mixer": mixer})
