"""What every mixer promises: three equal forms, stated state shapes, starts that can be trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models_fixture import MIXERS, base_model

from rad.kernels import use_reference
from rad.mixers import MIXERS as KINDS
from rad.mixers import Mixer
from rad.mixers.attention import geometry_of
from rad.mixers.discrete_mamba2 import low_rank

RECURRENT = [name for name in MIXERS if name not in ("skip", "sliding_window")]
ALL_HEADS = [0, 1, 2, 3]


def make(
    name: str,
    owned: list[int] | None = None,
    start: str = "qkvo",
    family: str = "qwen2",
    **more: Any,
) -> tuple[Mixer, Any, Any]:
    """(mixer, attention layer it starts from, base) with reproducible weights."""
    base = base_model(family)
    attention = base.model.layers[0].self_attn
    settings = {**MIXERS[name], **more}
    mixer = KINDS[name](
        geometry_of(base.config, attention), ALL_HEADS if owned is None else owned, settings
    )
    mixer.init_random(torch.Generator().manual_seed(3))
    mixer.init_from_attention(attention, start)
    return mixer.eval(), attention, base


def inputs(base: Any, time: int = 21, batch: int = 2) -> tuple[torch.Tensor, Any]:
    torch.manual_seed(time)
    u = torch.randn(batch, time, base.config.hidden_size)
    positions = torch.arange(time).expand(batch, -1)
    return u, base.model.rotary_emb(u, positions)


def _at(rope: Any, span: slice) -> Any:
    return tuple(part[:, span] for part in rope)


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    scale = max(1.0, float(b.detach().abs().max()))
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("owned", [ALL_HEADS, [1, 2], [3]])
@pytest.mark.parametrize("name", RECURRENT)
def test_training_form_equals_the_plain_recurrence(name: str, owned: list[int]) -> None:
    """Outputs, final states and the gradients of every parameter, at a length of no whole chunk."""
    results = []
    for plain in (True, False):
        mixer, _, base = make(name, owned)
        mixer = mixer.double()  # a norm of small sums amplifies what single precision loses
        u = inputs(base)[0].double().requires_grad_()
        valid = torch.ones(u.shape[:2], dtype=torch.bool)
        valid[0, :4] = False
        if plain:
            with use_reference():
                y, state = mixer(u, None, valid)
        else:
            y, state = mixer(u, None, valid)
        (y * y.detach().cos()).sum().backward()
        gradients = [p.grad for p in mixer.parameters() if p.grad is not None]
        results.append([y, *state.values(), u.grad, *gradients])
    for slow, fast in zip(*results, strict=True):
        _close(fast, slow, 1e-9)


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "skip"])
def test_steps_equal_the_sequence(name: str) -> None:
    mixer, _, base = make(name, [0, 1, 3])
    u, rope = inputs(base, time=11)
    whole, last = mixer(u, None, None, rope)
    y, state = mixer(u[:, :4], None, None, _at(rope, slice(0, 4)))
    parts = [y]
    for t in range(4, 11):
        y, state = mixer.step(u[:, t], state, _at(rope, slice(t, t + 1)))
        parts.append(y.unsqueeze(1))
    _close(torch.cat(parts, 1), whole)
    for key, value in last.items():
        _close(state[key].double(), value.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(MIXERS))
def test_states_have_the_stated_shapes_types_and_bytes(name: str, dtype: torch.dtype) -> None:
    mixer, _, base = make(name, [0, 2])
    mixer = mixer.to(dtype)
    for time in (1, 30):
        u, rope = inputs(base, time)
        _, state = mixer(u.to(dtype), None, None, tuple(part.to(dtype) for part in rope))
        spec = mixer.state_spec(dtype)
        assert set(state) == set(spec)
        assert set(state) <= set(type(mixer).state_names)
        size = sum(t.numel() * t.element_size() for t in state.values()) // u.shape[0]
        assert size == mixer.state_bytes(dtype, time)
    for key, (shape, kind) in spec.items():
        assert tuple(state[key].shape[1:]) == shape and state[key].dtype == kind


@pytest.mark.parametrize("owned", [[0, 1], [2], [1, 3]])
@pytest.mark.parametrize("name", RECURRENT)
def test_heads_cut_from_a_full_mixer_compute_the_same(name: str, owned: list[int]) -> None:
    full, _, base = make(name)
    with torch.no_grad():
        for parameter in full.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    part, _, _ = make(name, owned, start="random")
    part.take_heads(full)
    u, _ = inputs(base)
    _close(part(u)[0], full(u)[0][:, :, owned])


# variant -> parts of the input projection that get a gradient at the first step (RAD, section 3.2)
REACHED: dict[str, dict[str, set[str]]] = {
    "mamba2": {"zero": {"z"}, "gate_zero": {"z"}, "value_zero": {"x"}},
    "discrete_mamba2": {"zero": {"x"}, "gate_zero": {"z"}, "value_zero": {"x"}},
    "gated_deltanet": {"gate_zero": {"g"}, "value_zero": {"v"}},
    "gla": {"gate_zero": {"g"}, "value_zero": {"v"}},
    "mamba": {"zero": {"z"}, "gate_zero": {"z"}, "value_zero": {"x"}},
    "longhorn": {"zero": {"z"}, "gate_zero": {"z"}, "value_zero": {"x"}},
}


@pytest.mark.parametrize(
    ("name", "variant"), [(name, variant) for name in REACHED for variant in REACHED[name]]
)
def test_zero_starts_are_silent_and_trainable(name: str, variant: str) -> None:
    """The output is exactly zero, and exactly the parts named above learn from the first step."""
    mixer: Any
    mixer, _, base = make(name, start=variant, family="llama")
    u, _ = inputs(base)
    y, _ = mixer(u)
    assert float(y.detach().abs().max()) == 0.0
    (y * torch.randn_like(y)).sum().backward()
    reached = {
        part
        for part in mixer.parts
        if float(mixer.in_proj.weight.grad[mixer.span(part)].abs().max()) > 0
    }
    assert reached == REACHED[name][variant]


def test_a_zero_start_without_conv_bias_would_be_dead() -> None:
    """Why `zero` keeps the random conv bias: without it no weight of Mamba-2 gets a gradient."""
    mixer: Any
    mixer, _, base = make("mamba2", start="zero")
    with torch.no_grad():
        mixer.conv_bias.zero_()
    y, _ = mixer(inputs(base)[0])
    (y * torch.randn_like(y)).sum().backward()
    assert float(mixer.in_proj.weight.grad.abs().max()) == 0.0


@pytest.mark.parametrize("name", list(MIXERS))
def test_every_mixer_accepts_qkvo_and_says_what_it_refuses(name: str) -> None:
    kind = KINDS[name]
    assert "qkvo" in kind.initialisations
    for variant in {"zero", "gate_zero", "value_zero", "random"} - set(kind.initialisations):
        with pytest.raises(ValueError, match=f"mixer {name} cannot start from '{variant}'"):
            kind.check_initialisation(name, variant)
        with pytest.raises(ValueError, match="cannot start from"):
            make(name, start=variant)


def test_starts_copy_queries_keys_and_values_with_biases() -> None:
    """On grouped attention: per head, B or k is the key row block of the head's kv head."""
    for name, parts in {
        "mamba2": ("C", "B", "x"),
        "mamba": ("C", "B", "x"),
        "gated_deltanet": ("q", "k", "v"),
        "gla": ("q", "k", "v"),
    }.items():
        mixer: Any
        mixer, attention, _ = make(name, [1, 2])
        dim = mixer.geometry.head_dim
        heads = {"q_proj": [1, 2], "k_proj": [0, 1], "v_proj": [0, 1]}
        for part, projection in zip(parts, ("q_proj", "k_proj", "v_proj"), strict=True):
            rows = [h * dim + r for h in heads[projection] for r in range(dim)]
            source = getattr(attention, projection)
            assert torch.equal(mixer.in_proj.weight[mixer.span(part)], source.weight[rows])
            assert torch.equal(mixer.in_proj.bias[mixer.span(part)], source.bias[rows])


def test_row_interleaved_keys_repeat_rows_as_published() -> None:
    mixer: Any
    mixer, attention, _ = make("gated_deltanet", kv_expansion="rows_interleaved", qkv_bias="none")
    assert mixer.in_proj.bias is None
    expected = attention.k_proj.weight.repeat_interleave(2, dim=0)
    assert torch.equal(mixer.in_proj.weight[mixer.span("k")], expected)
    scrambled = expected[: mixer.geometry.head_dim]
    assert not torch.equal(scrambled, attention.k_proj.weight[: mixer.geometry.head_dim])


def test_small_states_start_from_the_nearest_low_rank_product() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2 * 8, 12), torch.randn(2 * 8, 12)
    q_bias, k_bias = torch.randn(16), torch.randn(16)
    c, b = low_rank(q, q_bias, k, k_bias, dim=8, size=3)
    for head in range(2):
        rows = slice(8 * head, 8 * head + 8)
        q1 = torch.cat([q, q_bias[:, None]], 1)[rows]
        k1 = torch.cat([k, k_bias[:, None]], 1)[rows]
        values = torch.linalg.svdvals(q1.T @ k1)
        found = c[3 * head : 3 * head + 3].T @ b[3 * head : 3 * head + 3]
        error = torch.linalg.matrix_norm(q1.T.double() @ k1.double() - found)
        # Eckart-Young: no rank-3 product comes nearer than the remaining singular values
        assert float(error) == pytest.approx(float(values[3:].norm()), rel=1e-4)


def test_state_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="state_size 5 does not divide the head dim 8"):
        make("mamba", state_size=5)
    with pytest.raises(ValueError, match="state_size 16 is above the head dim 8"):
        make("discrete_mamba2", state_size=16)


def test_longhorn_stays_finite_for_huge_and_vanishing_keys() -> None:
    mixer: Any
    for scale in (1e-12, 1e8):
        mixer, _, base = make("longhorn")
        with torch.no_grad():
            mixer.in_proj.weight[mixer.span("B")] *= scale
        u, _ = inputs(base, time=64)
        y, state = mixer(u)
        y.sum().backward()
        assert bool(y.isfinite().all()) and bool(state["ssm"].isfinite().all())
        assert all(bool(p.grad.isfinite().all()) for p in mixer.parameters())


@pytest.mark.parametrize("name", RECURRENT)
def test_random_starts_depend_on_the_seed_alone(name: str) -> None:
    one, _, _ = make(name, start="random")
    two, _, _ = make(name, start="random")
    for mine, other in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(mine, other)
        assert bool(mine.isfinite().all())
