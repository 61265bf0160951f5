"""Hybrid classes of a base family, made when first asked for and known to the Auto classes.

Any decoder of transformers whose attention has linear q, k, v, o projections can be a base: its
hybrid is the library's causal-LM class with `HybridMixin` in front, of `model_type` `rad_<base>`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from rad.models.hybrid import HybridMixin

PREFIX = "rad_"
FULL = "full_attention"
# options of `AutoConfig.from_pretrained` that say where a configuration lies
_WHERE = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "proxies")


@cache
def hybrid_classes(family: str) -> tuple[type[Any], type[Any]]:
    """(configuration, model) of the hybrids of `family`, a `model_type`; raises `ValueError`."""
    if family not in CONFIG_MAPPING or CONFIG_MAPPING[family] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"transformers has no causal language model of type {family!r}")
    base_config: Any = CONFIG_MAPPING[family]
    base_model: Any = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    name = base_model.__name__.removesuffix("ForCausalLM")

    class HybridConfig(base_config):  # type: ignore[misc]
        """A base's configuration plus `rad_heads` (kept query heads per layer) and `rad_mixer`."""

        model_type = PREFIX + family
        rad_heads: list[Any] | None = None
        rad_mixer: dict[str, Any] | None = None

    class HybridForCausalLM(HybridMixin, base_model):  # type: ignore[misc]
        """A base's causal language model with mixers in place of some attention."""

        config_class = HybridConfig

    for kind, title in ((HybridConfig, "HybridConfig"), (HybridForCausalLM, "HybridForCausalLM")):
        kind.__name__ = kind.__qualname__ = name + title
    AutoConfig.register(PREFIX + family, HybridConfig, exist_ok=True)
    AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)
    return HybridConfig, HybridForCausalLM


def register(name: Any, **options: Any) -> None:
    """If `name` (folder or hub id) holds a hybrid, make its family known to the Auto classes."""
    where = {key: value for key, value in options.items() if key in _WHERE}
    try:
        raw, _ = PreTrainedConfig.get_config_dict(name, **where)
    except (OSError, ValueError):
        return  # the caller, AutoConfig, meets the same fault and reports it
    kind = str(raw.get("model_type", ""))
    if kind.startswith(PREFIX):
        hybrid_classes(kind.removeprefix(PREFIX))


def check_base(base: Any) -> None:
    """Raise `ValueError` with one line when `base` cannot become a hybrid.

    The projections themselves are checked where the layers are read (`geometry_of`).
    """
    config = base.config
    family = config.model_type
    if family.startswith(PREFIX):
        raise ValueError(f"cannot convert a {family!r} model: it is a hybrid already")
    layers = getattr(getattr(base, "model", None), "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        raise ValueError(
            f"cannot convert a {family!r} model: it has no model.layers[i].self_attn to replace"
        )
    bounded = [kind for kind in getattr(config, "layer_types", None) or [] if kind != FULL]
    if bounded or getattr(config, "sliding_window", None):
        what = bounded[0] if bounded else f"a sliding window of {config.sliding_window} tokens"
        raise ValueError(
            f"cannot convert a {family!r} model with {what}: only layers of full attention can be "
            "compared"
        )
