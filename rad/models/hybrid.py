"""The hybrid model: a Hugging Face decoder whose attention is a mixer in some layers or heads.

Only `self_attn` of converted layers is replaced; embeddings, norms, MLPs, RoPE and generation are
the library's. Legend: B batch, T time, E hidden size, H query heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from rad.mixers import MIXERS, Geometry
from rad.mixers.base import head_rows
from rad.models.cache import HybridCache


class SoftmaxHeads(nn.Module):
    """The kept query heads of a layer, each with keys and values of its own.

    Grouped keys and values are expanded by whole heads (retrieval-aware distillation, section 4.2).
    """

    def __init__(self, config: Any, layer_idx: int, kept: list[int]) -> None:
        super().__init__()
        self.config, self.layer_idx, self.kept = config, layer_idx, kept
        self.geometry = Geometry.of(config)
        width, bias = len(kept) * self.geometry.head_dim, self.geometry.bias
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.scaling = self.geometry.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = True
        if config.model_type == "rad_qwen3":
            from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

            self.q_norm = Qwen3RMSNorm(self.geometry.head_dim, eps=config.rms_norm_eps)
            self.k_norm = Qwen3RMSNorm(self.geometry.head_dim, eps=config.rms_norm_eps)

    def forward(
        self, u: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: Any, **kwargs: Any
    ) -> Tensor:
        """u (B,T,E) -> (B,T,kept,D)."""
        shape = (*u.shape[:-1], len(self.kept), self.geometry.head_dim)
        q, k, v = (project(u).view(shape) for project in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B,kept,T,D)
        q, k = apply_rotary_pos_emb(q, k, *rope)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, _ = attend(self, q, k, v, mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return out  # type: ignore[no-any-return]

    @torch.no_grad()
    def init_from_attention(self, attention: Any) -> None:
        """Copy the kept heads' Q, and for each its kv head's K and V."""
        dim, group = self.geometry.head_dim, self.geometry.group
        shared = [head // group for head in self.kept]
        for name, heads in (("q_proj", self.kept), ("k_proj", shared), ("v_proj", shared)):
            source, target, rows = (
                getattr(attention, name),
                getattr(self, name),
                head_rows(heads, dim),
            )
            target.weight.copy_(source.weight[rows])
            if target.bias is not None:
                target.bias.copy_(source.bias[rows])
        for name in ("q_norm", "k_norm"):
            if hasattr(self, name):
                getattr(self, name).load_state_dict(getattr(attention, name).state_dict())


class HybridAttention(nn.Module):
    """Kept softmax heads and mixer heads side by side under one output projection.

    Slot-wise form (retrieval-aware distillation, section 4.2): every head keeps its slot of the
    output projection, whoever fills it.
    """

    def __init__(self, config: Any, layer_idx: int, kept: list[int]) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        geometry = Geometry.of(config)
        self.geometry = geometry
        owned = [head for head in range(geometry.heads) if head not in set(kept)]
        settings = config.rad_mixer
        self.mixer = MIXERS[settings["type"]](geometry, owned, settings)
        self.softmax = SoftmaxHeads(config, layer_idx, kept) if kept else None
        self.standardise = bool(kept) and bool(settings.get("standardise", False))
        # slots are stored [kept | owned]; this brings them back to head order
        self.slot_order = [(kept + owned).index(head) for head in range(geometry.heads)]
        self.o_proj = nn.Linear(
            geometry.heads * geometry.head_dim,
            config.hidden_size,
            bias=bool(getattr(config, "attention_bias", False)),
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        padding_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (B,T,E), padding_mask (B,T) bool or None -> (B,T,E)."""
        state = past_key_values.mixer_state(self.layer_idx) if past_key_values is not None else None
        y, state = self.mixer(hidden_states, state, padding_mask, position_embeddings)
        if past_key_values is not None:
            past_key_values.update_mixer_state(self.layer_idx, state)
        if self.softmax is not None:
            a = self.softmax(
                hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs
            )
            if self.standardise:
                a = standardise(a, y)
            y = torch.cat([a.to(y.dtype), y], dim=2)  # (B,T,H,D) in slot order
            if self.slot_order != list(range(self.geometry.heads)):
                y = y[:, :, self.slot_order]
        out: Tensor = self.o_proj(y.flatten(2))
        return out, None


def standardise(a: Tensor, y: Tensor, eps: float = 1e-5) -> Tensor:
    """Give `a` (B,T,kept,D) the mean and deviation of `y` (B,T,owned,D), per token.

    Retrieval-aware distillation, A.2: unbiased deviation, no parameters.
    """
    a_std, a_mean = torch.std_mean(a, dim=(2, 3), keepdim=True)
    y_std, y_mean = torch.std_mean(y, dim=(2, 3), keepdim=True)
    return (a - a_mean) / (a_std + eps) * (y_std + eps) + y_mean


class HybridMixin:
    """What a family's hybrid adds to the library's model: surgery, padding, cache."""

    config: Any
    model: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        if len(config.rad_heads) != config.num_hidden_layers:
            raise ValueError(
                f"config.rad_heads has {len(config.rad_heads)} entries for "
                f"{config.num_hidden_layers} layers"
            )
        for index, kept in enumerate(config.rad_heads):
            if len(kept) < config.num_attention_heads:
                self.model.layers[index].self_attn = HybridAttention(config, index, list(kept))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As the library's; `attention_mask` (B, past + T) also keeps padding out of the mixers."""
        tokens = input_ids if input_ids is not None else kwargs["inputs_embeds"]
        time = tokens.shape[1]
        if use_cache is None:
            use_cache = bool(self.config.use_cache)
        if use_cache and past_key_values is None:
            past_key_values = HybridCache(self.config)
        if past_key_values is not None and not isinstance(past_key_values, HybridCache):
            raise ValueError(
                f"a hybrid needs rad.models.HybridCache(model.config), not a plain "
                f"{type(past_key_values).__name__}: it has recurrent states"
            )
        padding = None
        if attention_mask is not None:
            if attention_mask.dim() != 2:
                raise ValueError(
                    "a hybrid needs the 2-D attention mask (batch, tokens): its mixers cannot read "
                    f"padding from a {attention_mask.dim()}-D one"
                )
            latest = attention_mask[:, -time:].bool()
            padding = None if bool(latest.all()) else latest
        output = super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            padding_mask=padding,
            **kwargs,
        )
        if past_key_values is not None:
            past_key_values.advance(time)
        return output

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, *args: Any
    ) -> Any:
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = HybridCache(self.config)
            return None
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args
        )


class LlamaHybridConfig(LlamaConfig):
    """Llama plus `rad_heads` (kept query heads per layer) and `rad_mixer` (mixer settings)."""

    model_type = "rad_llama"
    rad_heads: list[Any] | None = None
    rad_mixer: dict[str, Any] | None = None


class Qwen2HybridConfig(Qwen2Config):
    """Qwen2 / Qwen2.5 plus `rad_heads` and `rad_mixer`."""

    model_type = "rad_qwen2"
    rad_heads: list[Any] | None = None
    rad_mixer: dict[str, Any] | None = None


class Qwen3HybridConfig(Qwen3Config):
    """Qwen3 plus `rad_heads` and `rad_mixer`."""

    model_type = "rad_qwen3"
    rad_heads: list[Any] | None = None
    rad_mixer: dict[str, Any] | None = None


class LlamaHybridForCausalLM(HybridMixin, LlamaForCausalLM):
    """Llama-family hybrid."""

    config_class = LlamaHybridConfig


class Qwen2HybridForCausalLM(HybridMixin, Qwen2ForCausalLM):
    """Qwen2-family hybrid."""

    config_class = Qwen2HybridConfig


class Qwen3HybridForCausalLM(HybridMixin, Qwen3ForCausalLM):
    """Qwen3-family hybrid."""

    config_class = Qwen3HybridConfig


# base model_type -> (hybrid config, hybrid model)
FAMILIES: dict[str, tuple[type[Any], type[Any]]] = {
    "llama": (LlamaHybridConfig, LlamaHybridForCausalLM),
    "qwen2": (Qwen2HybridConfig, Qwen2HybridForCausalLM),
    "qwen3": (Qwen3HybridConfig, Qwen3HybridForCausalLM),
}


def register() -> None:
    """Make the hybrids known to `AutoConfig` and `AutoModelForCausalLM`; safe to call twice."""
    from transformers import AutoConfig, AutoModelForCausalLM

    for config_class, model_class in FAMILIES.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
