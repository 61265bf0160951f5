"""A suite in many processes: `torchrun --nproc-per-node 2 -m rad evaluate ...`.

Batches are those of a single process and are dealt out whole, so that every number is the same
whatever the count of processes. Messages are JSON in tensors, nothing pickled.

All processes make the same calls. One that fails says so in its next message, which the others read
wherever they are: all of them fail, with its words.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rad.distillation.parallel import PATIENCE

T = TypeVar("T")
R = TypeVar("R")
# Batches of a process between two messages: rarer ones even out answers of different lengths, more
# frequent ones let the others know of a failure sooner.
_BETWEEN = 4


class PeerError(ValueError):
    """Another process failed."""


def count() -> int:
    """How many processes share the suite; raises `ValueError` when they have not joined."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "started in several processes that have not joined: call "
            "torch.distributed.init_process_group first, or start without torchrun"
        )
    return 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if count() > 1 else 0


def first() -> bool:
    """Whether this is the process that scores and writes."""
    return rank() == 0


_groups: dict[Any, Any] = {}  # the processes -> their group for messages


def _group() -> Any:
    """The same processes with gloo: messages are small, and waiting for others may take long."""
    world = dist.group.WORLD
    if world not in _groups:
        _groups.clear()
        _groups[world] = dist.new_group(backend="gloo", timeout=PATIENCE)
    return _groups[world]


def _gather(content: bytes) -> list[bytes]:
    """The bytes of every process, by rank."""
    group = _group()
    mine = torch.tensor([len(content)])
    sizes = [torch.zeros_like(mine) for _ in range(count())]
    dist.all_gather(sizes, mine, group)
    lengths = [int(size) for size in sizes]
    message = torch.frombuffer(bytearray(content.ljust(max(lengths))), dtype=torch.uint8)
    found = [torch.empty_like(message) for _ in lengths]
    dist.all_gather(found, message, group)
    return [each[:length].numpy().tobytes() for each, length in zip(found, lengths, strict=True)]


def exchange(message: Any) -> list[Any]:
    """Every process's message, by rank; raises `PeerError` with the words of one that failed."""
    if count() == 1:
        return [message]
    answers = [json.loads(each) for each in _gather(json.dumps({"message": message}).encode())]
    for number, answer in enumerate(answers):
        if "error" in answer:
            raise PeerError(f"process {number}: {answer['error']}")
    return [answer["message"] for answer in answers]


@contextmanager
def together() -> Iterator[None]:
    """All processes leave the block in peace, or all with an error."""
    try:
        yield
        exchange("done")
    except PeerError:
        raise
    except Exception as error:
        if count() > 1:
            text = str(error) if isinstance(error, ValueError) else repr(error)
            _gather(json.dumps({"error": text}).encode())
        raise


def agree(what: str, value: Any) -> None:
    """Raise `ValueError` unless all processes have the same `value`, which is JSON."""
    for number, other in enumerate(exchange(value)):
        if other != value:
            raise ValueError(f"processes {rank()} and {number} differ in {what}")


def dealt(
    batches: Sequence[T], act: Callable[[T], R], done: Callable[[T, R], None] | None = None
) -> list[R]:
    """`act(batch)` of every batch, each in one process; all of them return all results.

    Results are JSON. `done(batch, result)` is called as they arrive.
    """
    world = count()
    together_size = 1 if world == 1 else world * _BETWEEN
    results: list[R] = []
    for start in range(0, len(batches), together_size):
        part = batches[start : start + together_size]
        shares = exchange([act(batch) for batch in part[rank() :: world]])
        for index, batch in enumerate(part):
            results.append(shares[index % world][index // world])
            if done is not None:
                done(batch, results[-1])
    return results
