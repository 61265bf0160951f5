"""The base that a hybrid was made from, by shape: for comparing speed and memory in one process.

Everything that the hybrid kept is shared with it, down to the tensors; the attention weights that
conversion replaced are drawn at random, because neither time nor memory depends on their values.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rad.models.families import PREFIX

_OURS = ("model_type", "architectures", "rad_heads", "rad_mixer")


def is_hybrid(model: Any) -> bool:
    """Whether `model` is one of this package's hybrids."""
    return str(model.config.model_type).startswith(PREFIX)


@torch.no_grad()
def unconverted(hybrid: Any) -> Any:
    """The base's model of the shape, dtype and device of `hybrid`, every attention layer whole.

    Its logits mean nothing. Raises `ValueError` when `hybrid` is not one.
    """
    if not is_hybrid(hybrid):
        raise ValueError(
            f"a {hybrid.config.model_type!r} model is not a hybrid: it has no base to compare with"
        )
    fields = {key: value for key, value in hybrid.config.to_dict().items() if key not in _OURS}
    config = CONFIG_MAPPING[hybrid.config.model_type.removeprefix(PREFIX)](**fields)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=hybrid.dtype)
    base.config._attn_implementation = hybrid.config._attn_implementation
    shared = {**dict(hybrid.named_parameters()), **dict(hybrid.named_buffers())}
    generator = torch.Generator(device=hybrid.device).manual_seed(0)
    for name, tensor in [*base.named_parameters(), *base.named_buffers()]:
        owner, _, leaf = name.rpartition(".")
        module = base.get_submodule(owner)
        value = shared.get(name)
        if value is None or value.shape != tensor.shape:
            if not isinstance(tensor, torch.nn.Parameter):
                raise ValueError(
                    f"cannot build the base of this hybrid: it lacks the buffer {name}"
                )
            value = torch.empty(tensor.shape, dtype=tensor.dtype, device=hybrid.device)
            value.normal_(0, 0.02, generator=generator)
        if isinstance(tensor, torch.nn.Parameter):
            value = torch.nn.Parameter(value.detach(), requires_grad=False)
        setattr(module, leaf, value)
    base.tie_weights()
    return base.eval()
