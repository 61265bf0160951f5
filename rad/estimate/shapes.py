"""Shapes of models and hybrids: every parameter by name, from a configuration alone.

`Shape.of(config)` reads a config.json; `Model` adds which heads stay and which mixer stands in for
the others, and lists parameters under the names that the real model has (tests compare the two).
Legend: E hidden size, H query heads, K kv heads, D head dim, F MLP width, V vocabulary, M heads
that a mixer owns, N state dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rad.files import read_json
from rad.models import sources

Size = tuple[int, ...]
FLOAT32_ONLY = ("A_log", "dt_bias", "D")  # a hybrid keeps these in float32 whatever its dtype
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class ShapeError(ValueError):
    """A model whose shape is not known; the message is one line with the remedy."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder that decide what it costs."""

    family: str
    layers: int
    hidden: int  # E
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # D
    mlp: int  # F
    vocabulary: int  # V
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_positions: int

    @classmethod
    def of(cls, config: Mapping[str, Any], name: str = "model") -> Shape:
        """From the content of a config.json; raises `ShapeError` on another kind of decoder."""
        family = str(config.get("model_type"))
        if family not in BIASES:
            raise ShapeError(
                f"{name}: no estimate for a model of type {family!r}; known: {', '.join(BIASES)}"
            )
        missing = [key for key in REQUIRED if config.get(key) is None]
        if missing:
            raise ShapeError(f"{name}: its config.json has no {missing[0]}")
        qkv, out, mlp = BIASES[family](config)
        heads = int(config["num_attention_heads"])
        return cls(
            family=family,
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            mlp=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=qkv,
            o_bias=out,
            mlp_bias=mlp,
            qk_norm=family == "qwen3",
            max_positions=int(config.get("max_position_embeddings") or 0),
        )

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.heads // self.kv_heads


REQUIRED = (
    *("num_hidden_layers", "num_attention_heads", "hidden_size"),
    *("intermediate_size", "vocab_size"),
)


def _of_llama(config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    attention = bool(config.get("attention_bias", False))
    return attention, attention, bool(config.get("mlp_bias", False))


def _of_qwen3(config: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    attention = bool(config.get("attention_bias", False))
    return attention, attention, False


# model_type -> whether (q, k, v), o and the MLP have biases
BIASES: dict[str, Callable[[Mapping[str, Any]], tuple[bool, bool, bool]]] = {
    "llama": _of_llama,
    "mistral": lambda config: (False, False, False),
    "qwen2": lambda config: (True, False, False),
    "qwen3": _of_qwen3,
}


@dataclass(frozen=True)
class Layer:
    """One decoder layer: the query heads that stay; `mixer` None where all of them do."""

    shape: Shape
    kept: tuple[int, ...]
    mixer: Mapping[str, Any] | None

    @property
    def kind(self) -> str:
        """Name of the mixer, or `softmax`."""
        return "softmax" if self.mixer is None else str(self.mixer["type"])

    @property
    def parallel(self) -> bool:
        """Whether kept heads and a mixer of all heads run side by side."""
        return self.mixer is not None and bool(self.kept) and self.mixer.get("form") == "parallel"

    @property
    def owned(self) -> list[int]:
        """Heads of the mixer."""
        if self.mixer is None:
            return []
        if self.parallel:
            return list(range(self.shape.heads))
        return [head for head in range(self.shape.heads) if head not in set(self.kept)]

    @property
    def kv_owned(self) -> int:
        """Kv heads that the mixer's heads read."""
        return len({head // self.shape.group for head in self.owned})

    @cached_property
    def parameters(self) -> dict[str, Size]:
        """Name inside the layer -> size."""
        s = self.shape
        width = s.heads * s.head_dim
        found: dict[str, Size] = {}
        if self.mixer is None:
            found |= attention(s, s.heads, s.kv_heads, "self_attn.")
        else:
            found |= {
                f"self_attn.mixer.{k}": v for k, v in MIXER_PARAMETERS[self.kind](self).items()
            }
        found["self_attn.o_proj.weight"] = (s.hidden, width)
        if s.o_bias:
            found["self_attn.o_proj.bias"] = (s.hidden,)
        if self.mixer is not None and self.kept:
            count = len(self.kept)
            found |= attention(s, count, count, "self_attn.softmax.")
            if self.parallel:
                found["self_attn.softmax.o_proj.weight"] = (s.hidden, count * s.head_dim)
                if s.o_bias:
                    found["self_attn.softmax.o_proj.bias"] = (s.hidden,)
                found["self_attn.adapter.weight"] = (s.hidden, s.hidden)
                found["self_attn.adapter.bias"] = (s.hidden,)
        sizes = {"gate_proj": (s.mlp, s.hidden), "up_proj": (s.mlp, s.hidden)}
        for name, size in {**sizes, "down_proj": (s.hidden, s.mlp)}.items():
            found[f"mlp.{name}.weight"] = size
            if s.mlp_bias:
                found[f"mlp.{name}.bias"] = size[:1]
        found["input_layernorm.weight"] = (s.hidden,)
        found["post_attention_layernorm.weight"] = (s.hidden,)
        return found

    def state_bytes(self, itemsize: int) -> int:
        """Bytes of recurrent state per sequence, the conv's included; 0 without a state."""
        if self.mixer is None or self.kind == "skip":
            return 0
        s, m, owned = self.shape, self.mixer, len(self.owned)
        if self.kind == "sliding_window":
            size = int(m["sinks"]) + int(m["window"])
            return 2 * kv_slots(s, self.owned) * size * s.head_dim * itemsize
        state = owned * s.head_dim * state_size(s, m) * 4
        conv = self.parameters.get("self_attn.mixer.conv_weight")
        return state + (0 if conv is None else conv[0] * (conv[1] - 1) * itemsize)

    @property
    def kv_heads(self) -> int:
        """Kv heads that are cached for every token."""
        return self.shape.kv_heads if self.mixer is None else len(self.kept)


def attention(s: Shape, heads: int, kv: int, prefix: str) -> dict[str, Size]:
    """Parameters of q, k, v projections of `heads` query and `kv` kv heads (no output)."""
    found: dict[str, Size] = {}
    for name, count in (("q", heads), ("k", kv), ("v", kv)):
        found[f"{prefix}{name}_proj.weight"] = (count * s.head_dim, s.hidden)
        if s.qkv_bias:
            found[f"{prefix}{name}_proj.bias"] = (count * s.head_dim,)
    if s.qk_norm:
        found |= {f"{prefix}{name}_norm.weight": (s.head_dim,) for name in "qk"}
    return found


# --- mixers ---------------------------------------------------------------------------------


def state_size(s: Shape, mixer: Mapping[str, Any]) -> int:
    """N: columns of a head's state."""
    return int(mixer.get("state_size") or s.head_dim)


def kv_slots(s: Shape, heads: Sequence[int]) -> int:
    """Kv heads of a module built for `heads` that shares them where every group is complete."""
    used = sorted({head // s.group for head in heads})
    complete = [kv * s.group + offset for kv in used for offset in range(s.group)]
    return len(used) if list(heads) == complete else len(heads)


def _in_proj(layer: Layer, rows: int, bias: bool) -> dict[str, Size]:
    found: dict[str, Size] = {"in_proj.weight": (rows, layer.shape.hidden)}
    if bias:
        found["in_proj.bias"] = (rows,)
    return found


def _conv(layer: Layer, channels: int) -> dict[str, Size]:
    assert layer.mixer is not None
    return {"conv_weight": (channels, int(layer.mixer["conv_size"])), "conv_bias": (channels,)}


def _mamba2(layer: Layer) -> dict[str, Size]:
    m, d, kv = len(layer.owned), layer.shape.head_dim, layer.kv_owned
    return {
        **_in_proj(layer, 2 * m * d + 2 * kv * d + m, layer.shape.qkv_bias),
        **_conv(layer, 2 * kv * d + m * d),
        **{name: (m,) for name in ("A_log", "dt_bias", "D")},
        "norm_weight": (m, d),
    }


def _discrete_mamba2(layer: Layer) -> dict[str, Size]:
    assert layer.mixer is not None
    m, d = len(layer.owned), layer.shape.head_dim
    n = state_size(layer.shape, layer.mixer)
    return {
        **_in_proj(layer, m * (2 * d + 2 * n + 1), True),
        **_conv(layer, m * (d + 2 * n)),
        "D": (m,),
    }


def _gated_deltanet(layer: Layer) -> dict[str, Size]:
    assert layer.mixer is not None
    m, d = len(layer.owned), layer.shape.head_dim
    bias = layer.shape.qkv_bias and layer.mixer["qkv_bias"] == "base"
    return {
        **_in_proj(layer, m * (4 * d + 2), bias),
        **(_conv(layer, 3 * m * d) if layer.mixer["conv_size"] else {}),
        "A_log": (m,),
        "dt_bias": (m,),
        "norm_weight": (m, d),
    }


def _gla(layer: Layer) -> dict[str, Size]:
    assert layer.mixer is not None
    m, d, rank = len(layer.owned), layer.shape.head_dim, int(layer.mixer["gate_rank"])
    bias = layer.shape.qkv_bias and layer.mixer["qkv_bias"] == "base"
    return {
        **_in_proj(layer, 4 * m * d + rank, bias),
        "gate_weight": (m * d, rank),
        "gate_bias": (m * d,),
        "norm_weight": (m, d),
    }


def dt_rank(layer: Layer) -> int:
    """Rank of the time step's projection in `mamba` and `longhorn`."""
    assert layer.mixer is not None
    return int(layer.mixer.get("dt_rank") or math.ceil(layer.shape.hidden / 16))


def _mamba(layer: Layer) -> dict[str, Size]:
    assert layer.mixer is not None
    m, d, kv, rank = len(layer.owned), layer.shape.head_dim, layer.kv_owned, dt_rank(layer)
    found = {
        **_in_proj(layer, 2 * m * d + 2 * kv * d, layer.shape.qkv_bias),
        **_conv(layer, m * d),
        "dt_down": (rank, layer.shape.hidden),
        "dt_up": (m * d, rank),
        "dt_bias": (m * d,),
        "D": (m * d,),
    }
    if layer.kind == "mamba":
        found["A_log"] = (m * d, state_size(layer.shape, layer.mixer))
    return found


def _sliding_window(layer: Layer) -> dict[str, Size]:
    slots = kv_slots(layer.shape, layer.owned)
    return attention(layer.shape, len(layer.owned), slots, "attention.")


MIXER_PARAMETERS: dict[str, Callable[[Layer], dict[str, Size]]] = {
    "mamba2": _mamba2,
    "discrete_mamba2": _discrete_mamba2,
    "gated_deltanet": _gated_deltanet,
    "gla": _gla,
    "mamba": _mamba,
    "longhorn": _mamba,
    "sliding_window": _sliding_window,
    "skip": lambda layer: {},
}


# --- whole models ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A base, or a hybrid of it: `kept` are the query heads that stay, layer by layer."""

    shape: Shape
    kept: tuple[tuple[int, ...], ...] | None = None
    mixer: Mapping[str, Any] | None = None

    @cached_property
    def layers(self) -> list[Layer]:
        """The decoder layers, those of one kind as one object."""
        every = tuple(range(self.shape.heads))
        if self.kept is None:
            return [Layer(self.shape, every, None)] * self.shape.layers
        made: dict[tuple[int, ...], Layer] = {}
        for kept in self.kept:
            if kept not in made:
                whole = len(kept) == self.shape.heads
                made[kept] = Layer(self.shape, kept, None if whole else self.mixer)
        return [made[kept] for kept in self.kept]

    @cached_property
    def parameters(self) -> dict[str, Size]:
        """Name -> size of every parameter, a tied head once."""
        s = self.shape
        found: dict[str, Size] = {"model.embed_tokens.weight": (s.vocabulary, s.hidden)}
        for index, layer in enumerate(self.layers):
            for name, size in layer.parameters.items():
                found[f"model.layers.{index}.{name}"] = size
        found["model.norm.weight"] = (s.hidden,)
        if not s.tied:
            found["lm_head.weight"] = (s.vocabulary, s.hidden)
        return found

    @property
    def count(self) -> int:
        """Parameters in all."""
        return sum(math.prod(size) for size in self.parameters.values())

    def weight_bytes(self, dtype: str, names: set[str] | None = None) -> int:
        """Bytes of the parameters (or of those named) of a model of `dtype`."""
        return sum(
            math.prod(size) * item_bytes(name, dtype, self.mixer is not None)
            for name, size in self.parameters.items()
            if names is None or name in names
        )

    def mixer_names(self) -> set[str]:
        """Names of the new parameters, as `rad.distillation.optimiser.mixer_parameters`."""
        return {
            f"model.layers.{index}.{name}"
            for index, layer in enumerate(self.layers)
            if layer.mixer is not None
            for name in layer.parameters
            if name.startswith("self_attn.") and not name.startswith("self_attn.softmax.")
        }


def item_bytes(name: str, dtype: str, hybrid: bool) -> int:
    """Bytes of an element of parameter `name`."""
    wide = hybrid and name.rpartition(".")[2] in FLOAT32_ONLY
    return 4 if wide else BYTES[dtype]


# --- where shapes come from -----------------------------------------------------------------


def table() -> dict[str, dict[str, Any]]:
    """Hub id -> configuration, of the models whose shapes ship with the package."""
    text = (files("rad") / "estimate" / "architectures.yaml").read_text(encoding="utf-8")
    entries = yaml.safe_load(text)["architectures"]
    return {name: entry["config"] for entry in entries for name in entry["ids"]}


def configuration(source: str, configs: Path | None = None) -> dict[str, Any]:
    """The configuration of a model source, without network; raises `ShapeError`.

    `configs`: a folder with `<owner>/<name>/config.json` or `<name>/config.json` of hub ids.
    """
    try:
        path = sources.resolve(source)
    except sources.ModelError as error:
        raise ShapeError(str(error)) from error
    if isinstance(path, Path):
        content: dict[str, Any] = read_json(path / "config.json")
        return content
    for folder in (source, source.rpartition("/")[2]):
        if configs is not None and (configs / folder / "config.json").exists():
            content = read_json(configs / folder / "config.json")
            return content
    known = table()
    if source not in known:
        raise ShapeError(
            f"model {source!r}: its shape is not known here; put its config.json into "
            f"FOLDER/{source}/ and give --configs FOLDER"
        )
    return known[source]


def load_shape(source: str, configs: Path | None = None) -> Shape:
    """The shape of a model source: a folder, `nano:NAME`, or a hub id."""
    return Shape.of(configuration(source, configs), f"model {source!r}")
