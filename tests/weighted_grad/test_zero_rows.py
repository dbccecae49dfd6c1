"""Examples of weight zero are left out of the products, not multiplied by zero."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import metakern
from metakern.engines import pose
from metakern.engines.ghost import solve
from metakern.testing import budget, inputs
from metakern.testing.catalogue import CASES, Case
from metakern.testing.judge import gradients

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize("case", [case for case in CASES if case.ghost == "exact"], ids=lambda case: case.name)
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("keep", [[], [4], [0, 3], [0, 1, 2, 3, 4, 5]], ids=str)
def test_any_set_of_rows(case: Case, keep: list[int], memory: str) -> None:
    def rule(dots: Tensor) -> Tensor:
        weights = torch.zeros_like(dots)
        weights[keep] = torch.linspace(0.5, 2.0, len(keep), dtype=dots.dtype)
        return weights

    setup = case.make(6, 2)
    result = metakern.reweight_step(
        setup.model, setup.batch, setup.meta_batch, loss_fn=setup.loss_fn, rule=rule, engine="ghost", memory=memory
    )
    truth = setup.oracle()
    budget.assert_gradient(gradients(setup.model), truth, weights=result.weights)


def flops_of_weighted_gradient(kept: int, *layers: nn.Module) -> int:
    torch.manual_seed(0)
    model = nn.Sequential(*(layers or (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)))).double()
    batch, meta_batch = inputs.pair(40, 4, 64, classes=3)
    answer = solve(pose(model, batch, meta_batch, None, None, "reuse"))
    weights = (torch.arange(40) < kept).double()
    with FlopCounterMode(display=False) as counter:
        answer.weighted_gradient(weights)
    return counter.get_total_flops()


def test_flops_follow_the_share_kept() -> None:
    whole, half, none = (flops_of_weighted_gradient(kept) for kept in (40, 20, 0))
    assert none == 0
    assert half * 2 == whole
    # One product per layer, two floating point operations per entry: the gradients of two matrices and their biases.
    assert 2 * 40 * (64 * 64 + 64 * 3) <= whole <= 2 * 40 * (64 * 65 + 65 * 3)


@pytest.mark.parametrize(("name", "numbers"), [("same", (2, 1)), ("valid", (0, 0))])
def test_padding_by_name_costs_what_padding_by_numbers_does(name: str, numbers: tuple[int, int]) -> None:
    """The convolution is not made again for the gradient of its kernel."""

    def flops(kept: int, padding: str | tuple[int, int]) -> int:
        layer = nn.Conv2d(1, 3, (5, 3), padding=padding)
        return flops_of_weighted_gradient(kept, nn.Unflatten(1, (1, 8, 8)), layer, nn.Flatten())

    assert flops(0, name) == 0
    assert flops(40, name) == flops(40, numbers) > 0


@pytest.mark.parametrize("layer", [nn.Linear(8, 3), nn.Sequential(nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 3, 2))])
def test_a_row_of_weight_zero_may_be_infinite(layer: nn.Module) -> None:
    """A gradient that overflowed is thrown away by its weight; zero times infinity would spoil the whole batch."""

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        louder = torch.where(torch.arange(len(batch[1])) == 2, 1e10, 1.0)
        return model(batch[0]).flatten(1).sum(1) * louder

    model = nn.Sequential(layer).double()
    for param in model.parameters():
        nn.init.zeros_(param)
    batch, meta_batch = inputs.pair(5, 3, 8, classes=3)
    batch[0][2] = 1e300
    answer = solve(pose(model, batch, meta_batch, losses, None, "reuse"))
    assert not bool(torch.isfinite(answer.dots[2]))
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    for name, grad in answer.weighted_gradient(weights).items():
        assert bool(torch.isfinite(grad).all()), name


def test_one_example_with_all_the_weight() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    metakern.reweight_step(model, batch, meta_batch, rule=lambda dots: torch.eye(5, dtype=dots.dtype)[3])
    kept = {name: grad.clone() for name, grad in gradients(model).items() if grad is not None}
    model.zero_grad()
    nn.functional.cross_entropy(model(batch[0][3:4]), batch[1][3:4]).backward()
    for name, grad in gradients(model).items():
        assert grad is not None
        budget.assert_within(kept[name], grad, 1.0, name=name)
