"""The adapters onto mamba_ssm and fla, run on a CPU against their real packages.

mamba_ssm: its Triton kernels, forward and backward, under Triton's interpreter. The interpreter has
to be chosen before Triton is first imported and needs three functions replaced that ask for a GPU,
so that all of it happens in a process of its own: this file, run as a script.

fla: its Triton kernels do not run under the interpreter. But fla ships the same operations as plain
PyTorch; our adapters call those, with the arguments checked against the kernels' signatures.

Skipped where the packages are missing; docs/install.md says how to make the environment.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rad.kernels import dispatch, selftest

HOW = "docs/install.md, 'Triton kernels on a CPU', makes the environment for this test"


def _missing(*packages: str) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def _needs(*packages: str) -> pytest.MarkDecorator:
    missing = _missing(*packages)
    return pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} missing: {HOW}")


# chunk 16 throughout; slow: decays of 1 - 1e-4 down to exactly 1, as heads with a long memory have
CASES: dict[str, dict[str, Any]] = {
    "one_chunk": dict(time=16, groups=(1, 1), state=False),
    "shorter_than_a_chunk": dict(time=7, groups=(1, 1), state=True),
    "chunks_and_remainder": dict(time=37, groups=(2, 2), state=False),
    "with_state": dict(time=37, groups=(2, 2), state=True),
    "unequal_groups": dict(time=21, heads=4, groups=(2, 4), state=True),
    "slow_decay": dict(time=37, groups=(1, 1), state=True, decay=1e-4),
}


# --- in the process of its own ----------------------------------------------------------------


def _prepare_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET=1 must be set before Triton is imported")
    from triton.runtime.autotuner import Autotuner

    device = types.SimpleNamespace(multi_processor_count=1, name="interpreter", major=9, minor=0)
    torch.cuda.device = lambda *args: contextlib.nullcontext()
    torch.cuda.get_device_properties = lambda *args: device
    Autotuner._bench = lambda self, *args, **kwargs: 1.0


def _errors(
    time: int, groups: tuple[int, int], state: bool, heads: int = 2, decay: float = 2.0
) -> dict[str, float]:
    """Relative errors of the adapter in float32 against the recurrence in float64."""
    from rad.kernels.mamba_ssm import ssd_mamba_ssm

    generator = torch.Generator().manual_seed(time)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    channels, size = 24, 16
    log_a = -decay * torch.rand(2, time, heads, generator=generator)
    log_a[:, 1::5] = 0.0
    b, c = (normal(2, time, count, size) / 4 for count in groups)
    values = {"x": normal(2, time, heads, channels), "log_a": log_a, "b": b, "c": c}
    if state:
        values["state"] = normal(2, heads, channels, size)
    weights = normal(2, time, heads, channels), normal(2, heads, channels, size)

    def outcome(form: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().clone().to(dtype).requires_grad_() for t in values.values()]
        y, last = form(*leaves)
        ((y * weights[0]).sum() + (last * weights[1]).sum()).backward()
        gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
        assert len(gradients) == len(leaves)
        return [y.detach(), last.detach(), *gradients]

    got = outcome(lambda *args: ssd_mamba_ssm(*args, chunk=16), torch.float32)
    truth = outcome(dispatch.OPS["ssd"].reference, torch.float64)
    names = ["y", "final state", *(f"gradient of {name}" for name in values)]
    return {
        name: float((a - b).abs().max() / b.abs().max())
        for name, a, b in zip(names, got, truth, strict=True)
    }


def _main() -> None:
    _prepare_interpreter()
    result: dict[str, Any] = {name: _errors(**case) for name, case in CASES.items()}
    # the whole way of a training run: dispatch, adapter, kernel, self-test
    dispatch.chosen = lambda *args, **kwargs: (
        "reference" if dispatch._reference.get() else "mamba_ssm"
    )
    sizes: dict[str, Any] = dict(heads=4, groups=2, channels=16, state_size=16, chunk=16)
    result["self_test"] = [
        selftest.self_test("ssd", device="cpu", dtype=dtype, **sizes)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    result["stub_left_behind"] = "selective_scan_cuda" in sys.modules
    print(json.dumps(result))


# --- mamba_ssm ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    finished = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    result: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return result


@_needs("triton", "mamba_ssm")
@pytest.mark.parametrize("case", list(CASES))
def test_mamba_ssm_equals_the_recurrence(case: str, interpreted: dict[str, Any]) -> None:
    errors = interpreted[case]
    inputs = ["x", "log_a", "b", "c", *(["state"] if CASES[case]["state"] else [])]
    assert list(errors) == ["y", "final state", *(f"gradient of {name}" for name in inputs)]
    assert max(errors.values()) < 1e-4, errors


@_needs("triton", "mamba_ssm")
def test_mamba_ssm_passes_the_self_test(interpreted: dict[str, Any]) -> None:
    single, half = interpreted["self_test"]
    assert (single["dtype"], half["dtype"]) == ("float32", "bfloat16")
    for record in (single, half):
        assert record["kernel"] == "mamba_ssm" and record["passed"], record


@_needs("triton", "mamba_ssm")
def test_the_stand_in_for_the_compiled_extension_is_gone_again(interpreted: dict[str, Any]) -> None:
    compiled = importlib.util.find_spec("selective_scan_cuda") is not None
    assert interpreted["stub_left_behind"] is compiled


# --- fla ------------------------------------------------------------------------------------


def _naive_simple_gla(naive: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    del given["chunk_size"]
    return naive.naive_recurrent_simple_gla(**given)


def _naive_gated_delta_rule(naive: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    del given["chunk_size"], given["use_qk_l2norm_in_kernel"]
    return naive.naive_recurrent_gated_delta_rule(**given)


def _naive_gla(naive: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    # this one always scales the query by 1/sqrt(N), where the kernel takes `scale`
    query = given.pop("q") * given.pop("scale") * given["k"].shape[-1] ** 0.5
    return naive.naive_recurrent_gla(q=query, gk=given.pop("g"), **given)


NAIVE: dict[str, tuple[str, str, Callable[[Any, dict[str, Any]], tuple[Tensor, Tensor]]]] = {
    "ssd": ("fla.ops.simple_gla", "chunk_simple_gla", _naive_simple_gla),
    "gated_delta": ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule", _naive_gated_delta_rule),
    "gla": ("fla.ops.gla", "chunk_gla", _naive_gla),
}


@_needs("triton", "fla")
@pytest.mark.filterwarnings("ignore:Triton is not supported")
@pytest.mark.parametrize("op", list(NAIVE))
def test_fla_adapters_agree_with_its_own_reference(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name, call = NAIVE[op]
    package = importlib.import_module(module)
    naive = importlib.import_module(f"{module}.naive")
    signature = inspect.signature(getattr(package, name))
    seen = []

    def kernel(**given: Any) -> tuple[Tensor, Tensor]:
        signature.bind(**given)  # raises TypeError for a keyword that the kernel does not have
        seen.append(set(given))
        return call(naive, dict(given))

    monkeypatch.setattr(package, name, kernel)
    monkeypatch.setattr(
        dispatch,
        "chosen",
        lambda *args, **kwargs: "reference" if dispatch._reference.get() else "fla",
    )
    for dtype in (torch.float32, torch.bfloat16):
        record = selftest.self_test(
            op, device="cpu", dtype=dtype, heads=4, groups=2, channels=6, state_size=5, chunk=8
        )
        assert record["kernel"] == "fla" and record["passed"], record
    assert len(seen) == 2 and {"initial_state", "output_final_state", "scale"} <= seen[0]


if __name__ == "__main__":
    _main()
