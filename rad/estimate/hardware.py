"""GPUs that an estimate can be made for: memory and peak rates, from the vendor's sheets.

Rates are of matrix products without sparsity; float32 is what PyTorch uses unless TF32 is asked
for, which this package does not do.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """`memory` in bytes that a process can have, rates in FLOP/s, `bandwidth` in bytes/s."""

    title: str
    memory: float
    bfloat16: float
    float32: float
    bandwidth: float
    source: str

    def rate(self, bfloat16: bool) -> float:
        """Peak FLOP/s."""
        return self.bfloat16 if bfloat16 else self.float32


# What drivers report (about 139 and 79.2 GiB of the nominal 141 and 80 GB), less half a GiB for
# the CUDA context: a default.
GPUS: dict[str, GPU] = {
    "h100": GPU("H100 SXM 80 GB", 78.7 * GIB, 989.4e12, 66.9e12, 3.35e12, "NVIDIA H100 datasheet"),
    "h200": GPU("H200 SXM 141 GB", 138.5 * GIB, 989.4e12, 66.9e12, 4.8e12, "NVIDIA H200 datasheet"),
    "a100": GPU("A100 SXM 80 GB", 78.7 * GIB, 311.8e12, 19.5e12, 2.04e12, "NVIDIA A100 datasheet"),
}
# USD per GPU-hour unless `--price` says otherwise: a round figure for renting, not a quotation
PRICES = {"h100": 2.5, "h200": 3.0, "a100": 1.5}
