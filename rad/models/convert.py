"""Conversion: a base and a placement -> a hybrid whose mixers start as asked.

Every weight that has a counterpart in the base is copied; the others are drawn from a generator
seeded per layer, so that a layer's mixer does not depend on which other layers are converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from rad.mixers import MIXERS, Mixer
from rad.mixers.attention import geometry_of
from rad.mixers.base import head_rows
from rad.models.families import check_base, hybrid_classes
from rad.models.hybrid import HybridAttention, HybridMixin
from rad.placement import Placement


def convert(
    base: Any,
    placement: Placement,
    mixer: Mapping[str, Any],
    initialisation: str,
    *,
    seed: int = 0,
    aligned: Path | None = None,
) -> Any:
    """The hybrid of `base` under `placement`; `aligned` is the folder of a stage-1 alignment.

    Raises `ValueError` when the placement is for another shape, the family is unknown, or the mixer
    cannot start that way.
    """
    config = base.config
    check_base(base)
    geometry = geometry_of(config, base.model.layers[0].self_attn)
    shape = (config.num_hidden_layers, geometry.heads, geometry.kv_heads)
    if (placement.layers, placement.heads, placement.kv_heads) != shape:
        raise ValueError(
            f"the placement is for {placement.layers} layers x {placement.heads} heads "
            f"({placement.kv_heads} kv), the base has {shape[0]} x {shape[1]} ({shape[2]} kv)"
        )
    MIXERS[mixer["type"]].check_initialisation(mixer["type"], initialisation)
    if initialisation == "aligned" and aligned is None:
        raise ValueError("initialisation 'aligned' needs the folder of a stage-1 alignment")

    config_class, model_class = hybrid_classes(config.model_type)
    fields = {key: value for key, value in config.to_dict().items() if key != "model_type"}
    fields |= {
        "architectures": [model_class.__name__],
        "rad_heads": [placement.kept_heads(layer) for layer in range(placement.layers)],
        "rad_mixer": {key: value for key, value in mixer.items() if key != "name"},
    }
    # not .to(dtype), which would round the rotary frequencies too
    hybrid = model_class._from_config(config_class(**fields), dtype=base.dtype)
    _keep_precision(hybrid)
    hybrid.config._attn_implementation = config._attn_implementation
    copied = {
        name: tensor
        for name, tensor in base.state_dict().items()
        if name in hybrid.state_dict() and not _is_converted(name, placement)
    }
    hybrid.load_state_dict(copied, strict=False)
    hybrid.generation_config = base.generation_config
    for layer, (new, old) in enumerate(zip(hybrid.model.layers, base.model.layers, strict=True)):
        if isinstance(new.self_attn, HybridAttention):
            _initialise(new.self_attn, old.self_attn, initialisation, seed, layer, aligned)
    return hybrid.eval()


def _is_converted(name: str, placement: Placement) -> bool:
    parts = name.split(".")
    return (
        parts[:2] == ["model", "layers"]
        and parts[3] == "self_attn"
        and placement.kind(int(parts[2])) != "softmax"
    )


def _initialise(
    new: HybridAttention, old: Any, initialisation: str, seed: int, layer: int, aligned: Path | None
) -> None:
    new.copy_softmax(old)
    new.o_proj.load_state_dict(old.o_proj.state_dict())
    generator = draw(new.mixer, seed, layer)
    if new.parallel:
        _draw_adapter(new.adapter, generator)
    if initialisation != "aligned":
        new.mixer.init_from_attention(old, initialisation)
        return
    assert aligned is not None
    full, o_weight = load_aligned(aligned, new.mixer, layer)
    new.mixer.take_heads(full)
    dim = new.geometry.head_dim
    columns = head_rows(new.mixer.owned, dim)
    with torch.no_grad():
        new.o_proj.weight[:, columns] = o_weight[:, columns].to(new.o_proj.weight.dtype)


def _keep_precision(hybrid: Any) -> None:
    """Decays and time steps stay in float32, as they do when the hybrid is loaded."""
    for name, parameter in hybrid.named_parameters():
        if name.rpartition(".")[2] in HybridMixin._keep_in_fp32_modules_strict:
            parameter.data = parameter.data.float()


def draw(mixer: Mixer, seed: int, layer: int) -> torch.Generator:
    """Random start of one layer's mixer, a function of (seed, layer) only."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + layer)
    mixer.init_random(generator)
    return generator


@torch.no_grad()
def _draw_adapter(adapter: torch.nn.Linear, generator: torch.Generator) -> None:
    """Random, as in the published code: the default of torch, but drawn from our generator."""
    bound = adapter.in_features**-0.5
    adapter.weight.uniform_(-bound, bound, generator=generator)
    adapter.bias.uniform_(-bound, bound, generator=generator)


def load_aligned(folder: Path, like: Mixer, layer: int) -> tuple[Mixer, torch.Tensor]:
    """The aligned full mixer of `layer` and its output projection's weight (E, H*D)."""
    path = Path(folder) / "mixers.safetensors"
    if not path.exists():
        raise ValueError(f"{path}: no such file; the alignment rule writes it")
    prefix = f"layers.{layer}."
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(str(path)).items()
        if name.startswith(prefix)
    }
    if not tensors:
        raise ValueError(f"{path}: has no mixer for layer {layer}")
    o_weight = tensors.pop("o_proj.weight")
    tensors.pop("o_proj.bias", None)
    full = type(like)(like.geometry, range(like.geometry.heads), like.settings)
    full.load_state_dict(tensors)
    return full, o_weight
