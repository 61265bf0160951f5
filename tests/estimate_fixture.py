"""Measuring what the estimate models: FLOPs by torch's counter, memory by torch's profiler."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from rad.data.corpus import Corpus
from rad.estimate.shapes import Model, Shape
from rad.files import write_json
from rad.models.convert import convert
from rad.placement import Placement

aten: Any = torch.ops.aten


# --- FLOPs: operations that the counter does not know, or counts wrongly ----------------------


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q.shape, k.shape, v.shape))


def _attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape))


_attention._get_raw = True  # type: ignore[attr-defined]  # called with tensors, not shapes
_attention_backward._get_raw = True  # type: ignore[attr-defined]


def _addmm(out: Any, a: Any, b: Any, **_: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _baddbmm(out: Any, a: Any, b: Any, **_: Any) -> int:
    return 2 * a[0] * a[1] * a[2] * b[2]


def _solve(system: Any, right: Any, **_: Any) -> int:
    return math.prod(system[:-1]) * right[-1] * system[-1]


def depthwise_backward(grad: Any, x: Any, weight: Any, bias: Any, *rest: Any, **_: Any) -> int:
    """Gradients of a grouped convolution over (B,C,T): as much as the forward pass, each.

    torch 2.13 takes the weight's for one group of all channels: C times too much.
    """
    mask = rest[-1]
    return 2 * grad[0] * grad[2] * math.prod(weight) * (bool(mask[0]) + bool(mask[1]))


COUNTED: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten.addmm_: _addmm,
    aten.baddbmm_: _baddbmm,
    aten.linalg_solve_triangular: _solve,
    aten.convolution_backward: depthwise_backward,
}


def counter() -> FlopCounterMode:
    """torch's counter with the above."""
    return FlopCounterMode(display=False, custom_mapping=COUNTED)


# --- memory ---------------------------------------------------------------------------------


def measured_peak(build: Callable[[], Any], run: Callable[[Any], Any]) -> int:
    """Most bytes of live tensors while `run(build())` runs, by the allocator's own records.

    What `build` makes and keeps is counted, what it only needed is not.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        job = build()
        gc.collect()
        with record_function("rad-run"):
            run(job)
    events = records.profiler.kineto_results.events()  # type: ignore[union-attr]
    start = next(event.start_ns() for event in events if event.name() == "rad-run")
    changes = sorted(
        (event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"
    )
    live = peak = 0
    for moment, change in changes:
        live += change
        if moment >= start:
            peak = max(peak, live)
    return peak


def random_corpus(folder: Path, context: int, vocabulary: int, rows: int = 16) -> Corpus:
    """Random rows in the format of the contract."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split in ("train", "held_out"):
        shape = (rows, context)
        generator.integers(3, vocabulary, shape).astype("<u4").tofile(folder / f"{split}.bin")
        np.full(shape, 255, np.uint8).tofile(folder / f"{split}_weight.bin")
    write_json(
        folder / "manifest.json",
        {
            "context": context,
            "dtype": "<u4",
            "packing": "concatenate",
            "settings_sha256": "x",
            "splits": {split: {"rows": rows} for split in ("train", "held_out")},
        },
    )
    return Corpus(folder)


def both(base: Any, mixer: dict[str, Any], kept: list[tuple[int, int]]) -> tuple[Any, Model, Model]:
    """(student, its estimate's model, the base's)."""
    config = base.config
    placement = Placement(
        base="base",
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        softmax=kept,
        selector="test",
    )
    shape = Shape.of(config.to_dict())
    heads = tuple(tuple(placement.kept_heads(index)) for index in range(shape.layers))
    return convert(base, placement, mixer, "qkvo"), Model(shape, heads, mixer), Model(shape)
