"""Mixers: what replaces softmax attention. One file each; this registry is the list of them."""

from rad.mixers.base import Geometry, Mixer, State
from rad.mixers.discrete_mamba2 import DiscreteMamba2
from rad.mixers.gated_deltanet import GatedDeltaNet
from rad.mixers.gla import GLA
from rad.mixers.longhorn import Longhorn
from rad.mixers.mamba import Mamba
from rad.mixers.mamba2 import Mamba2
from rad.mixers.skip import Skip
from rad.mixers.sliding_window import SlidingWindow

MIXERS: dict[str, type[Mixer]] = {
    "mamba2": Mamba2,
    "discrete_mamba2": DiscreteMamba2,
    "gated_deltanet": GatedDeltaNet,
    "gla": GLA,
    "mamba": Mamba,
    "longhorn": Longhorn,
    "sliding_window": SlidingWindow,
    "skip": Skip,
}

__all__ = ["MIXERS", "Geometry", "Mixer", "State"]
