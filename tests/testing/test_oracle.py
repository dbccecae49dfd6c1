"""The oracle itself, against other ways to the same numbers."""

import pytest
import torch
from torch import Tensor, nn

from metakern.testing import budget, inputs
from metakern.testing.catalogue import CASES, Case
from metakern.testing.judge import Snapshot
from metakern.testing.oracle import oracle

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

# Its gradient is divided by counts over the batch, so that a batch and its single examples differ by definition.
AGREEING = [case for case in CASES if case.name not in ("embedding-scaled-by-frequency", "batch-norm-train")]


@pytest.mark.parametrize("case", AGREEING, ids=lambda case: case.name)
def test_single_examples_agree_with_the_whole_batch(case: Case) -> None:
    setup = case.make(4, 3)
    singly, together = setup.oracle(), setup.oracle(interacting=True)
    budget.assert_dots(together.dots, singly)
    budget.assert_gradient(together.gradient(singly.weights), singly)


def test_definition_by_double_backward() -> None:
    """dots_n = d/deps_n <sum_k eps_k g_k, v>, also where examples interact."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch, meta_batch = inputs.pair(7, 5, 4, classes=3)
    truth = oracle(model, batch, meta_batch, interacting=True)
    params = list(model.parameters())

    def losses(pair: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(pair[0]), pair[1], reduction="none")

    direction = torch.autograd.grad(losses(meta_batch).mean(), params)
    eps = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    grads = torch.autograd.grad((eps * losses(batch)).sum(), params, create_graph=True)
    (dots,) = torch.autograd.grad(sum((g * v).sum() for g, v in zip(grads, direction, strict=True)), eps)
    budget.assert_dots(dots, truth)


def test_definition_by_finite_difference() -> None:
    """dots_n is how fast l_n changes along v; central differences know it to about 1e-9."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    truth = oracle(model, batch, meta_batch)
    params = list(model.parameters())
    direction = torch.autograd.grad(nn.functional.cross_entropy(model(meta_batch[0]), meta_batch[1]), params)
    step = 1e-5

    def moved(by: float) -> Tensor:
        with torch.no_grad():
            torch._foreach_add_(params, direction, alpha=by)
            losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
            torch._foreach_add_(params, direction, alpha=-by)
        return losses

    slope = (moved(step) - moved(-step)) / (2 * step)
    # The truncation error is of order step^2, whatever its constant; a wrong formula is off by order one.
    assert (slope - truth.dots).abs().max() < 1e4 * step**2 * truth.meta_norm


def test_leaves_the_model_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)).double()
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    before = Snapshot.of(model)
    oracle(model, batch, meta_batch, interacting=True)
    before.assert_unchanged(model)


def test_refuses_dropout() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).double()
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    with pytest.raises(ValueError, match="dropout mask of 1"):
        oracle(model, batch, meta_batch)
    oracle(model.eval(), batch, meta_batch)


def test_names_restrict_the_dot_product() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    parts = [oracle(model, batch, meta_batch, names=[name]).dots for name, _ in model.named_parameters()]
    budget.assert_dots(torch.stack(parts).sum(0), oracle(model, batch, meta_batch))
