"""Mixers: what replaces softmax attention. One file each; this registry is the list of them."""

from rad.mixers.base import Geometry, Mixer, State
from rad.mixers.mamba2 import Mamba2
from rad.mixers.skip import Skip
from rad.mixers.sliding_window import SlidingWindow

MIXERS: dict[str, type[Mixer]] = {
    "mamba2": Mamba2,
    "sliding_window": SlidingWindow,
    "skip": Skip,
}

__all__ = ["MIXERS", "Geometry", "Mixer", "State"]
