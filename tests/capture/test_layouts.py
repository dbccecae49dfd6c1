"""Memory layouts and aliases of the inputs: only values may matter."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step

LAYOUTS = {
    "non-contiguous": inputs.non_contiguous,
    "transposed": inputs.transposed,
    "expanded": lambda x: x[:1].expand(x.shape),
    "sliced": lambda x: torch.cat([x, x])[1 : len(x) + 1],
    "requires-grad": lambda x: x.clone().requires_grad_(),
    "negative-view": lambda x: torch._neg_view(x),
}

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), (4,)),
    "positions": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(30, 3)), (5, 4)),
    "conv": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(True), nn.Flatten(), nn.Linear(36, 3)),
        (2, 5, 6),
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.Flatten(), nn.Linear(18, 3)), (2, 2, 3, 4)),
}


def setup_of(name: str) -> Setup:
    build, shape = MODELS[name]
    torch.manual_seed(0)
    return Setup(build().double(), *inputs.pair(6, 4, *shape, classes=3))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_layouts_of_the_batch(name: str, layout: Callable[[Tensor], Tensor], memory: str) -> None:
    setup = setup_of(name)
    setup.batch, setup.meta_batch = ((layout(x), y) for x, y in (setup.batch, setup.meta_batch))
    judge_step(metakern.l2rw_step, setup, engine="ghost", memory=memory)
    assert setup.batch[0].grad is None


@pytest.mark.parametrize("name", ["conv", "conv3d"])
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("of", ["inputs", "model", "both"])
def test_channels_last(name: str, memory: str, of: str) -> None:
    setup = setup_of(name)
    layout = torch.channels_last if name == "conv" else torch.channels_last_3d
    if of != "inputs":
        setup.model.to(memory_format=layout)
    if of != "model":
        setup.batch, setup.meta_batch = ((inputs.channels_last(x), y) for x, y in (setup.batch, setup.meta_batch))
    judge_step(metakern.l2rw_step, setup, engine="ghost", memory=memory)


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_parameters_in_odd_layouts(memory: str) -> None:
    """A weight that is a transposed or sliced view of another tensor; its gradient has its shape."""
    setup = setup_of("linear")
    first = setup.model[0]
    first.weight = nn.Parameter(first.weight.detach().t().contiguous().t())
    setup.model[2].weight = nn.Parameter(inputs.non_contiguous(setup.model[2].weight.detach()))
    judge_step(metakern.l2rw_step, setup, engine="ghost", memory=memory)


def test_one_tensor_for_batch_and_meta_batch() -> None:
    setup = setup_of("conv")
    setup.meta_batch = setup.batch
    judge_step(metakern.l2rw_step, setup, engine="ghost")


def test_the_batch_is_not_written_to() -> None:
    setup = setup_of("conv")
    kept = [tensor.clone() for tensor in (*setup.batch, *setup.meta_batch)]
    metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch)
    for tensor, before in zip((*setup.batch, *setup.meta_batch), kept, strict=True):
        assert torch.equal(tensor, before)
