"""The papers' models at their true sizes: converted without weights, aligned one layer at a time.

Shapes come from `rad/estimate/architectures.yaml`; nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from rad.distillation.layerwise import layerwise_backward
from rad.distillation.optimiser import build
from rad.estimate.shapes import Model, Shape, table
from rad.models.convert import convert
from rad.placement import Placement
from rad.settings import MIXER_SETTINGS, StageSettings

PUBLISHED = {  # parameters, of the model cards (a tied head once)
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
}


def config_of(name: str, **changes: Any) -> Any:
    """The transformers configuration of a model of the table."""
    values = {**table()[name], **changes}
    family = values.pop("model_type")
    return AutoConfig.for_model(family, **{k: v for k, v in values.items() if v is not None})


def hollow(name: str) -> Any:
    """The model on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)


def sizes(model: Any) -> dict[str, tuple[int, ...]]:
    """Parameter name -> size."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def placement(shape: Shape, kept: list[tuple[int, int]]) -> Placement:
    """A placement that keeps these (layer, head) pairs."""
    return Placement(
        base="base",
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        softmax=kept,
        selector="test",
    )


def settings_of(mixer: str, **changes: Any) -> dict[str, Any]:
    """Default settings of a mixer with those `changes` that it has."""
    kind = MIXER_SETTINGS[mixer]
    return kind(**{k: v for k, v in changes.items() if k in kind.model_fields}).model_dump()


QUICK = ("meta-llama/Llama-3.2-1B", "Qwen/Qwen2.5-1.5B")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED],
)
def test_every_mixer_converts_the_true_shape(name: str) -> None:
    base, shape = hollow(name), Shape.of(table()[name])
    assert sizes(base) == Model(shape).parameters
    assert Model(shape).count == PUBLISHED[name]
    assert sum(parameter.numel() for parameter in base.parameters()) == PUBLISHED[name]
    # nothing kept; one layer whole and single heads of two groups of another
    every = [(1, head) for head in range(shape.heads)]
    heads = [*every, (2, 0), (2, shape.group), (shape.layers - 1, shape.heads - 1)]
    for mixer in MIXER_SETTINGS:
        forms = ["slots"] if mixer in ("sliding_window", "skip") else ["slots", "parallel"]
        for kept, form in [([], "slots"), *((heads, form) for form in forms)]:
            if shape.layers == 80 and form == "parallel" and mixer != "discrete_mamba2":
                continue  # minutes for nothing new
            chosen, settings = placement(shape, kept), settings_of(mixer, form=form)
            with torch.device("meta"):
                hybrid = convert(base, chosen, settings, "qkvo")
            per_layer = tuple(tuple(chosen.kept_heads(index)) for index in range(shape.layers))
            assert sizes(hybrid) == Model(shape, per_layer, settings).parameters, (mixer, form)
            places = {tensor.device.type for tensor in hybrid.parameters()}
            assert places == {"meta"}, (mixer, form)
            wide = {
                n.rpartition(".")[2] for n, p in hybrid.named_parameters() if p.dtype != base.dtype
            }
            assert wide <= {"A_log", "dt_bias", "D"}


@pytest.mark.parametrize(
    ("name", "mixer"),
    [("meta-llama/Llama-3.2-3B", "mamba2"), ("meta-llama/Llama-3.1-8B", "gated_deltanet")],
)
@pytest.mark.slow
def test_a_full_width_layer_learns_its_attention(name: str, mixer: str) -> None:
    torch.manual_seed(0)
    config = config_of(name, num_hidden_layers=1, vocab_size=512)
    base = LlamaForCausalLM(config).eval().requires_grad_(False)
    assert base.model.layers[0].self_attn.q_proj.in_features in (3072, 4096)
    with torch.no_grad():  # weights of 0.02 leave attention nearly uniform: something to learn
        base.model.layers[0].self_attn.v_proj.weight.mul_(4)
    shape = Shape.of(config.to_dict())
    student = convert(base, placement(shape, []), settings_of(mixer), "qkvo").train()
    rows, time = 2, 64
    stage = StageSettings(loss="align", trainable="mixers", tokens=rows * time, batch_size=rows)
    optimiser, _ = build(student, stage)
    for group in optimiser.param_groups:
        group["lr"] = 1e-3
    tokens = torch.randint(0, 512, (rows, time), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(6):
        losses.append(layerwise_backward(student, base, tokens, torch.ones(rows, time), stage)[0])
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert losses[-1] < 0.8 * losses[0], losses


@pytest.mark.slow
def test_a_full_size_hybrid_survives_its_shards(tmp_path: Path) -> None:
    # Llama-3.2-1B's shape in bfloat16: 2.5 GB of weights, held twice at most
    torch.manual_seed(0)
    name = "meta-llama/Llama-3.2-1B"
    config = config_of(name)
    assert config.vocab_size == 128256
    torch.set_default_dtype(torch.bfloat16)
    try:
        base = LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict())).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    shape = Shape.of(table()[name])
    assert sum(parameter.numel() for parameter in base.parameters()) == PUBLISHED[name]
    kept = [(layer, head) for layer in (3, 11) for head in range(shape.heads)] + [(7, 5)]
    hybrid = convert(base, placement(shape, kept), settings_of("mamba2"), "qkvo")
    del base
    tokens = torch.randint(0, 128256, (1, 24), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = hybrid(tokens, use_cache=False).logits
    assert expected.shape == (1, 24, 128256)
    assert bool(torch.isfinite(expected).all())
    hybrid.save_pretrained(tmp_path, max_shard_size="500MB")
    del hybrid
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 4
    per_layer = tuple(
        tuple(head for layer, head in kept if layer == index) for index in range(shape.layers)
    )
    wanted = Model(shape, per_layer, settings_of("mamba2")).parameters
    found: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        with safe_open(str(shard), framework="np") as tensors:
            for key in tensors.keys():  # noqa: SIM118  (not a dictionary)
                found[key] = tuple(tensors.get_slice(key).get_shape())
    assert found == wanted
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        assert torch.equal(again(tokens, use_cache=False).logits, expected)
