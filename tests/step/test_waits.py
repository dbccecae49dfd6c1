"""How often the host waits for the GPU in a step, which then has nothing to do until the next call reaches it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import metakern
from metakern.testing import inputs, models


@contextmanager
def counted() -> Iterator[list[str]]:
    """The waits inside the block, in torch's words; torch does not see those of other libraries."""
    met: list[str] = []
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield met
        finally:
            torch.cuda.set_sync_debug_mode(before)
    met += [str(each.message) for each in caught if "synchronizing CUDA operation" in str(each.message)]


MODELS = {
    "transformer": (lambda: models.Transformer(16, 2, fused=True), {"shape": (5,), "vocabulary": 1000}),
    "conv net": (models.conv_net, {"shape": (3, 8, 8), "vocabulary": 0}),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_an_eager_step_waits_four_times(name: str) -> None:
    """For finite losses, meta loss and dots, and for the rows whose weight is not zero: not once per layer."""
    make, sizes = MODELS[name]
    torch.manual_seed(0)
    model: nn.Module = make().cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    batch, meta_batch = (batch_of(n, **sizes) for n in (8, 2))

    def step() -> Any:
        return metakern.l2rw_step(model, batch, meta_batch, optimizer=optimizer)

    for _ in range(2):  # the first is proved and checked
        step()
    with counted() as waits:
        assert step().engine == "ghost"
    assert 0 < len(waits) <= 4, waits


@pytest.mark.gpu
def test_a_captured_step_does_not_wait() -> None:
    make, sizes = MODELS["conv net"]
    torch.manual_seed(0)
    model: nn.Module = make().cuda()
    batch, meta_batch = (batch_of(n, **sizes) for n in (8, 2))
    step = metakern.capture_step(model, batch, meta_batch)
    with counted() as waits:
        step(batch, meta_batch)
    assert waits == []


def batch_of(n: int, shape: tuple[int, ...], vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = inputs.labels(n, classes=10, seed=n).cuda()
    if vocabulary:
        return inputs.labels(n, *shape, classes=vocabulary, seed=n).cuda(), labels
    return inputs.normal(n, *shape, seed=n, dtype=torch.float32).cuda(), labels
