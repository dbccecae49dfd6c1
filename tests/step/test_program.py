"""Programs in parts: what the host does between them counts, and a part that takes another way ends the run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from metakern.step.programs.program import Backend, Program, traced

BACKENDS = ["eager", "aot_eager"]


def backend(name: str) -> Backend:
    return torch._dynamo.lookup_backend(name)


def program(name: str, held: Tensor) -> Program:
    """Writes in place before and after the break, and reads a tensor of its surroundings in both parts."""

    def function(x: Tensor) -> Iterator[list[Tensor]]:
        y = x * held
        rows = y[:2]
        z = y + 1
        yield [y.sum()]
        rows += held  # a view of what the first part made
        extra = z if bool(held[0] < 10) else -z
        yield [y.clone(), extra.clone()]

    made = traced(function, [torch.ones(3)])
    made.compile(backend(name))
    return made


@pytest.mark.parametrize("name", BACKENDS)
def test_the_host_may_change_tensors_between_parts(name: str) -> None:
    held = torch.tensor([2.0])
    run = program(name, held)([torch.arange(3.0)])
    assert next(run) == [torch.tensor(6.0)]
    held.add_(1)
    second = next(run)
    assert second is not None
    assert torch.equal(second[0], torch.tensor([3.0, 5.0, 4.0]))
    assert torch.equal(second[1], torch.tensor([1.0, 3.0, 5.0]))
    assert next(run, "no more") == "no more"


@pytest.mark.parametrize("name", BACKENDS)
def test_a_part_that_takes_another_way_ends_the_run(name: str) -> None:
    held = torch.tensor([2.0])
    run = program(name, held)([torch.arange(3.0)])
    assert next(run) is not None
    held.fill_(20)
    assert next(run) is None
    assert next(run, "no more") == "no more"


def test_values_go_once_no_part_needs_them() -> None:
    """Only what the second part reads is handed on."""

    def function(x: Tensor) -> Iterator[list[Tensor]]:
        unused, used = x.exp(), x.sin()
        yield [unused.sum()]
        yield [used + x]

    first, second = traced(function, [torch.ones(3)])._parts
    assert len(first.kept) == 1
    assert len(second.given) == 2
    assert not second.kept
