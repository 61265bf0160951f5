"""Which code computes a recurrence, what dtypes come back, and that the self-test can fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rad.kernels import dispatch
from rad.kernels.dispatch import OPS, KernelError, chosen, use_reference
from rad.kernels.selftest import require, self_test

BOTH = ("mamba_ssm", "fla")
HOPPER = (9, 0)
SIZES: dict[str, Any] = dict(heads=4, groups=2, channels=6, state_size=5, chunk=8)

RUN: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "ssd": dispatch.ssd,
    "gated_delta": dispatch.gated_delta,
    "gla": dispatch.gla,
    "selective_scan": dispatch.selective_scan,
}
SHAPES: dict[str, list[tuple[int, ...]]] = {
    # without batch and time
    "ssd": [(4, 6), (4,), (2, 5), (1, 5)],
    "gated_delta": [(4, 5), (4, 5), (4, 6), (4,), (4,)],
    "gla": [(4, 5), (4, 5), (4, 6), (4, 5)],
    "selective_scan": [(4, 6, 5), (4, 6, 5), (4, 5)],
}
STATE = (2, 4, 6, 5)


def _inputs(op: str, time: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(time)
    tensors = []
    for name, shape in zip(OPS[op].inputs, SHAPES[op], strict=True):
        t = torch.randn(2, time, *shape, generator=generator, dtype=torch.float64) / 2
        if name == "log_a":
            t = -t.abs()
        elif name in ("a", "beta"):
            t = t.sigmoid()
        tensors.append(t.to(dtype))
    return tensors


def _state() -> Tensor:
    return torch.randn(STATE, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@pytest.fixture(params=list(OPS))
def op(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


# --- the choice -----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", dispatch.KERNELS)
@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_without_cuda_every_setting_means_pytorch(op: str, device: str, kernel: str) -> None:
    assert chosen(op, device, kernel, installed=BOTH) == "torch"


@pytest.mark.parametrize(
    ("op", "capability", "installed", "expected"),
    [
        ("ssd", HOPPER, BOTH, "mamba_ssm"),
        ("ssd", HOPPER, ("fla",), "fla"),
        ("ssd", HOPPER, (), "torch"),
        ("ssd", (8, 6), BOTH, "mamba_ssm"),
        ("ssd", (12, 0), BOTH, "mamba_ssm"),
        ("ssd", (7, 5), BOTH, "torch"),
        ("gated_delta", HOPPER, BOTH, "fla"),
        ("gated_delta", HOPPER, ("mamba_ssm",), "torch"),
        ("gla", HOPPER, BOTH, "fla"),
        ("selective_scan", HOPPER, BOTH, "torch"),
    ],
)
def test_auto_on_cuda_follows_capability_and_what_is_installed(
    op: str, capability: tuple[int, int], installed: tuple[str, ...], expected: str
) -> None:
    device = torch.device("cuda", 0)
    assert chosen(op, device, "auto", capability=capability, installed=installed) == expected


def test_a_named_kernel_is_taken_whatever_auto_would_do() -> None:
    known: dict[str, Any] = dict(capability=HOPPER, installed=BOTH)
    assert chosen("ssd", "cuda", "fla", **known) == "fla"
    assert chosen("ssd", "cuda", "torch", **known) == "torch"


def test_float64_has_no_compiled_kernel() -> None:
    known: dict[str, Any] = dict(capability=HOPPER, installed=BOTH, dtype=torch.float64)
    assert chosen("ssd", "cuda", "auto", **known) == "torch"
    with pytest.raises(KernelError, match="kernel: mamba_ssm has no float64"):
        chosen("ssd", "cuda", "mamba_ssm", **known)


@pytest.mark.parametrize("kernel", BOTH)
def test_a_named_kernel_that_is_not_installed_is_one_clear_line(kernel: str) -> None:
    with pytest.raises(KernelError) as error:
        chosen("ssd", "cuda", kernel, capability=HOPPER, installed=())
    message = str(error.value)
    assert f"kernel: {kernel} is not installed" in message
    assert "radbench[cuda]" in message and "kernel: torch" in message
    assert "\n" not in message


def test_kernels_and_operations_that_do_not_exist() -> None:
    with pytest.raises(KernelError, match="kernel: mamba_ssm has no gla: set one of auto, torch"):
        chosen("gla", "cuda", "mamba_ssm", capability=HOPPER, installed=BOTH)
    with pytest.raises(KernelError, match="unknown kernel 'triton': one of auto, torch"):
        chosen("gla", "cpu", "triton")
    with pytest.raises(KernelError, match="unknown operation 'rwkv': one of ssd"):
        chosen("rwkv", "cpu")


def test_the_error_of_a_broken_package_is_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dispatch.Form:
        raise ImportError("libcudart.so.13: cannot open shared object file")

    op = dataclasses.replace(OPS["gla"], cuda={"fla": broken})
    monkeypatch.setitem(OPS, "gla", op)
    monkeypatch.setattr(dispatch, "chosen", lambda *args, **kwargs: "fla")
    with pytest.raises(ImportError, match=r"libcudart\.so\.13"):
        dispatch.gla(*_inputs("gla", 3))


def test_an_adapter_gets_sequences_and_pytorch_the_single_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def adapter(*args: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        calls.append((args[0].shape[1], args[-1].shape, chunk))
        return OPS["gla"].reference(*args)

    op = dataclasses.replace(OPS["gla"], cuda={"fla": lambda: adapter})
    monkeypatch.setitem(OPS, "gla", op)
    monkeypatch.setattr(dispatch, "chosen", lambda *args, **kwargs: "fla")
    dispatch.gla(*_inputs("gla", 3), _state(), chunk=16)
    dispatch.gla(*_inputs("gla", 1), _state(), chunk=16)
    assert calls == [(3, STATE, 16)]


# --- the forms ------------------------------------------------------------------------------


def test_use_reference_runs_the_plain_recurrence_within_it_only(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms = []

    def noted(name: str) -> dispatch.Form:
        form = getattr(OPS[op], name)

        def call(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            forms.append(name)
            return form(*args, **kwargs)

        return call

    names = ("reference", "chunked", "step")
    monkeypatch.setitem(OPS, op, dataclasses.replace(OPS[op], **{n: noted(n) for n in names}))
    with use_reference():
        assert chosen(op, "cpu") == "reference"
        RUN[op](*_inputs(op, 3))
        with pytest.raises(RuntimeError, match="in it"), use_reference():
            raise RuntimeError("in it")
        RUN[op](*_inputs(op, 1))
    assert chosen(op, "cpu") == "torch"
    RUN[op](*_inputs(op, 3))
    RUN[op](*_inputs(op, 1))
    assert forms == ["reference", "reference", "chunked", "step"]


@pytest.mark.parametrize("with_state", [False, True])
def test_one_token_equals_the_recurrence(op: str, with_state: bool) -> None:
    outcomes = []
    for reference in (False, True):
        leaves = [t.requires_grad_() for t in _inputs(op, 1)]
        state = _state().requires_grad_() if with_state else None
        if reference:
            with use_reference():
                y, last = RUN[op](*leaves, state)
        else:
            y, last = RUN[op](*leaves, state)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        ((y * weights).sum() + last.square().sum()).backward()
        tensors = [y, last, *(t.grad for t in leaves), state.grad if state is not None else None]
        outcomes.append([t for t in tensors if t is not None])
    assert outcomes[0][0].shape == (2, 1, 4, 6) and outcomes[0][1].shape == STATE
    for got, truth in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-12)


def test_prefill_then_steps_equals_the_whole(op: str) -> None:
    inputs = _inputs(op, 11)
    whole, end = RUN[op](*inputs, chunk=4)
    y, state = RUN[op](*(t[:, :8] for t in inputs), chunk=4)
    parts = [y]
    for t in range(8, 11):
        y, state = RUN[op](*(x[:, t : t + 1] for x in inputs), state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state, end, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("time", [1, 5])
@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_outputs_keep_the_value_dtype_and_states_stay_wide(
    op: str, dtype: torch.dtype, state_dtype: torch.dtype, reference: bool, time: int
) -> None:
    inputs = _inputs(op, time, dtype)
    if reference:
        with use_reference():
            y, state = RUN[op](*inputs, _state().to(dtype))
    else:
        y, state = RUN[op](*inputs, _state().to(dtype), chunk=4)
    assert y.dtype == dtype and state.dtype == state_dtype


def test_the_value_input_alone_decides_the_output_dtype(op: str) -> None:
    inputs = _inputs(op, 5, torch.float32)
    index = OPS[op].inputs.index(OPS[op].value)
    inputs[index] = inputs[index].bfloat16()
    y, state = RUN[op](*inputs, chunk=4)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32


@pytest.mark.parametrize("time", [1, 9])
def test_autocast_does_not_lower_the_precision_within(op: str, time: int) -> None:
    inputs = _inputs(op, time, torch.float32)
    plain, state = RUN[op](*inputs, chunk=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, cast_state = RUN[op](*inputs, chunk=4)
    assert torch.equal(y, plain) and torch.equal(cast_state, state)


# --- the self-test --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_self_test_passes_on_this_machine(op: str, dtype: torch.dtype) -> None:
    record = self_test(op, device="cpu", dtype=dtype, **SIZES)
    assert record["passed"] and record["kernel"] == "torch" and record["op"] == op
    gradients = {f"gradient of {name}" for name in (*OPS[op].inputs, "initial state")}
    assert set(record["errors"]) == {"y", "final state", *gradients}
    require([record])


class _WrongGradient(torch.autograd.Function):
    """Identity whose gradient is 5 % too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 1.05 * gradient


def _wrong_gradient(op: str, name: str) -> dispatch.Form:
    right, index = OPS[op].chunked, OPS[op].inputs.index(name)

    def wrong(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        changed = list(args)
        changed[index] = _WrongGradient.apply(changed[index])
        return right(*changed, **kwargs)

    return wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, entry in OPS.items() for name in entry.inputs]
)
def test_the_self_test_finds_a_wrong_gradient_behind_right_values(
    op: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = dataclasses.replace(OPS[op], chunked=_wrong_gradient(op, name))
    monkeypatch.setitem(OPS, op, wrong)
    record = self_test(op, device="cpu", dtype=dtype, **SIZES)
    assert not record["passed"]
    over = {key for key, error in record["errors"].items() if error > record["threshold"]}
    assert over == {f"gradient of {name}"}
    with pytest.raises(KernelError) as error:
        require([record])
    message = str(error.value)
    assert message.startswith(f"kernel torch computes {op} wrongly on cpu")
    assert f"in gradient of {name}, allowed" in message and "\n" not in message


def test_the_self_test_finds_a_wrong_state_and_a_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    right = OPS["ssd"].chunked

    def spoiled(change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> dict[str, Any]:
        def form(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return change(*right(*args, **kwargs))

        monkeypatch.setitem(OPS, "ssd", dataclasses.replace(OPS["ssd"], chunked=form))
        return self_test("ssd", device="cpu", dtype=torch.float32, **SIZES)

    wrong = spoiled(lambda y, state: (y, 0.9 * state))
    assert not wrong["passed"] and wrong["errors"]["final state"] > 0.05
    not_a_number = spoiled(lambda y, state: (y * float("nan"), state))
    assert not not_a_number["passed"] and not_a_number["errors"]["y"] == float("inf")


def test_the_remedy_is_named_for_a_compiled_kernel() -> None:
    record = self_test("ssd", device="cpu", dtype=torch.float32, **SIZES)
    failed = {
        **record,
        "kernel": "fla",
        "passed": False,
        "errors": {"y": 0.0, "gradient of b": 0.4},
    }
    with pytest.raises(KernelError, match=r"kernel fla computes ssd .* 4\.0e-01 in gradient of b"):
        require([record, failed])
    with pytest.raises(KernelError, match="set `kernel: torch`"):
        require([failed])


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (2, 1), (3, 3), (6, 3), (32, 8), (8, 8)])
def test_the_self_test_runs_any_number_of_heads_and_groups(heads: int, groups: int) -> None:
    sizes = {**SIZES, "heads": heads, "groups": groups}
    record = self_test("ssd", device="cpu", dtype=torch.float32, **sizes)
    assert record["passed"] and record["heads"] == min(heads, 4)
    assert record["heads"] % record["groups"] == 0
