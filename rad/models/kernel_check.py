"""The start-up self-test of the kernels that a hybrid uses, at the sizes it uses them with."""

from __future__ import annotations

from typing import Any

from rad.kernels.selftest import self_test
from rad.models.hybrid import HybridAttention


def kernel_records(model: Any, device: Any = None) -> list[dict[str, Any]]:
    """One record per different kernel and size among the mixers of `model`, on `device` or its own.

    A layer that keeps some heads runs the same kernel with fewer heads: it is not tested again.
    """
    cases: dict[tuple[Any, ...], dict[str, Any]] = {}
    for module in model.modules():
        case = module.mixer.kernel_case() if isinstance(module, HybridAttention) else None
        if case is not None:
            sizes = tuple(case[key] for key in ("op", "channels", "state_size", "chunk", "kernel"))
            cases.setdefault(sizes, case)
    where = device or model.device
    return [self_test(**case, device=where, dtype=model.dtype) for case in cases.values()]
