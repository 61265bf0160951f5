"""One training job in many processes: `torchrun --nproc-per-node 2 -m rad distil ...`.

    weights, gradients, optimiser   FSDP2: cut along the first dimension, a piece in each process;
                                    a decoder layer is whole in memory only while it is computed
                                    models are loaded to the CPU and cut group by group, so that
                                    a GPU never holds a whole one
    rows of a micro-batch           dealt out; losses and gradients are sums over the processes,
                                    divided by the weight of all their tokens
    state, best weights, model      gathered and written by the first process, in the very files of
                                    a single one, so a job resumes in any number of processes

Every function here does nothing, or calls what it is given, in a single process. What crosses
between processes is tensors and JSON, nothing pickled.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from rad.devices import chosen
from rad.distillation.shared_prefix import unshare
from rad.progress import Progress

WORLD = "WORLD_SIZE"  # torchrun tells it
T = TypeVar("T")


# The default of torch.distributed, minutes, is less than a process may wait for its own shard of a
# teacher's outputs, or for a batch of long prompts, while the others wait for it.
PATIENCE = timedelta(days=1)


def started() -> bool:
    """Whether this process is one of several, by what torchrun says."""
    return int(os.environ.get(WORLD, "1")) > 1


@contextmanager
def processes(device: str) -> Iterator[str]:
    """Join the other processes of torchrun within the block; yields this one's own device."""
    device = chosen(device)
    if not started():
        yield device
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    yield device
    # not after an error: the others may be waiting for what will never come
    dist.barrier()
    dist.destroy_process_group()


def alone(verb: str) -> None:
    """Raise `ValueError` when a verb that runs in one process is started in several."""
    if started():
        raise ValueError(f"`rad {verb}` runs in one process: start it without torchrun")


def count() -> int:
    """How many processes share the job."""
    return dist.get_world_size() if dist.is_initialized() else 1


def active() -> bool:
    """Whether several processes share the job."""
    return count() > 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if active() else 0


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


# --- messages -------------------------------------------------------------------------------


def _device() -> torch.device:
    """Where the tensors of a message must be."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _reduced(values: list[float], operation: Any) -> list[float]:
    message = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(message, operation)
    return [float(value) for value in message.tolist()]


def summed(values: list[float]) -> list[float]:
    """The sums of every process's values."""
    return _reduced(values, dist.ReduceOp.SUM) if active() else values


def most(value: int) -> int:
    """The largest of every process's values."""
    return round(_reduced([float(value)], dist.ReduceOp.MAX)[0]) if active() else value


def any_of(*flags: bool) -> list[bool]:
    """Whether any process says so, for each flag."""
    if not active():
        return list(flags)
    return [value > 0 for value in _reduced([float(flag) for flag in flags], dist.ReduceOp.MAX)]


def from_first(act: Callable[[], T]) -> T:
    """What `act` returns in the first process, the only one that calls it: JSON to the others.

    Its `ValueError` is raised in all of them.
    """
    if not active():
        return act()
    error: ValueError | None = None
    answer: dict[str, Any] = {}
    if first():
        try:
            answer = {"result": act()}
        except ValueError as raised:
            error, answer = raised, {"error": str(raised)}
    content = bytearray(json.dumps(answer, default=str).encode())
    size = most(len(content))
    content += bytes(size - len(content))
    message = torch.frombuffer(content, dtype=torch.uint8).to(_device())
    dist.broadcast(message, 0)
    if error is not None:
        raise error
    answer = json.loads(bytes(message.cpu().tolist()).rstrip(b"\0"))
    if "error" in answer:
        raise ValueError(answer["error"])
    result: T = answer["result"]
    return result


# --- models in pieces -----------------------------------------------------------------------


def inside(module: Any, act: Callable[[], T]) -> T:
    """`act()`, while the module's own weights are whole; gradients of its result reach them.

    For what needs the weights of a model or decoder layer outside its `forward`: the loss from
    hidden states and head, one block of a layer.
    """
    if not isinstance(module, FSDPModule):
        return act()
    result: T = module.call_inside(act)  # type: ignore[attr-defined]
    return result


def release(model: Any) -> None:
    """Let go of what a forward pass without a backward one has left whole."""
    if isinstance(model, FSDPModule):
        model.reset_iter_state()


def _call(_module: nn.Module, act: Callable[[], Any]) -> Any:
    return act()


@contextmanager
def sharded(job: Any) -> Iterator[None]:
    """Within the block, student, base and teacher of a `loop.Job` are in pieces.

    Before it they may be on the CPU: pieces are on the processes' own devices. Afterwards the first
    process has a whole student in `job.student`, on the CPU. Raises `ValueError` when the job
    cannot be shared by so many processes.
    """
    if not active():
        yield
        return
    _check(job)
    state = torch.get_rng_state().to(_device())
    dist.broadcast(state, 0)
    torch.set_rng_state(state.cpu())
    hollow = _hollow(job.student)
    unshare(job.student, job.base, {name for name, _ in job.student.named_parameters()})
    models = {id(model): model for model in (job.base, job.teacher, job.student)}
    mesh = init_device_mesh(_device().type, (count(),))
    for model in models.values():
        if isinstance(model, nn.Module):
            _shard(model, mesh)
    yield
    student = _filled(hollow, job.student)
    if first():
        job.student = student


def _check(job: Any) -> None:
    for stage in job.stages:
        rows = stage.batch_size // stage.accumulate
        if rows < count():
            raise ValueError(
                f"stage {stage.title}: micro-batches of {rows} rows cannot be dealt out to "
                f"{count()} processes; raise batch_size, lower accumulate, or start fewer"
            )
    if job.compile:
        raise ValueError("`compile: true` is for one process: turn it off under torchrun")
    dtypes = {str(parameter.dtype) for parameter in job.student.parameters()}
    if len(dtypes) > 1:
        raise ValueError(
            f"many processes need a student of one dtype, this one has {', '.join(sorted(dtypes))};"
            " load the base with `dtype: float32` and let `autocast: true` do the rest"
        )
    if hasattr(job.teacher, "model") and not isinstance(job.teacher, nn.Module):
        raise ValueError("many processes: give the live teacher as a model, so that it is sharded")


@torch.no_grad()
def _shard(model: Any, mesh: DeviceMesh) -> None:
    """Leave a piece of every weight in each process; all start from the first one's weights."""
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    several = len({parameter.dtype for parameter in model.parameters()}) > 1
    for module in (*model.base_model.layers, model):
        _fetch(module)
        fully_shard(module, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # losses are divided by the weight of all tokens: their gradients are sums
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            module.call_inside = MethodType(_call, module)  # type: ignore[attr-defined]
            register_fsdp_forward_method(module, "call_inside")  # type: ignore[arg-type]
    # the first call settles which module is the root, and the dtype of gradients by what is
    # trained at that moment; stages freeze and thaw later
    model.requires_grad_(not several)
    inside(model, lambda: None)
    release(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained[name])


def _fetch(module: nn.Module) -> None:
    """Whole weights and buffers that are not in pieces yet: to this process's device, equal in all.

    Every process has loaded the same files; the first one's values are sent all the same, so that
    a start that depends on the machine cannot part them.
    """
    device = _device()
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
            dist.broadcast(tensor.data, 0)


def _hollow(model: nn.Module) -> nn.Module:
    """A copy of a whole model whose parameters have no memory."""
    empty: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"))
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, empty)


@torch.no_grad()
def _filled(hollow: nn.Module, model: nn.Module) -> nn.Module:
    """The hollow copy with the weights of the model in pieces, in the first process alone."""
    whole: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        value = full(parameter.detach())
        if first():
            # one at a time: the device has no room for a whole student
            whole[name] = nn.Parameter(value.cpu(), requires_grad=parameter.requires_grad)
    if not first():
        return hollow
    named = dict(hollow.named_parameters(remove_duplicate=False))
    by_place = {id(named[name]): parameter for name, parameter in whole.items()}
    for name, parameter in named.items():  # tied ones have several names
        module, _, leaf = name.rpartition(".")
        hollow.get_submodule(module)._parameters[leaf] = by_place[id(parameter)]
    return hollow.eval()


# --- tensors in pieces ----------------------------------------------------------------------


def full(value: Tensor) -> Tensor:
    """The whole of a tensor in pieces; every process must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the first process writes them; the others keep none."""
    if not active():
        return tensors
    found = {}
    for name, value in tensors.items():
        whole = full(value)
        if first():
            found[name] = whole.cpu()
    return found


def placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as `like` is: in the same pieces, on the same device."""
    value = value.to(like.device)
    if isinstance(like, DTensor):
        # every process has read the whole: nothing to send
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return value


def clip(parameters: list[Tensor], limit: float) -> Tensor:
    """Scale gradients down to the norm `limit`; the norm over all pieces before that."""
    if not active():
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = full(torch.nn.utils.get_total_norm(gradients))
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def measured(model: Any, measure: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """`measure(model)`: all processes run the layers, the first one's figures count."""
    if not active():
        return measure(model)
    with torch.no_grad():
        found = inside(model, lambda: measure(model))
    release(model)
    return from_first(lambda: found)


class Silent(Progress):
    """Progress that nobody sees: the first process shows it."""

    def __enter__(self) -> Progress:
        return self

    def advance(self, note: str = "", steps: int = 1) -> None:
        """Count."""
        self.done += steps


def progress(title: str, total: int, done: int) -> Progress:
    """The progress of the job, in the first process."""
    return (Progress if first() else Silent)(title, total, done)
