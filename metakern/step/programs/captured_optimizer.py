"""An optimizer in the capture of a CUDA graph, where nothing runs but what it does on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

Place = tuple[int, str]
"""Whose number, by identity, and its name."""


@contextmanager
def optimizer_as_before(optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Reject what a graph would not do in every replay: state that is made inside the block would be made anew, and
    what the optimizer counts on the host would stay as it is. What is rejected is taken back.

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
    """Numbers of an optimizer, Python's and those of tensors that are not where their parameter is."""
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
    """Into the tensors that held them."""
    for entries in state.values():
        for name, value in entries.items():
            if (id(value), name) in numbers:
                value.fill_(numbers[id(value), name])
