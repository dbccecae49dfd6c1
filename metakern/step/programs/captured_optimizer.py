"""An optimizer in the capture of a CUDA graph, where only its Python code runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Place = tuple[int, str]
"""Identity of what holds a number, and the number's name."""


@contextmanager
def optimizer_as_before(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Reject what a replay would get wrong: state made inside the block would be made again in every replay, and
    numbers that the optimizer counts on the host would not change. A rejected step is undone.

    Raises: ValueError
    """
    if optimizer is None:
        yield
        return
    state, numbers = {p: dict(entries) for p, entries in optimizer.state.items()}, _on_the_host(optimizer)
    groups = [dict(group) for group in optimizer.param_groups]
    refused = True
    try:
        yield
        if _tensors(optimizer.state) != _tensors(state):
            raise ValueError(
                "optimizer must have taken a step before the capture, so that its state exists: call "
                "metakern.reweight_step(..., optimizer=optimizer) once"
            )
        changed = {name for (_, name), number in (_on_the_host(optimizer).items() - numbers.items())}
        if changed:
            raise ValueError(
                f"optimizer: {type(optimizer).__name__} keeps {', '.join(sorted(changed))} on the host and changes it "
                "in each step, which replays of a CUDA graph would not do; use capturable=True if it has that, or "
                "leave the optimizer out and step from .grad"
            )
        refused = False
    finally:
        if refused:
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, before in zip(optimizer.param_groups, groups):
                group.clear()
                group.update(before)
            _write(numbers, state)


def _tensors(state: Mapping[Any, Mapping[str, Any]]) -> set[int]:
    return {id(value) for entries in state.values() for value in entries.values() if isinstance(value, Tensor)}


def _on_the_host(optimizer: torch.optim.Optimizer) -> dict[Place, Any]:
    """Numbers of an optimizer that live on the host: Python's, and those in CPU tensors of parameters elsewhere."""
    found: dict[Place, Any] = {}
    holders = [(p.device, entries) for p, entries in optimizer.state.items() if isinstance(p, Tensor)]
    for device, entries in holders:
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.is_cpu and device.type != "cpu" and value.numel() == 1:
                found[id(value), name] = value.item()
            elif isinstance(value, (int, float)):
                found[id(entries), name] = value
    for group in optimizer.param_groups:
        found |= {(id(group), name): value for name, value in group.items() if isinstance(value, (int, float))}
    return found


def _write(numbers: Mapping[Place, Any], state: Mapping[Any, Mapping[str, Any]]) -> None:
    """Write numbers back into the tensors that held them."""
    for entries in state.values():
        for name, value in entries.items():
            if (id(value), name) in numbers:
                value.fill_(numbers[id(value), name])
