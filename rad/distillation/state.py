"""The resumable state of a training job: weights, optimiser, position, records, and whose it is.

One folder per save, written under a temporary name, flushed to the disk and renamed, the last two
kept; safetensors and JSON, with digests of both. A resumed job continues bit for bit, because data
order and learning rate are functions of the step. A state with another digest of its specification
is refused; one that is damaged is passed over for the older one.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rad.distillation import parallel
from rad.files import digest as digest_of
from rad.files import file_digest, read_json, replacing, write_json

KEPT = 2
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
TENSORS, META = "tensors.safetensors", "meta.json"
_UNFINISHED = ".saving-"
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StateError(ValueError):
    """A state that cannot be used or written; the message names the folder and the remedy."""


@contextmanager
def space(folder: Path, then: str) -> Iterator[None]:
    """Turn running out of disk space inside the block into one clear line; `then`: what next."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # the writer of safetensors says it in words
        words = str(error).lower()
        full = isinstance(error, OSError) and error.errno in _NO_SPACE
        if not full and not any(
            sign in words for sign in ("no space left", "storagefull", "file too large", "filetoo")
        ):
            raise
        raise StateError(
            f"{folder}: no space left on the disk; free some and run the same command again: {then}"
        ) from error


def save(
    folder: Path,
    student: nn.Module,
    optimiser: torch.optim.Optimizer | None,
    names: list[str],
    meta: dict[str, Any],
    only: Collection[str] | None = None,
) -> Path:
    """Write one state; `meta` must hold `digest`, `stage` and `step`.

    `only`: parameters that training changes (default: all). Raises `StateError` when there is no
    space; the states before it stay as they are.
    """
    tensors = _parameters(student, only)
    if optimiser is not None:
        for name, parameter in _named(optimiser, names):
            for moment, value in optimiser.state[parameter].items():
                tensors[f"optimiser.{name}.{moment}"] = torch.as_tensor(value)
    tensors["rng"] = torch.get_rng_state()
    tensors = parallel.gathered(tensors)

    def write() -> Path:
        with space(folder, "the job goes on from its last good state"):
            return _write(folder, tensors, meta)

    return Path(parallel.from_first(write))


def _write(folder: Path, tensors: dict[str, Tensor], meta: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{_UNFINISHED}*"):
        shutil.rmtree(leftover)  # of a job that was killed while it saved
    temporary = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=folder))
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / TENSORS)
        content = {**meta, "tensors_sha256": file_digest(temporary / TENSORS)}
        write_json(temporary / META, {**content, "meta_sha256": digest_of(content)})
        for path in (temporary / TENSORS, temporary / META, temporary):
            _flush(path)
        final = folder / f"stage{meta['stage']:02d}-step{meta['step']:09d}"
        if final.exists():
            final.rename(temporary.with_name(f"{temporary.name}-old"))
        temporary.rename(final)
        _flush(folder)
    finally:
        for leftover in folder.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(leftover, ignore_errors=True)
    for old in _saved(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def latest(folder: Path, digest: str) -> dict[str, Any] | None:
    """The newest good state's meta with its `path`, or None when there is no state.

    Damaged states are passed over, which is said on standard error. Raises `StateError` on a state
    of another specification, and when every state is damaged.
    """
    faults: list[str] = []
    for path in reversed(_saved(folder)):
        try:
            meta = _read(path)
        except (StateError, ValueError, OSError) as error:
            faults.append(f"{path}: unreadable state ({error})")
            continue
        if meta.get("digest") != digest:
            raise StateError(
                f"{folder}: the saved state belongs to another specification "
                f"({str(meta.get('digest'))[:12]}, this job is {digest[:12]}); "
                "delete the folder to start anew"
            )
        for fault in faults:
            print(f"{fault}; going on from {path.name}", file=sys.stderr, flush=True)
        return {**meta, "path": path}
    if faults:
        raise StateError(f"{faults[0]}; delete {folder} to start anew")
    return None


def _read(path: Path) -> dict[str, Any]:
    """A state's meta; raises `ValueError` when a file is missing, cut off or changed."""
    meta: dict[str, Any] = read_json(path / META)
    claimed = meta.pop("meta_sha256", None)
    if claimed != digest_of(meta):
        raise StateError(f"{META} is not what was written")
    if meta.pop("tensors_sha256", None) != file_digest(path / TENSORS):
        raise StateError(f"{TENSORS} is not what was written")
    return meta


def restore(
    path: Path, student: nn.Module, optimiser: torch.optim.Optimizer | None, names: list[str]
) -> None:
    """Load tensors into student and optimiser; raises `StateError` when they do not fit."""
    with _fitting(path):
        tensors = load_file(str(path / TENSORS))
        _load(student, tensors)
        if optimiser is not None:
            for name, parameter in _named(optimiser, names):
                optimiser.state[parameter] = {
                    moment: _place(moment, tensors[f"optimiser.{name}.{moment}"], parameter)
                    for moment in MOMENTS
                }
        torch.set_rng_state(tensors["rng"])


def _place(moment: str, value: Tensor, parameter: Tensor) -> Tensor:
    # the fused optimiser keeps its step count beside the parameter
    return value.to(parameter.device) if moment == "step" else parallel.placed(value, parameter)


def save_weights(path: Path, student: nn.Module, only: Collection[str]) -> None:
    """Write the named parameters to one file, atomically."""
    gathered = parallel.gathered(_parameters(student, only))
    tensors = {name: value.contiguous() for name, value in gathered.items()}

    def write() -> None:
        then = "the job goes on from its last good state"
        with space(path.parent, then), replacing(path) as file:
            save_file(tensors, str(file))
            _flush(file)

    parallel.from_first(write)


def load_weights(path: Path, student: nn.Module) -> None:
    """Load what `save_weights` wrote; raises `StateError` when it does not fit."""
    with _fitting(path):
        _load(student, load_file(str(path)))


def save_batch(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Keep the batch that broke a job for inspection, beside its state."""
    path = folder / "bad_batch.safetensors"
    with space(folder, "the job goes on from its last good state"), replacing(path) as file:
        save_file({name: value.contiguous() for name, value in tensors.items()}, str(file))
    return path


def discard(folder: Path) -> None:
    """Remove the state of a finished job."""
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise StateError(f"{path}: corrupt state ({error}); delete the folder") from error


def _parameters(student: nn.Module, only: Collection[str] | None) -> dict[str, Tensor]:
    # named_parameters names a tied weight once, which is what safetensors needs
    return {
        f"model.{name}": parameter.detach()
        for name, parameter in student.named_parameters()
        if only is None or name in only
    }


def _load(student: nn.Module, tensors: dict[str, Tensor]) -> None:
    parameters = dict(student.named_parameters())
    with torch.no_grad():
        for key, tensor in tensors.items():
            kind, _, name = key.partition(".")
            if kind == "model":
                parameters[name].copy_(parallel.placed(tensor, parameters[name]))


def _named(
    optimiser: torch.optim.Optimizer, names: list[str]
) -> list[tuple[str, torch.nn.Parameter]]:
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    return list(zip(names, parameters, strict=True))


def _saved(folder: Path) -> list[Path]:
    return sorted(folder.glob("stage*-step*")) if folder.is_dir() else []


def _flush(path: Path) -> None:
    """Make sure that the disk has what was written, before a rename makes it the newest state."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
