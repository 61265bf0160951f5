"""Export: a layer-wise Mamba-2 hybrid in the layout of GraniteMoeHybrid, which other engines serve.

That architecture alternates whole layers of RoPE attention and of Mamba-2 and has a dense form
(no experts), so a hybrid of the Llama or Qwen2 family fits it exactly. Only the sharing of x and B
by grouped query heads has no counterpart: there a head that reads a C of its own must own its B
too, so their rows are repeated. Legend: H query heads, D head dim, K kv slots.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from rad.files import new_folder, read_json, write_json

FAMILIES = ("rad_llama", "rad_qwen2")
# configuration keys of the same name and meaning in both
COPIED = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)
# config.json keeps the names of published Granite checkpoints: transformers 5 renames them when it
# loads, earlier releases and engines built on them know no others
STORED_NAMES = {"linear_attention": "mamba", "full_attention": "attention"}
# largest difference of logits, as a share of the largest logit, that rounding may make: a trained
# model amplifies it, an error of the layout makes far more
TOLERANCE = {torch.float32: 1e-3}
HALF_TOLERANCE = 0.1


class ExportError(ValueError):
    """A hybrid that has no equal in the target layout; the message names what stands against it."""


def export(hybrid: Any, folder: Path | str, tokenizer: Any = None) -> dict[str, Any]:
    """Write `hybrid` as a GraniteMoeHybrid checkpoint and report what was written.

    The folder appears only when it is complete and the logits of the two models agree. Raises
    `ExportError` when the hybrid does not fit or the logits differ, `ValueError` when the folder is
    not empty.
    """
    folder = Path(folder)
    with new_folder(folder) as temporary:
        granite = to_granite(hybrid)
        difference = _check(hybrid, granite)
        granite.save_pretrained(temporary)
        _make_portable(temporary / "config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
    return {
        "folder": str(folder),
        "model_type": granite.config.model_type,
        "layer_types": [STORED_NAMES[kind] for kind in granite.config.layer_types],
        "parameters": {"before": _parameters(hybrid), "after": _parameters(granite)},
        "max_logit_difference": difference,
        "notes": _notes(granite.config),
    }


def to_granite(hybrid: Any) -> Any:
    """The `GraniteMoeHybridForCausalLM` equal to `hybrid`, in its dtype and on its device.

    Raises `ExportError` when there is none.
    """
    _refuse(hybrid)
    granite = GraniteMoeHybridForCausalLM._from_config(granite_config(hybrid), dtype=hybrid.dtype)
    granite.config._attn_implementation = hybrid.config._attn_implementation
    granite.load_state_dict(_weights(hybrid, granite.config), strict=True)
    granite.generation_config = copy.deepcopy(hybrid.generation_config)
    return granite.to(hybrid.device).eval()


def granite_config(hybrid: Any) -> GraniteMoeHybridConfig:
    """The target's configuration for a hybrid that fits."""
    config, names = hybrid.config, hybrid.state_dict()
    heads, dim = config.num_attention_heads, _head_dim(config)
    # some engines derive the head dim from the hidden size; say it only where they would be wrong
    explicit: dict[str, Any] = {} if heads * dim == config.hidden_size else {"head_dim": dim}
    chunk = int(config.rad_mixer["chunk"])
    return GraniteMoeHybridConfig(
        **{name: getattr(config, name) for name in COPIED},
        **explicit,
        layer_types=["full_attention" if kept else "linear_attention" for kept in config.rad_heads],
        position_embedding_type="rope",
        rope_parameters=copy.deepcopy(dict(config.rope_parameters)),
        attention_bias=any(name.endswith("self_attn.q_proj.bias") for name in names),
        attention_multiplier=dim**-0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        num_local_experts=0,
        num_experts_per_tok=0,
        shared_intermediate_size=config.intermediate_size,
        mamba_n_heads=heads,
        mamba_n_groups=heads,
        mamba_d_head=dim,
        mamba_d_state=dim,
        mamba_d_conv=int(config.rad_mixer["conv_size"]),
        mamba_expand=heads * dim // config.hidden_size,
        # results do not depend on the chunk length; compiled scans want a power of two
        mamba_chunk_size=1 << (chunk - 1).bit_length(),
        mamba_conv_bias=True,
        mamba_proj_bias=any(name.endswith("mixer.in_proj.bias") for name in names),
    )


def _head_dim(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _refuse(hybrid: Any) -> None:
    """Raise `ExportError` for the first property that the target cannot express."""
    config = hybrid.config
    family = config.model_type
    if getattr(config, "rad_heads", None) is None:
        raise ExportError(f"cannot export a {family!r} model: only hybrids, made by `rad`, fit")
    if family == "rad_qwen3":
        raise ExportError(
            "cannot export a Qwen3 hybrid: its attention normalises queries and keys, "
            "GraniteMoeHybrid's does not"
        )
    if family not in FAMILIES:
        raise ExportError(f"cannot export a {family!r} model; known: {', '.join(FAMILIES)}")
    kind = (config.rad_mixer or {}).get("type")
    if kind != "mamba2":
        raise ExportError(f"cannot export mixer {kind!r}: GraniteMoeHybrid has mamba2 only")
    if not any(config.rad_heads):
        raise ExportError(
            "cannot export a hybrid that keeps no attention: transformers counts cached tokens of "
            "GraniteMoeHybrid by its attention layers; keep one layer at least"
        )
    heads, dim, width = config.num_attention_heads, _head_dim(config), config.hidden_size
    for layer, kept in enumerate(config.rad_heads):
        if 0 < len(kept) < heads:
            raise ExportError(
                f"cannot export layer {layer}: it keeps {len(kept)} of {heads} heads, and "
                "GraniteMoeHybrid has whole layers only; use a layer-wise placement"
            )
    if heads * dim % width:
        raise ExportError(
            f"cannot export {heads} heads of {dim}: {heads * dim} is not a multiple of the hidden "
            f"size {width}, as mamba_expand asks"
        )
    if config.hidden_act != "silu":
        raise ExportError(
            f"cannot export hidden_act {config.hidden_act!r}: there the MLP and the mixer share "
            "one activation, and the mixer's is silu"
        )
    if getattr(config, "mlp_bias", False):
        raise ExportError("cannot export mlp_bias: GraniteMoeHybrid's MLP has no bias")
    rope = config.rope_parameters
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ExportError("cannot export partial_rotary_factor: GraniteMoeHybrid rotates all of D")
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(config.rad_heads)
    for layer, (kept, name) in enumerate(zip(config.rad_heads, kinds, strict=True)):
        if kept and name != "full_attention":
            raise ExportError(
                f"cannot export layer {layer}: its attention is {name!r}, GraniteMoeHybrid has "
                "full attention only"
            )


def _weights(hybrid: Any, config: GraniteMoeHybridConfig) -> dict[str, Tensor]:
    """Every tensor of the target, by its name there."""
    weights = {
        "model.embed_tokens.weight": hybrid.model.embed_tokens.weight,
        "model.norm.weight": hybrid.model.norm.weight,
        "lm_head.weight": hybrid.lm_head.weight,
    }
    for index, (layer, kept) in enumerate(
        zip(hybrid.model.layers, hybrid.config.rad_heads, strict=True)
    ):
        parts = {
            "input_layernorm.weight": layer.input_layernorm.weight,
            "post_attention_layernorm.weight": layer.post_attention_layernorm.weight,
            "shared_mlp.input_linear.weight": torch.cat(
                [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]
            ),
            "shared_mlp.output_linear.weight": layer.mlp.down_proj.weight,
        }
        if kept:
            parts |= _attention(layer.self_attn, biased=bool(config.attention_bias))
        else:
            parts |= _mamba(layer.self_attn, index, config)
        weights |= {f"model.layers.{index}.{name}": tensor for name, tensor in parts.items()}
    return {name: tensor.detach() for name, tensor in weights.items()}


def _bias(linear: Any) -> Tensor:
    """The bias of a linear map, zeros where it has none."""
    if linear.bias is None:
        return linear.weight.new_zeros(linear.out_features)  # type: ignore[no-any-return]
    return linear.bias  # type: ignore[no-any-return]


def _attention(attention: Any, *, biased: bool) -> dict[str, Tensor]:
    parts = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        linear = getattr(attention, name)
        parts[f"self_attn.{name}.weight"] = linear.weight
        if biased:  # one switch for all four there; Qwen2's output projection has no bias
            parts[f"self_attn.{name}.bias"] = _bias(linear)
    return parts


def _mamba(attention: Any, layer: int, config: GraniteMoeHybridConfig) -> dict[str, Tensor]:
    """A converted layer's mixer and output projection, x and B repeated for the heads they serve.

    Row order there and here: in_proj [z | x | B | C | dt], convolution [x | B | C].
    """
    mixer = attention.mixer
    heads, dim = int(config.mamba_n_heads or 0), int(config.mamba_d_head or 0)
    slots = mixer.sizes[1] // dim
    expected = [heads * dim, slots * dim, slots * dim, heads * dim, heads]
    if list(mixer.sizes) != expected or len(mixer.kv_of) != heads:
        raise ExportError(f"cannot export layer {layer}: its mamba2 has rows {mixer.sizes}")
    conv_sizes = mixer.sizes[1:4]

    def repeat(rows: Tensor) -> Tensor:  # (K*D, ...) -> (H*D, ...)
        return rows.view(slots, dim, *rows.shape[1:])[mixer.kv_of].flatten(0, 1)

    def conv(rows: Tensor) -> Tensor:
        x, b, c = rows.split(conv_sizes)
        return torch.cat([repeat(x), repeat(b), c])

    def projection(rows: Tensor) -> Tensor:
        z, xbc, dt = rows.split([mixer.sizes[0], sum(conv_sizes), heads])
        return torch.cat([z, conv(xbc), dt])

    parts = {
        "in_proj.weight": projection(mixer.in_proj.weight),
        "conv1d.weight": conv(mixer.conv_weight).unsqueeze(1),  # (F,W) -> (F,1,W)
        "conv1d.bias": conv(mixer.conv_bias),
        "A_log": mixer.A_log,
        "dt_bias": mixer.dt_bias,
        "D": mixer.D,
        "norm.weight": mixer.norm_weight.flatten(),  # (H,D) -> (H*D); the norm is per head there
        "out_proj.weight": attention.o_proj.weight,
    }
    if config.mamba_proj_bias:
        parts["in_proj.bias"] = projection(_bias(mixer.in_proj))
        parts["out_proj.bias"] = _bias(attention.o_proj)
    return {f"mamba.{name}": tensor for name, tensor in parts.items()}


@torch.no_grad()
def _check(hybrid: Any, granite: Any) -> float:
    """Largest difference of the two models' logits on random tokens, whole and with a cache.

    Raises `ExportError` where it is more than rounding.
    """
    config = hybrid.config
    generator = torch.Generator().manual_seed(0)
    length = min(40, config.max_position_embeddings)
    tokens = torch.randint(config.vocab_size, (2, length), generator=generator).to(hybrid.device)
    training = hybrid.training
    try:
        expected = hybrid.eval()(tokens, use_cache=False).logits.float()
    finally:
        hybrid.train(training)
    prefix = granite(tokens[:, :-1], use_cache=True)
    last = granite(tokens[:, -1:], past_key_values=prefix.past_key_values, use_cache=True)
    cached = torch.cat([prefix.logits, last.logits], dim=1).float()
    whole = granite(tokens, use_cache=False).logits.float()
    difference = max(float((logits - expected).abs().max()) for logits in (whole, cached))
    limit = TOLERANCE.get(hybrid.dtype, HALF_TOLERANCE) * max(1.0, float(expected.abs().max()))
    if not difference <= limit:  # also for NaN
        raise ExportError(
            f"the exported model's logits differ by {difference:.3g} (at most {limit:.3g} is "
            "rounding); nothing was written"
        )
    return difference


def _make_portable(path: Path) -> None:
    """Write layer types and RoPE as earlier releases read them too; transformers 5 takes both."""
    config = read_json(path)
    config["layer_types"] = [STORED_NAMES[kind] for kind in config["layer_types"]]
    rope = config["rope_parameters"]
    config["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    write_json(path, config)


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _notes(config: GraniteMoeHybridConfig) -> list[str]:
    """What a serving engine must do, or may not do, with this checkpoint."""
    notes = [
        "not tried with a serving engine: compare a few answers with transformers first",
        "the gated norm of the Mamba layers works per group (one per head); an engine that "
        "normalises over the whole width gives other logits",
        f"tensor parallelism must divide {config.mamba_n_heads} heads",
        "switch prefix caching off for evaluation: with recurrent states it has given engines "
        "wrong answers",
    ]
    if config.mamba_proj_bias:
        notes.append(
            "transformers does not keep the bias of in_proj at padded positions out of the "
            "convolution: batch prompts of equal length there; engines without padding are exact"
        )
    if int(config.mamba_expand or 0) != 1:
        notes.append(
            "heads x head_dim is not the hidden size: vLLM's attention takes its head dim from "
            "the hidden size and cannot load this checkpoint"
        )
    if not 2 <= int(config.mamba_d_conv or 0) <= 4:
        notes.append(
            f"the convolution's width {config.mamba_d_conv} is outside 2..4, the widths of the "
            "compiled causal-conv1d kernels"
        )
    return notes
