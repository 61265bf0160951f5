"""Memory as measured: bytes of a cache, of a model, and the peak while something runs.

On a CUDA device the peak is the allocator's (`torch.cuda.max_memory_allocated`). Elsewhere it is
the peak of live tensors: every storage that an operation returns is counted from then until it is
freed. What a single operation allocates and frees inside is not seen there, nor what the C library
keeps for itself; on the nano models the peak is the profiler's record of the CPU allocator to the
byte.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

GIB = 2**30
USABLE = 0.9  # share of the memory that a point may fill when no limit is set


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor reachable through lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def layer_tensors(cache: Any) -> list[tuple[list[Tensor], list[Tensor]]]:
    """Per layer of a cache: (keys and values, everything else), each tensor once."""
    layers = []
    for layer in cache.layers:
        # private attributes are the library's own constants, such as the size of a window
        held = {name: value for name, value in vars(layer).items() if not name.startswith("_")}
        pairs = {id(t): t for name in ("keys", "values") for t in _tensors(held.get(name))}
        others = {id(t): t for t in _tensors(held) if id(t) not in pairs}
        layers.append((list(pairs.values()), list(others.values())))
    return layers


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors in the layers of a Hugging Face cache: keys, values and states."""
    return sum(
        tensor.numel() * tensor.element_size()
        for pairs, others in layer_tensors(cache)
        for tensor in (*pairs, *others)
    )


def _storages(models: Iterable[nn.Module]) -> dict[int, int]:
    """Storage -> bytes of parameters and buffers; tied and shared ones are there once."""
    found = {}
    for model in models:
        for tensor in (*model.parameters(), *model.buffers()):
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
    return found


def weight_bytes(*models: nn.Module) -> int:
    """Bytes of parameters and buffers; what several of them share is counted once."""
    return sum(_storages(models).values())


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that came into being inside the block: `now` and their `peak`.

    What `models` hold (and views of it) is not counted.
    """

    def __init__(self, *models: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._models = models  # their storages must outlive the block: known by address
        self._known: dict[int, Any] = dict.fromkeys(_storages(models))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and count the storages it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            place, size = storage._cdata, storage.nbytes()
            if place not in self._known:
                # the reference must be kept, or its callback never comes
                self._known[place] = weakref.ref(storage, self._freed(place, size))
                self.now += size
                self.peak = max(self.peak, self.now)
        return result

    def _freed(self, place: int, size: int) -> Any:
        def callback(_: Any) -> None:
            del self._known[place]
            self.now -= size

        return callback


class Peak:
    """What `peak_growth` found: `bytes` above the level at the start of the block."""

    bytes = 0


@contextmanager
def peak_growth(model: Any) -> Iterator[Peak]:
    """Measure by how much memory grows at most inside the block, on the model's device."""
    found = Peak()
    if model.device.type == "cuda":
        device = model.device
        torch.cuda.synchronize(device)
        start = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        torch.cuda.synchronize(device)
        found.bytes = torch.cuda.max_memory_allocated(device) - start
        return
    with LiveTensors(model) as live:
        yield found
    found.bytes = live.peak


def peak_source(device: torch.device) -> str:
    """How `peak_growth` measures on a device."""
    return "cuda allocator" if device.type == "cuda" else "live tensors"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def default_limit(device: torch.device) -> int:
    """Bytes that may be used on a device: a share of what it, or this machine, has."""
    if device.type == "cuda":
        return int(USABLE * torch.cuda.get_device_properties(device).total_memory)
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup/memory.max")  # the container's, where there is one
    if group.exists() and (text := group.read_text().strip()).isdigit():
        whole = min(whole, int(text))
    return int(USABLE * whole)
