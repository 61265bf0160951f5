"""The chunked and one-step forms equal the plain recurrences in values, gradients and states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rad.kernels import chunks, scan_cached
from rad.kernels.delta import (
    gated_delta_batched,
    gated_delta_chunked,
    gated_delta_recurrent,
    gated_delta_step,
)
from rad.kernels.gla import gla_batched, gla_chunked, gla_recurrent, gla_step
from rad.kernels.scan import (
    selective_scan_batched,
    selective_scan_chunked,
    selective_scan_recurrent,
    selective_scan_step,
)
from rad.kernels.ssd import ssd_batched, ssd_chunked, ssd_recurrent, ssd_step

HEADS, CHANNELS, SIZE = 4, 3, 5


@dataclass(frozen=True)
class Form:
    """The functions of one recurrence, and inputs in their order without the state."""

    recurrent: Callable[..., tuple[Tensor, Tensor]]
    chunked: Callable[..., tuple[Tensor, Tensor]]
    step: Callable[..., tuple[Tensor, Tensor]]
    inputs: Callable[[int, int, float, torch.dtype], list[Tensor]]


def _ssd_inputs(batch: int, time: int, decay: float, dtype: torch.dtype) -> list[Tensor]:
    shape = (batch, time, HEADS)
    log_a = -decay * torch.rand(shape, dtype=dtype)
    b, c = (torch.randn(batch, time, groups, SIZE, dtype=dtype) for groups in (2, 2))
    return [torch.randn(*shape, CHANNELS, dtype=dtype), log_a, b, c]


def _delta_inputs(batch: int, time: int, decay: float, dtype: torch.dtype) -> list[Tensor]:
    shape = (batch, time, HEADS)
    q, k = (torch.randn(*shape, SIZE, dtype=dtype) for _ in range(2))
    v = torch.randn(*shape, CHANNELS, dtype=dtype)
    log_a = -decay * torch.rand(shape, dtype=dtype)
    return [q, F.normalize(k, dim=-1), v, log_a, torch.rand(shape, dtype=dtype)]


def _gla_inputs(batch: int, time: int, decay: float, dtype: torch.dtype) -> list[Tensor]:
    shape = (batch, time, HEADS)
    q, k, gate = (torch.randn(*shape, SIZE, dtype=dtype) for _ in range(3))
    return [q, k, torch.randn(*shape, CHANNELS, dtype=dtype), -decay * gate.sigmoid()]


def _scan_inputs(batch: int, time: int, decay: float, dtype: torch.dtype) -> list[Tensor]:
    shape = (batch, time, HEADS, CHANNELS, SIZE)
    a = (-decay * torch.rand(shape, dtype=dtype)).exp()
    # nothing may be divided by a
    a = torch.where(torch.rand(shape) < 0.1, torch.zeros_like(a), a)
    a = torch.where(torch.rand(shape) < 0.1, torch.ones_like(a), a)
    return [a, torch.randn(shape, dtype=dtype), torch.randn(batch, time, HEADS, SIZE, dtype=dtype)]


FORMS = {
    "ssd": Form(ssd_recurrent, ssd_chunked, ssd_step, _ssd_inputs),
    "gated_delta": Form(
        gated_delta_recurrent, gated_delta_chunked, gated_delta_step, _delta_inputs
    ),
    "gla": Form(gla_recurrent, gla_chunked, gla_step, _gla_inputs),
    "selective_scan": Form(
        selective_scan_recurrent, selective_scan_chunked, selective_scan_step, _scan_inputs
    ),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def _state(batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, HEADS, CHANNELS, SIZE, dtype=dtype)


def _results(
    function: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], **kwargs: Any
) -> list[Tensor]:
    """y, the last state and the gradients of all inputs."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y, state = function(*leaves, **kwargs)
    (y * y.detach().sin() + y).sum().add((state * state.detach().cos()).sum()).backward()
    return [y.detach(), state.detach(), *(leaf.grad for leaf in leaves)]


def _assert_equal(fast: list[Tensor], slow: list[Tensor]) -> None:
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@every_form
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize(
    ("time", "chunk"), [(1, 8), (7, 8), (8, 8), (9, 4), (24, 8), (25, 64), (100, 32)]
)
def test_chunked_equals_the_recurrence(form: Form, time: int, chunk: int, with_state: bool) -> None:
    torch.manual_seed(time)
    inputs = form.inputs(2, time, 2.0, torch.float64)
    inputs += [_state(2)] if with_state else []
    fast = _results(form.chunked, inputs, chunk=chunk)
    _assert_equal(fast, _results(form.recurrent, inputs))


@every_form
@pytest.mark.parametrize("decay", [0.1, 3.0, 60.0])
@pytest.mark.parametrize("time", [1, 7, 8, 9, 24, 25, 100])
def test_chunked_is_accurate_in_float32(form: Form, time: int, decay: float) -> None:
    """As close to float64 as the recurrence in float32 may be, also under strong decay."""
    torch.manual_seed(time)
    inputs = [*form.inputs(2, time, decay, torch.float32), _state(2, torch.float32)]
    exact = _results(form.recurrent, [t.double() for t in inputs])
    for fast, slow in zip(_results(form.chunked, inputs), exact, strict=True):
        assert fast.dtype == torch.float32
        error = (fast - slow).abs().max() / slow.abs().max()
        assert error.item() < 3e-6


@every_form
@pytest.mark.parametrize("decay", [50.0, 1e4])
def test_strong_decay_gives_finite_gradients(form: Form, decay: float) -> None:
    torch.manual_seed(0)
    inputs = form.inputs(1, 40, 0.1, torch.float32)
    # every step forgets everything; gates of log a, or of a in the selective scan
    gate = {"ssd": 1, "gated_delta": 3, "gla": 3}.get(_name(form))
    if gate is None:
        inputs[0] = torch.zeros_like(inputs[0])
    else:
        inputs[gate] = torch.full_like(inputs[gate], -decay)
    fast = _results(form.chunked, inputs, chunk=32)
    assert all(bool(t.isfinite().all()) for t in fast)
    for one, other in zip(fast, _results(form.recurrent, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def _name(form: Form) -> str:
    return next(name for name, other in FORMS.items() if other is form)


@pytest.mark.parametrize("name", ["ssd", "gated_delta", "gla"])
def test_a_decay_of_zero_forgets_everything(name: str) -> None:
    torch.manual_seed(0)
    form = FORMS[name]
    inputs = [*form.inputs(1, 20, 1.0, torch.float64), _state(1)]
    with torch.no_grad():
        inputs[1 if name == "ssd" else 3][:, [0, 7, 12]] = float("-inf")
    _assert_equal(_results(form.chunked, inputs, chunk=8), _results(form.recurrent, inputs))


@every_form
def test_chunked_passes_a_finite_difference_check(form: Form) -> None:
    torch.manual_seed(0)
    inputs = [*form.inputs(1, 5, 1.0, torch.float64), _state(1)]
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *args: form.chunked(*args, chunk=3), leaves)


@every_form
def test_step_passes_a_finite_difference_check(form: Form) -> None:
    torch.manual_seed(0)
    inputs = [t[:, 0] for t in form.inputs(1, 1, 1.0, torch.float64)]
    leaves = [t.detach().clone().requires_grad_() for t in (*inputs, _state(1))]
    assert torch.autograd.gradcheck(form.step, leaves)


@every_form
def test_prefill_then_steps_equal_the_whole(form: Form) -> None:
    torch.manual_seed(0)
    inputs = form.inputs(2, 21, 1.0, torch.float64)
    whole, last = form.chunked(*inputs, chunk=8)
    y, state = form.chunked(*(t[:, :13] for t in inputs), chunk=8)
    outputs = [y]
    for t in range(13, 21):
        y, state = form.step(*(part[:, t] for part in inputs), state)
        outputs.append(y.unsqueeze(1))
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-9)


@every_form
def test_a_gradient_of_only_one_output(form: Form) -> None:
    """The other output's gradient is then undefined."""
    torch.manual_seed(0)
    inputs = [*form.inputs(2, 11, 1.0, torch.float64), _state(2)]
    for output in (0, 1):
        grads = []
        for function in (form.chunked, form.recurrent):
            leaves = [t.detach().clone().requires_grad_() for t in inputs]
            function(*leaves)[output].square().sum().backward()
            grads.append([t.new_zeros(t.shape) if t.grad is None else t.grad for t in leaves])
        _assert_equal(*grads)


@every_form
def test_rows_are_worked_on_in_blocks(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    inputs = [*form.inputs(3, 11, 1.0, torch.float64), _state(3)]
    whole = _results(form.chunked, inputs, chunk=4)
    monkeypatch.setattr(chunks, "_CACHED_ELEMENTS", 1)
    monkeypatch.setattr(scan_cached, "_STATE_ELEMENTS", 1)
    _assert_equal(_results(form.chunked, inputs, chunk=4), whole)


@every_form
@pytest.mark.parametrize("reentrant", [False, True])
def test_chunked_works_under_activation_checkpointing(form: Form, reentrant: bool) -> None:
    torch.manual_seed(0)
    inputs = [*form.inputs(2, 11, 1.0, torch.float64), _state(2)]

    def kept(*args: Tensor) -> Any:
        return checkpoint(lambda *a: form.chunked(*a, chunk=4), *args, use_reentrant=reentrant)

    _assert_equal(_results(kept, inputs), _results(form.recurrent, inputs))


@every_form
def test_chunked_compiles_into_one_graph(form: Form) -> None:
    torch.manual_seed(0)
    inputs = [*form.inputs(2, 6, 1.0, torch.float64), _state(2)]
    compiled = torch.compile(
        lambda *args: form.chunked(*args, chunk=4),
        backend="aot_eager",
        fullgraph=True,
        dynamic=False,
    )
    _assert_equal(_results(compiled, inputs), _results(form.recurrent, inputs))


def _batched_ssd(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Any:
    split = (2, 2)
    y, last = ssd_batched(
        x.unflatten(2, split), log_a.unflatten(2, split), b, c, state.reshape(2, 2, -1, SIZE), 4
    )
    return y.flatten(2, 3), last.reshape(state.shape)


BATCHED = {
    "ssd": _batched_ssd,
    "gated_delta": lambda *args: gated_delta_batched(*args, 4),
    "gla": lambda *args: gla_batched(*args, 4),
    "selective_scan": lambda *args: selective_scan_batched(*args, 4),
}


@pytest.mark.parametrize("name", BATCHED)
def test_the_form_over_all_chunks_at_once_equals_the_recurrence(name: str) -> None:
    torch.manual_seed(0)
    inputs = [*FORMS[name].inputs(2, 12, 1.0, torch.float64), _state(2)]
    _assert_equal(_results(BATCHED[name], inputs), _results(FORMS[name].recurrent, inputs))


@pytest.mark.parametrize("name", ["ssd", "gated_delta", "gla", "selective_scan"])
def test_backward_keeps_little_more_than_the_inputs(name: str) -> None:
    torch.manual_seed(0)
    inputs = FORMS[name].inputs(1, 256, 1.0, torch.float32)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        FORMS[name].chunked(*(t.requires_grad_() for t in inputs), chunk=64)
    assert sum(kept.values()) < 1.3 * sum(t.numel() for t in inputs)


@pytest.mark.parametrize(("b_groups", "c_groups"), [(1, 1), (2, 2), (4, 4), (1, 4), (2, 1)])
def test_ssd_groups_share_keys_and_queries(b_groups: int, c_groups: int) -> None:
    torch.manual_seed(0)
    x, log_a, *_ = _ssd_inputs(2, 19, 1.0, torch.float64)
    b, c = (
        torch.randn(2, 19, groups, SIZE, dtype=torch.float64) for groups in (b_groups, c_groups)
    )

    def repeated(x: Tensor, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor) -> Any:
        """Head h reads group h // (H // G)."""
        heads = torch.arange(HEADS)
        b, c = (t[:, :, heads // (HEADS // t.shape[2])] for t in (b, c))
        return ssd_recurrent(x, log_a, b, c, state)

    inputs = [x, log_a, b, c, _state(2)]
    expected = _results(repeated, inputs)
    _assert_equal(_results(ssd_recurrent, inputs), expected)
    _assert_equal(_results(ssd_chunked, inputs, chunk=8), expected)


@settings(max_examples=25, deadline=None)
@given(
    time=st.integers(1, 40),
    chunk=st.integers(1, 48),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    channels=st.integers(1, 4),
    size=st.integers(1, 4),
    grouped=st.booleans(),
)
def test_ssd_of_any_shape_equals_the_recurrence(
    time: int, chunk: int, batch: int, heads: int, channels: int, size: int, grouped: bool
) -> None:
    torch.manual_seed(time)
    groups = 1 if grouped else heads
    x = torch.randn(batch, time, heads, channels, dtype=torch.float64)
    log_a = -torch.rand(batch, time, heads, dtype=torch.float64)
    b, c = (torch.randn(batch, time, groups, size, dtype=torch.float64) for _ in range(2))
    inputs = [x, log_a, b, c]
    _assert_equal(_results(ssd_chunked, inputs, chunk=chunk), _results(ssd_recurrent, inputs))


def test_groups_that_do_not_divide_the_heads_are_refused() -> None:
    x, log_a, _, c = _ssd_inputs(1, 4, 1.0, torch.float32)
    b = torch.randn(1, 4, 3, SIZE)
    for function in (ssd_recurrent, ssd_chunked):
        with pytest.raises(ValueError, match="3 groups do not divide 4 heads"):
            function(x, log_a, b, c)


@every_form
def test_a_chunk_of_no_steps_is_refused(form: Form) -> None:
    with pytest.raises(ValueError, match="chunk 0"):
        form.chunked(*form.inputs(1, 4, 1.0, torch.float32), chunk=0)


def test_ssd_matches_a_hand_computed_example() -> None:
    one = torch.ones(1, 3, 1, 1)
    half = torch.full((1, 3, 1), 0.5).log()
    y, state = ssd_chunked(one * 2, half, one, one * 3)
    # S: 2, 1 + 2, 1.5 + 2; y = 3 S
    assert y.flatten().tolist() == pytest.approx([6.0, 9.0, 10.5])
    assert state.item() == pytest.approx(3.5)


def test_gated_delta_overwrites_what_a_key_held() -> None:
    key = torch.tensor([1.0, 0.0]).expand(1, 2, 1, 2)
    values = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
    full, none = torch.ones(1, 2, 1), torch.zeros(1, 2, 1)
    y, state = gated_delta_chunked(key, key, values, none, full)
    assert y.flatten().tolist() == pytest.approx([3.0, 5.0])
    assert state.flatten().tolist() == pytest.approx([5.0, 0.0])


def test_gla_equals_its_matrix_form() -> None:
    """Independent: every pair of steps with the decay between them, no chunks, no recurrence."""
    torch.manual_seed(0)
    q, k, v, log_a = _gla_inputs(2, 23, 2.0, torch.float64)
    state = _state(2)
    between = torch.zeros(2, 23, 23, HEADS, SIZE, dtype=torch.float64)
    for i in range(23):
        for j in range(i + 1):
            between[:, i, j] = log_a[:, j + 1 : i + 1].sum(1).exp()
    scores = torch.einsum("bihn,bjhn,bijhn->bhij", q, k, between)
    total = log_a.cumsum(1)
    expected = torch.einsum("bhij,bjhp->bihp", scores.tril(), v)
    expected += torch.einsum("bihn,bhpn->bihp", q * total.exp(), state)
    last = state * total[:, -1].exp().unsqueeze(-2)
    last += torch.einsum("bjhp,bjhn->bhpn", v, k * between[:, -1])
    y, new = gla_chunked(q, k, v, log_a, state, chunk=8)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(new, last, rtol=1e-9, atol=1e-9)
