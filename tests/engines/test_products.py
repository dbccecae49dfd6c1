"""Products that the dual pass takes from the pass that it repeats: the same dots, for two products of three."""

import itertools
from collections import Counter
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import metakern
from metakern.engines import jvp
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import Snapshot, judge_step


def convolutions(depth: int = 4, in_place: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [
        (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=2), nn.ReLU(inplace=in_place))
        for _ in range(depth)
    ]
    return nn.Sequential(*(layer for block in blocks for layer in block), nn.Flatten(), nn.Linear(4 * 36, 3)).double()


def setup_of(model: nn.Module, *shape: int) -> Setup:
    return Setup(model, *inputs.pair(5, 3, *shape, classes=3), interacting=True)


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("in_place", [False, True])
def test_whole_steps_are_exact(in_place: bool, memory: str) -> None:
    judge_step(metakern.l2rw_step, setup_of(convolutions(in_place=in_place), 4, 6, 6), engine="jvp", memory=memory)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_batch_normalisation_of_vectors(first: bool, affine: bool) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4, affine=affine, track_running_stats=affine)
    layers = (norm, nn.Linear(4, 3)) if first else (nn.Linear(4, 4), norm, nn.Tanh(), nn.Linear(4, 3))
    judge_step(metakern.l2rw_step, setup_of(nn.Sequential(*layers).double(), 4), engine="jvp")


def test_other_batch_normalisations() -> None:
    """One that is overwritten, one that is frozen, and one in eval mode."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.BatchNorm1d(4))
    torch.manual_seed(0)
    model = nn.Sequential(*model, nn.Tanh(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    model[4].requires_grad_(False)
    model[7].eval()
    judge_step(metakern.l2rw_step, setup_of(model, 4), engine="jvp")


@pytest.mark.parametrize("params", ["1.*", "*.bias", "*.weight"])
def test_dots_over_some_parameters_are_exact(params: str) -> None:
    setup = setup_of(convolutions(), 4, 6, 6)
    names = [name for name, _ in setup.model.named_parameters() if fnmatchcase(name, params)]
    truth = setup.oracle(names=names)
    found = metakern.grad_dots(setup.model, setup.batch, setup.meta_batch, engine="jvp", params=params)
    budget.assert_dots(found.dots, truth)


@pytest.mark.parametrize("one", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d])
def test_every_kind(one: type[nn.Module]) -> None:
    torch.manual_seed(0)
    dimensions = int(one.__name__[-2])
    layers = (one(2, 3, 2), nn.Tanh(), one(3, 2, 2, bias=False), nn.Flatten(), nn.LazyLinear(3))
    model = nn.Sequential(*layers).double()
    model(torch.zeros(1, 2, *(4,) * dimensions, dtype=torch.float64))
    judge_step(metakern.l2rw_step, setup_of(model, 2, *(4,) * dimensions), engine="jvp")


POOLINGS = {
    "overlapping, with a border": nn.MaxPool2d(3, 2, 1),
    "dilated": nn.MaxPool2d(2, 1, dilation=2),
    "overwritten": nn.Sequential(nn.MaxPool2d(2), nn.ReLU(inplace=True)),
    "of a part": lambda x: F.max_pool2d(x[:, :2].transpose(-1, -2), 2, ceil_mode=True),
    "with indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "of single images": lambda x: torch.stack([F.max_pool2d(image, 2) for image in x]),
}


class Pooled(nn.Module):
    def __init__(self, pool: Callable[[Tensor], Tensor], channels_last: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.first, self.norm, self.pool, self.last = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), pool, nn.LazyLinear(3)
        self.double()(torch.zeros(2, 2, 7, 7, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x.contiguous(memory_format=self.format)))
        return self.last(self.pool(x).flatten(1))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pool", POOLINGS)
def test_pooling(pool: str, channels_last: bool) -> None:
    judge_step(metakern.l2rw_step, setup_of(Pooled(POOLINGS[pool], channels_last), 2, 7, 7), engine="jvp")


class Calls(TorchDispatchMode):
    """Counts what runs, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("memory", "passes"), [("reuse", 2), ("two_pass", 3)])
def test_the_dual_pass_pools_no_more(memory: str, passes: int) -> None:
    """Train and meta batch are pooled once each."""
    model, batches = Pooled(nn.MaxPool2d(2), False), inputs.pair(5, 3, 2, 7, 7, classes=3)
    metakern.grad_dots(model, *batches, engine="jvp", memory=memory)  # the first is held against autograd
    with Calls() as calls:
        metakern.grad_dots(model, *batches, engine="jvp", memory=memory)
    assert calls.found["max_pool2d_with_indices"] == passes


def operations(model: nn.Module, memory: str) -> int:
    batch, meta_batch = inputs.pair(32, 4, 4, 6, 6, classes=3)
    metakern.l2rw_step(model, batch, meta_batch, engine="jvp", memory=memory)  # the first is held against autograd
    with FlopCounterMode(display=False) as counter:
        metakern.l2rw_step(model, batch, meta_batch, engine="jvp", memory=memory)
    return counter.get_total_flops()


def test_two_products_of_three() -> None:
    """A plain step has three products a layer: forward, output gradient, weight gradient. See docs/performance.md."""
    model = convolutions()
    batch, _ = inputs.pair(32, 4, 4, 6, 6, classes=3)
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(batch[0]), batch[1]).backward()
    plain = counter.get_total_flops()
    assert operations(model, "reuse") < (5 + 3 * 4 / 32) / 3 * plain * 1.05
    assert operations(model, "two_pass") > (6 + 3 * 4 / 32) / 3 * plain * 0.95


class Between(nn.Module):
    """Two linear layers after a batch normalisation, with something between them."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.first, self.second = nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.function, self.calls = function, 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.function(self.first, self.norm(x)))


@pytest.mark.parametrize("of", ["input", "weight", "bias"])
def test_products_of_other_operands_are_not_taken(of: str) -> None:
    """With the products of the first pass the losses would be those of the first pass, whatever was between."""
    calls = itertools.count(1)

    def between(layer: nn.Module, x: Tensor) -> Tensor:
        operands = {"input": x, "weight": layer.weight, "bias": layer.bias}
        return F.linear(**(operands | {of: operands[of] * next(calls)}))

    model = Between(between)
    before = Snapshot.of(model)
    with pytest.raises(NotImplementedError, match="two forward passes over the same batch do not agree"):
        metakern.l2rw_step(model, *inputs.pair(5, 3, 4, classes=3), engine="jvp")
    before.assert_unchanged(model)


def test_one_entry_of_many_that_is_another() -> None:
    calls = itertools.count(1)

    def between(layer: nn.Module, x: Tensor) -> Tensor:
        noise = torch.zeros_like(x)
        noise[len(x) // 2, 1] = next(calls)
        return layer(x + noise)

    with pytest.raises(NotImplementedError, match="two forward passes over the same batch do not agree"):
        metakern.l2rw_step(Between(between), *inputs.pair(5000, 3, 4, classes=3), engine="jvp")


def mapped(layer: nn.Module, x: Tensor) -> Tensor:
    return torch.vmap(layer)(x)


def overwritten(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x).mul_(2).tanh_()


def without_gradient(layer: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = layer(x).abs().mean()
    return layer(x) / scale


def run_again(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=False)


def by_keyword(layer: nn.Module, x: Tensor) -> Tensor:
    return F.linear(weight=layer.weight, bias=layer.bias, input=x)


@pytest.mark.parametrize("function", [mapped, overwritten, without_gradient, run_again, by_keyword])
def test_products_that_are_not_kept(function: Callable[[nn.Module, Tensor], Tensor]) -> None:
    judge_step(metakern.l2rw_step, setup_of(Between(function), 4), engine="jvp")


def test_checkpointed_products_are_let_go() -> None:
    noted = []

    def between(layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(layer, x, use_reentrant=False)

    first_pass = jvp.Products.__torch_function__
    model = Between(between)
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            jvp.Products, "__torch_function__", lambda self, *given: noted.append(self) or first_pass(self, *given)
        )
        metakern.l2rw_step(model, batch, meta_batch, engine="jvp")
    assert {len(products.found) for products in noted} == {2}  # the normalisation and the last layer


def test_normalisation_in_more_precision() -> None:
    """As under autocast on a GPU: activations in bfloat16, the parameters of the normalisation in float32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 3)).bfloat16()
    model[1].float()
    batch, meta_batch = inputs.pair(6, 3, 3, 6, 6, classes=3, dtype=torch.bfloat16)
    reused, repeated = (
        metakern.grad_dots(model, batch, meta_batch, engine="jvp", memory=memory).dots.double()
        for memory in ("reuse", "two_pass")
    )
    gradients = [p.norm() for p in torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), model.parameters())]
    scale = float(torch.stack(gradients).double().square().sum())
    budget.assert_within(reused, repeated, 6 * scale, dtype=torch.bfloat16, terms=8 * 16)


def test_parameters_held_elsewhere_are_dual_in_products() -> None:
    model = Between(lambda layer, x: F.linear(x, *held))
    held = [model.first.weight, model.first.bias]
    batches = inputs.pair(5, 3, 4, classes=3)
    dual, truth = (metakern.grad_dots(model, *batches, engine=engine).dots for engine in ("jvp", "double_backward"))
    budget.assert_within(dual, truth, float(truth.abs().max()), terms=100)
