"""The hybrid model: a Hugging Face decoder whose attention is a mixer in some layers or heads.

Only `self_attn` of converted layers is replaced; embeddings, norms, MLPs, RoPE and generation are
the library's. Legend: B batch, T time, E hidden size, H query heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rad.mixers import MIXERS
from rad.mixers.attention import attention_heads, copy_heads, geometry_of
from rad.models.cache import HybridCache


class HybridAttention(nn.Module):
    """Mixer heads and, in a layer that keeps some, softmax heads; one of two forms.

    `slots` (retrieval-aware distillation, section 4.2): every head keeps its slot of the one output
    projection, whoever fills it; the mixer owns the heads that are not kept.
    `parallel` (its published code): the mixer owns all heads and has the output projection to
    itself; the kept heads have their own; s and a are the two outputs (B,T,E):
    out = (s + adapter(standardise(a, s))) / 2.
    """

    def __init__(self, config: Any, attention: nn.Module, kept: list[int]) -> None:
        super().__init__()
        self.config = config
        self.geometry = geometry = geometry_of(config, attention)
        self.layer_idx = int(attention.layer_idx)  # type: ignore[arg-type]
        self.kept = list(kept)
        settings = config.rad_mixer
        self.parallel = bool(kept) and settings.get("form") == "parallel"
        others = [head for head in range(geometry.heads) if head not in set(kept)]
        owned = list(range(geometry.heads)) if self.parallel else others
        self.mixer = MIXERS[settings["type"]](geometry, owned, settings)
        self.standardise = bool(kept) and bool(settings.get("standardise", False))
        # slots are stored [kept | owned]; this brings them back to head order
        self.slot_order = [(kept + others).index(head) for head in range(geometry.heads)]
        old: Any = attention.o_proj
        self.o_proj = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
        self.softmax: Any = None
        if kept:
            self.softmax = attention_heads(
                type(attention), config, self.layer_idx, kept, False, keep_output=self.parallel
            )
        if self.parallel:
            self.adapter = nn.Linear(old.out_features, old.out_features)

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
        if self.softmax is None:
            return self.o_proj(y.flatten(2)), None
        self.softmax.config._attn_implementation = self.config._attn_implementation
        a, _ = self.softmax(
            hidden_states=hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            **kwargs,
        )  # (B,T,kept*D) in slots, (B,T,E) in parallel
        if self.parallel:
            s = self.o_proj(y.flatten(2))
            a = standardise(a, s) if self.standardise else a
            return (s + self.adapter(a)) / 2, None
        y = y.flatten(2)  # (B,T,owned*D)
        if self.standardise:
            a = standardise(a, y)
        y = torch.cat([a.to(y.dtype), y], dim=2)  # (B,T,H*D) in slot order
        if self.slot_order != list(range(self.geometry.heads)):
            y = y.unflatten(2, (self.geometry.heads, -1))[:, :, self.slot_order].flatten(2)
        return self.o_proj(y), None

    @torch.no_grad()
    def copy_softmax(self, attention: nn.Module) -> None:
        """Copy the kept heads' weights from the base's attention; a mixer starts on its own."""
        if self.softmax is not None:
            copy_heads(attention, self.softmax, self.kept, self.geometry, share_kv=False)


def standardise(a: Tensor, y: Tensor, eps: float = 1e-5) -> Tensor:
    """Give `a` (B,T,F) the mean and deviation of `y` (B,T,G) per token, over the last dimension.

    Retrieval-aware distillation, A.2: unbiased deviation, no parameters, no detach.
    """
    a_std, a_mean = torch.std_mean(a, dim=-1, keepdim=True)
    y_std, y_mean = torch.std_mean(y, dim=-1, keepdim=True)
    return (a - a_mean) / (a_std + eps) * (y_std + eps) + y_mean


class HybridMixin:
    """What a family's hybrid adds to the library's model: surgery, padding, cache."""

    # decays and time steps lose their meaning in half precision (design, section 5)
    _keep_in_fp32_modules_strict = frozenset({"A_log", "dt_bias", "D"})
    config: Any
    model: Any

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        if len(config.rad_heads) != config.num_hidden_layers:
            raise ValueError(
                f"config.rad_heads has {len(config.rad_heads)} entries for "
                f"{config.num_hidden_layers} layers"
            )
        for layer, kept in zip(self.model.layers, config.rad_heads, strict=True):
            if len(kept) < config.num_attention_heads:
                layer.self_attn = HybridAttention(config, layer.self_attn, list(kept))

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
            padding = attention_mask[:, -time:].bool()
            # reading the values would break the graph when the model is being compiled
            if not torch.compiler.is_compiling() and bool(padding.all()):
                padding = None
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
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"a hybrid generates with its own cache, not cache_implementation={kind!r}; leave "
                "that option out"
            )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = HybridCache(self.config)
            return None
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args
        )
