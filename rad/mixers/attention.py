"""Some heads of an attention layer, computed by the base family's own attention module.

Nothing is rewritten: the family's class is built with fewer heads, so its RoPE, q/k norms, scaling,
soft caps and attention back ends stay the library's. Legend: B batch, T time, E hidden size, H
query heads, K kv heads, D head dim.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from rad.mixers.base import Geometry, head_rows

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def geometry_of(config: Any, attention: nn.Module) -> Geometry:
    """The shape of one attention layer, read from the module itself; raises `ValueError`."""
    check_attention(config, attention)
    layer: Any = attention
    dim = int(layer.head_dim)
    eps = getattr(config, "rms_norm_eps", None) or getattr(config, "layer_norm_eps", None) or 1e-5
    return Geometry(
        hidden_size=layer.q_proj.in_features,
        heads=layer.q_proj.out_features // dim,
        kv_heads=layer.k_proj.out_features // dim,
        head_dim=dim,
        norm_eps=float(eps),
        bias=layer.q_proj.bias is not None,
        attention=partial(attention_heads, type(attention), config, layer.layer_idx),
    )


def check_attention(config: Any, attention: nn.Module) -> None:
    """Raise `ValueError` naming what an attention layer lacks for conversion, on one line."""
    kind = type(attention).__name__
    children = dict(attention.named_children())
    missing = [name for name in PROJECTIONS if not isinstance(children.get(name), nn.Linear)]
    if missing:
        found = ", ".join(n for n, child in children.items() if isinstance(child, nn.Linear))
        raise ValueError(
            f"cannot convert a {config.model_type!r} model: its attention ({kind}) has no linear "
            f"{', '.join(missing)}; it has {found or 'none'} (fused and latent projections are not "
            "supported)"
        )
    if not hasattr(attention, "head_dim"):
        raise ValueError(
            f"cannot convert a {config.model_type!r} model: its attention ({kind}) does not tell "
            "its head_dim"
        )


def attention_heads(
    kind: type[nn.Module],
    config: Any,
    layer_idx: int,
    heads: Sequence[int],
    share_kv: bool,
    keep_output: bool = False,
) -> nn.Module:
    """The family's attention with the query heads `heads` only.

    `share_kv` keeps grouped keys and values where every group is complete; else each head has keys
    and values of its own (retrieval-aware distillation, section 4.2). Without `keep_output` the
    module returns the heads' outputs (B,T,len(heads)*D) instead of projecting them.
    """
    group = config.num_attention_heads // config.num_key_value_heads
    part = copy.deepcopy(config)
    # in this order and by key: some configurations derive one from the other
    part.head_dim = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    part.num_attention_heads = len(heads)
    part.num_key_value_heads = len(kv_slots(heads, group, share_kv))
    part._attn_implementation = config._attn_implementation
    module: nn.Module = kind(part, layer_idx)
    if not keep_output:
        module.o_proj = nn.Identity()
    return module


def kv_slots(heads: Sequence[int], group: int, share_kv: bool) -> list[int]:
    """The base's kv head of every kv slot of a module built for `heads`."""
    used = sorted({head // group for head in heads})
    complete = [kv * group + offset for kv in used for offset in range(group)]
    if share_kv and list(heads) == complete:
        return used
    return [head // group for head in heads]


@torch.no_grad()
def copy_heads(
    source: nn.Module, target: nn.Module, heads: Sequence[int], geometry: Geometry, share_kv: bool
) -> None:
    """Copy the query heads `heads` (Q, K, V, biases, norms and, if there, O) into `target`.

    Raises `ValueError` when a weight mixes heads (a norm over all heads' channels together).
    """
    dim = geometry.head_dim
    rows = {
        "q_proj": head_rows(heads, dim),
        "k_proj": head_rows(kv_slots(heads, geometry.group, share_kv), dim),
    }
    rows["v_proj"] = rows["k_proj"]
    theirs = dict(source.named_parameters())
    for name, parameter in target.named_parameters():
        layer, _, what = name.partition(".")
        value: torch.Tensor = theirs[name]
        if layer in rows:
            value = value[rows[layer]]
        elif layer == "o_proj" and what == "weight":
            value = value[:, rows["q_proj"]]
        if value.shape != parameter.shape:
            raise ValueError(
                f"cannot keep single heads of {type(source).__name__}: its {name} spans all heads; "
                "convert whole layers instead"
            )
        parameter.copy_(value)
