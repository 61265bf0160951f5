"""What a hybrid is made of: a record of every layer, and the tree that people read.

Works on a model on the meta device too, so describing a checkpoint of any size needs no weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rad.models.hybrid import HybridAttention

REFERENCE_TOKENS = 4096  # bounded caches are counted full


def summarise(model: Any) -> dict[str, Any]:
    """Layer records, parameters, KV bytes per token and state bytes per sequence of a model."""
    layers = [
        _layer(index, layer.self_attn, model) for index, layer in enumerate(model.model.layers)
    ]
    return {
        "schema": 1,
        "model_type": model.config.model_type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "mixer": getattr(model.config, "rad_mixer", None),
        "layers": layers,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "kv_bytes_per_token": sum(layer["kv_bytes_per_token"] for layer in layers),
        "state_bytes": sum(layer["state_bytes"] for layer in layers),
    }


def _layer(index: int, attention: Any, model: Any) -> dict[str, Any]:
    record: dict[str, Any] = {
        "layer": index,
        "parameters": sum(parameter.numel() for parameter in attention.parameters()),
        "state_bytes": 0,
        "mixer": None,
        "mixer_heads": [],
    }
    softmax = attention
    heads = list(range(model.config.num_attention_heads))
    if isinstance(attention, HybridAttention):
        softmax, heads = attention.softmax, attention.kept
        record["mixer"] = attention.mixer.settings["type"]
        record["mixer_heads"] = list(attention.mixer.owned)
        record["state_bytes"] = attention.mixer.state_bytes(model.dtype, REFERENCE_TOKENS)
    record["form"] = "parallel" if getattr(attention, "parallel", False) else "slots"
    record["softmax_heads"] = heads
    record["kv_heads"] = softmax.k_proj.out_features // softmax.head_dim if heads else 0
    width = softmax.head_dim if heads else 0
    record["kv_bytes_per_token"] = 2 * record["kv_heads"] * width * model.dtype.itemsize
    return record


def tree(title: str, summary: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """The summary as text; `before` is the base's, for the parameters that were there."""
    rows = []
    for layer in summary["layers"]:
        parts = []
        if layer["mixer"]:
            parts.append(f"{layer['mixer']}: {_heads(layer['mixer_heads'])}")
        if layer["softmax_heads"]:
            kept = f"softmax: {_heads(layer['softmax_heads'])} ({layer['kv_heads']} kv)"
            parts.append(kept)
        joined = (" | " if layer["form"] == "slots" else " + ").join(parts)
        cost = f"{layer['kv_bytes_per_token']:>6,} B/token {layer['state_bytes']:>9,} B state"
        rows.append((joined, f"{layer['parameters']:>12,} parameters {cost}"))
    width = max(len(left) for left, _ in rows)
    digits = len(str(len(rows) - 1))
    lines = [title]
    for index, (left, right) in enumerate(rows):
        branch = "`-" if index == len(rows) - 1 else "|-"
        lines.append(f"{branch} layer {index:>{digits}}  {left:<{width}}  {right}")
    lines.append(_change("parameters", "parameters", summary, before))
    lines.append(_change("KV bytes per token", "kv_bytes_per_token", summary, before))
    lines.append(_change("state bytes per sequence", "state_bytes", summary, before))
    return "\n".join(lines)


def _change(label: str, key: str, summary: dict[str, Any], before: dict[str, Any] | None) -> str:
    earlier = f"{before[key]:,} -> " if before is not None else ""
    return f"{label}: {earlier}{summary[key]:,}"


def _heads(heads: list[int]) -> str:
    """`heads 0-3, 6` from [0, 1, 2, 3, 6]."""
    runs: list[list[int]] = []
    for head in heads:
        if runs and head == runs[-1][-1] + 1:
            runs[-1].append(head)
        else:
            runs.append([head])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"head {text}" if len(heads) == 1 else f"heads {text}"


def load_shape(folder: Path | str, revision: str | None = None, dtype: Any = None) -> Any:
    """The model of a checkpoint on the meta device: every shape, no weights.

    `dtype`: another one than its configuration's.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, revision=revision)
    dtype = dtype or getattr(config, "dtype", None) or torch.float32
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
