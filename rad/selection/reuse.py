"""What a selector has scored once, for its other budgets and for jobs that were stopped.

Scores of a base do not depend on how many layers or heads are kept, but there is one job per
budget. They meet in one state folder: `alone` lets one job in at a time, and what it has scored is
read by the next, with what it cost, so that every placement says what its scores cost however many
jobs shared them.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rad.files import replacing
from rad.selection.base import SelectionContext, SelectionError, Spent

LOCK = "lock"


@contextmanager
def alone(folder: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold `folder` for this process, after another one that holds it, which `say` is told of.

    The lock is the system's: it goes with the process that holds it, however that one ends. Raises
    `SelectionError` where the file system has no locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 200, 0).decode(errors="replace").strip() or "another process"
            say(f"{folder}: waiting for {holder}, which is scoring there; its scores are reused")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            raise SelectionError(
                f"{path}: cannot be locked ({error.strerror}); put the state on a file system with "
                "locks"
            ) from error
        os.ftruncate(file, 0)
        os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        os.close(file)


def remembered(
    context: SelectionContext,
    name: str,
    key: str,
    work: Callable[[], Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """The tensors of `work()`, or those that it wrote under `key` to the resource `state` before.

    What they cost is added to the context's meter either way.
    """
    state = context.resources.get("state")
    path = None if state is None else Path(state) / f"{name}.safetensors"
    known = None if path is None else _read(path, key)
    if known is not None:
        tensors, spent = known
        context.meter.include(spent)
        context.progress(f"{context.base}: {name} read from {path}")
        return tensors
    before = context.meter.spent()
    found = {name: value.contiguous() for name, value in work().items()}
    if path is not None:
        spent = context.meter.spent() - before
        with replacing(path) as temporary:
            save_file(found, str(temporary), {"key": key, "spent": json.dumps(vars(spent))})
    return found


def _read(path: Path, key: str) -> tuple[dict[str, Tensor], Spent] | None:
    """What was written under `key`, if that is what the file holds."""
    if not path.exists():
        return None
    with safe_open(str(path), framework="pt") as file:
        said = file.metadata() or {}
        if said.get("key") != key:
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors, Spent(**json.loads(said["spent"]))
