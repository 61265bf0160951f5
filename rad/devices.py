"""Which device a job computes on: asked for in one way by every verb."""

from __future__ import annotations

import os

VARIABLE = "RAD_DEVICE"


def chosen(name: str = "auto") -> str:
    """The device that `name` stands for: `cpu`, `cuda`, `cuda:<n>`, or `auto`.

    `auto` is what the variable RAD_DEVICE says, else a GPU if torch sees one. Raises `ValueError`
    when a GPU is asked for and there is none.
    """
    import torch

    wanted = os.environ.get(VARIABLE, "auto") if name == "auto" else name
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        where = f"{VARIABLE}={wanted}" if name == "auto" else f"--device {wanted}"
        raise ValueError(f"{where}: torch sees no GPU here; use cpu, or a CUDA build of torch")
    if wanted != "cpu" and not wanted.startswith("cuda"):
        raise ValueError(f"device {wanted!r}: it is one of auto, cpu, cuda, cuda:<n>")
    return wanted
