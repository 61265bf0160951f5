"""What a student shares with the base it came from: frozen weights, and the layers below the first
trained one.

    tokens -> embedding -> frozen layers 0..k-1 -+-> base layers k.. -> teacher's hidden states
              (run once, without gradients)      +-> student layers k.. -> student's hidden states

Sharing weights makes one object of two equal parameters, so there is one copy in memory; training
never writes to it, because it is frozen. Both are exact. Legend: B batch, T time, E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def share_frozen(student: nn.Module, base: nn.Module) -> int:
    """Make one of every frozen parameter that base and student have alike; bytes that it saves.

    Call it after freezing and before the optimiser is built.
    """
    theirs = dict(base.named_parameters(remove_duplicate=False))
    saved: dict[int, int] = {}
    for name, parameter in list(student.named_parameters(remove_duplicate=False)):
        other = theirs.get(name)
        if other is None or parameter.requires_grad or other.requires_grad:
            continue
        if parameter is not other:
            described = (parameter.shape, parameter.dtype, parameter.device)
            if described != (other.shape, other.dtype, other.device):
                continue
            if not torch.equal(parameter, other):
                continue
            _replace(student, name, other)
        saved[id(other)] = other.nbytes
    return sum(saved.values())


def unshare(student: nn.Module, base: nn.Module, names: set[str]) -> None:
    """Give the student parameters of its own where `names` are the base's; ties stay tied.

    Call it before these are trained.
    """
    named = dict(student.named_parameters(remove_duplicate=False))
    theirs = {id(parameter) for parameter in base.parameters()}
    wanted = {id(named[name]) for name in names} & theirs
    copies = {}
    for name, parameter in named.items():
        if id(parameter) in wanted:
            if id(parameter) not in copies:
                copies[id(parameter)] = nn.Parameter(parameter.detach().clone())
            _replace(student, name, copies[id(parameter)])


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module, _, leaf = name.rpartition(".")
    model.get_submodule(module)._parameters[leaf] = parameter


def shared_layers(student: Any, base: Any) -> int:
    """How many layers, from the first, are the very same frozen objects in both models.

    0 unless the embeddings are shared as well.
    """
    if not _same(student.get_input_embeddings(), base.get_input_embeddings()):
        return 0
    count = 0
    for mine, theirs in zip(student.base_model.layers, base.base_model.layers, strict=True):
        if not _same(mine, theirs):
            break
        count += 1
    return count


def _same(mine: nn.Module, theirs: nn.Module) -> bool:
    first, second = dict(mine.named_parameters()), dict(theirs.named_parameters())
    return first.keys() == second.keys() and all(
        parameter is second[name] and not parameter.requires_grad
        for name, parameter in first.items()
    )


@contextmanager
def layer_input(base: Any, layer: int) -> Iterator[list[Tensor]]:
    """Within the block, what goes into `layer` (B,T,E) is appended to the list that is yielded."""
    seen: list[Tensor] = []

    def keep(_module: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        seen.append(arguments[0] if arguments else settings["hidden_states"])

    handle = base.base_model.layers[layer].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def starting_at(student: Any, layer: int, hidden: Tensor) -> Iterator[None]:
    """Within the block, the student's layers below `layer` are not run: `hidden` is their result.

    Their `forward` is replaced rather than the modules, so that whatever a family's model looks up
    in its list of layers is still there.
    """
    skipped = list(student.base_model.layers)[:layer]

    def known(*_arguments: Any, **_settings: Any) -> Tensor:
        return hidden

    try:
        for module in skipped:
            module.forward = known
        yield
    finally:
        for module in skipped:
            del module.forward
