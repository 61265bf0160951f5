"""Devices of one node, dealt out to jobs by a lock file each.

Snakemake counts GPUs and assigns none: two jobs of one GPU each would both use the first. Here a
job takes as many lock files as it needs devices and sees those devices alone. The locks are the
kernel's (flock): they end with the process that holds them, however it ends.

    RAD_DEVICES             ids that may be used; default CUDA_VISIBLE_DEVICES, then nvidia-smi
    RAD_DEVICE_LOCKS        folder of the lock files, on the node itself; default in the temporary
                            folder, one per user and Slurm job
    RAD_HELD_DEVICES        set by this module: process and devices, for what runs on them
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ALLOWED, VISIBLE, HELD, LOCKS = (
    "RAD_DEVICES",
    "CUDA_VISIBLE_DEVICES",
    "RAD_HELD_DEVICES",
    "RAD_DEVICE_LOCKS",
)
POLL_SECONDS = 0.2


def listed(text: str) -> list[str]:
    """Device ids of a comma-separated list.

    Raises `ValueError` on an id that occurs twice or cannot be a file name.
    """
    ids = [part.strip() for part in text.split(",") if part.strip()]
    if ids == ["-1"]:  # CUDA's way to say none
        return []
    for device in ids:
        if not re.fullmatch(r"[0-9A-Za-z][0-9A-Za-z_.:-]*", device):
            raise ValueError(f"device {device!r}: expected ids as 0,1,2 or GPU-..., MIG-...")
    if len(set(ids)) < len(ids):
        raise ValueError(f"devices {text}: an id occurs twice")
    return ids


def known() -> list[str]:
    """Ids of the devices that jobs may use.

    Raises `ValueError` when `RAD_DEVICES` names a device that `CUDA_VISIBLE_DEVICES` hides.
    """
    visible = listed(os.environ[VISIBLE]) if VISIBLE in os.environ else None
    if ALLOWED in os.environ:
        allowed = listed(os.environ[ALLOWED])
        foreign = [device for device in allowed if visible is not None and device not in visible]
        if foreign:
            raise ValueError(
                f"{ALLOWED} names {', '.join(foreign)}, which {VISIBLE}={os.environ[VISIBLE]} hides"
            )
        return allowed
    return _asked() if visible is None else visible


def _asked() -> list[str]:
    """What nvidia-smi lists; nothing where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return listed(answer.stdout.replace("\n", ",")) if answer.returncode == 0 else []


def launched() -> bool:
    """Whether this process, or torchrun above it, is what `launch` became."""
    holder, _, _ = os.environ.get(HELD, "").partition(":")
    return holder in (str(os.getpid()), str(os.getppid()))


def lock_folder() -> Path:
    """Where the lock files are, by default; made when missing."""
    folder = os.environ.get(LOCKS)
    if folder is None:
        # Slurm may number the devices of every job from 0: its jobs must not wait for each other
        job = os.environ.get("SLURM_JOB_ID")
        name = f"rad-devices-{os.getuid()}" + (f"-slurm-{job}" if job else "")
        folder = str(Path(tempfile.gettempdir(), name))
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def become(command: Sequence[str], count: int, folder: Path | None = None) -> NoReturn:
    """Replace this process by `command`, which sees `count` devices of its own until it ends.

    Waits until so many are free. It is the same process: signals and exit status are the command's
    own, and no wrapper can be killed beside it. Raises `ValueError` when there are not so many
    devices, when a process above holds some already (a job asks once), and when there is no such
    command.
    """
    if shutil.which(command[0]) is None:
        raise ValueError(f"{command[0]}: command not found")
    if count:
        ids, locks = _take(count, folder)
        for lock in locks:
            os.set_inheritable(lock, True)
        os.environ[HELD] = f"{os.getpid()}:{','.join(ids)}"
        os.environ[VISIBLE] = ",".join(ids)
        # nvidia-smi counts in this order, CUDA by speed unless told
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvp(command[0], list(command))


def launch(arguments: Sequence[str], count: int, one_process: bool = False) -> NoReturn:
    """Become `rad ARGUMENTS` on `count` devices: under torchrun when there are several.

    `one_process`: the verb spreads a model over all devices itself.
    """
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count), "-m"]
    start = [sys.executable, "-m", *(several if count > 1 and not one_process else [])]
    become([*start, "rad", *arguments], count)


def _take(count: int, folder: Path | None) -> tuple[list[str], list[int]]:
    """Ids and the open lock files of `count` devices."""
    if HELD in os.environ:
        holder, _, ids = os.environ[HELD].partition(":")
        raise ValueError(f"process {holder} above already holds devices {ids}: ask once, for all")
    pool = known()
    if not 1 <= count <= len(pool):
        raise ValueError(
            f"{count} devices wanted, {len(pool)} to give ({', '.join(pool) or 'none'}): lower the "
            f"job's `gpu`, or name the devices in {ALLOWED}"
        )
    folder = lock_folder() if folder is None else folder
    # only the first in the queue takes devices: two jobs that each wait for what the other has
    # taken cannot arise, and a job that needs many is not overtaken for ever
    queue = _open(folder / "queue.lock")
    locks: dict[str, int] = {}
    try:
        if not _locked(queue):
            _say(f"waiting for {count} of the devices {', '.join(pool)}")
            fcntl.flock(queue, fcntl.LOCK_EX)
        _fill(locks, pool, count, folder)
    except BaseException:
        for lock in locks.values():
            os.close(lock)
        raise
    finally:
        os.close(queue)
    return [device for device in pool if device in locks], list(locks.values())


def _fill(locks: dict[str, int], pool: list[str], count: int, folder: Path) -> None:
    """Lock devices until `count` are held."""
    said = False
    while True:
        for device in pool:
            if device not in locks:
                lock = _open(folder / f"{device}.lock")
                if not _locked(lock):
                    os.close(lock)
                    continue
                locks[device] = lock
                os.ftruncate(lock, 0)
                os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)  # for people: who has it
            if len(locks) == count:
                return
        if not said:
            _say(f"waiting for {count - len(locks)} of the devices {', '.join(pool)}")
            said = True
        time.sleep(POLL_SECONDS)


def _open(path: Path) -> int:
    """A lock file that every user of the folder may lock; raises `ValueError` where one may not."""
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        try:
            # not O_CREAT at once: a sticky folder refuses it for the files of others
            return os.open(path, flags)
        except FileNotFoundError:
            file = os.open(path, flags | os.O_CREAT, 0o666)
    except PermissionError as error:
        raise ValueError(
            f"{path}: not yours to lock: remove it, or name another folder in {LOCKS}"
        ) from error
    if os.fstat(file).st_uid == os.getuid():
        os.fchmod(file, 0o666)  # whatever the umask
    return file


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _say(text: str) -> None:
    print(f"rad: {text}", file=sys.stderr, flush=True)
