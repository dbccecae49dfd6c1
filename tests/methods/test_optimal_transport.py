import math

import pytest
import torch
from torch import nn

from metakern.methods import Setting, find
from metakern.methods.class_weights import effective_number
from metakern.methods.optimal_transport import combined_cost, sinkhorn_potentials, transported


def masses(n: int, seed: int) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(0)


def cost_of(m: int = 5, n: int = 7) -> torch.Tensor:
    return torch.rand(m, n, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def entropic(cost, rows, columns, eps=0.1):
    """The value that the duals maximise, and its plan."""
    f, g = sinkhorn_potentials(cost, rows, columns, eps=eps, iterations=5000, tolerance=1e-14)
    plan = rows.unsqueeze(1) * columns * ((f.unsqueeze(1) + g - cost) / eps).exp()
    return (rows * f).sum() + (columns * g).sum(), plan, g


def test_the_plan_has_its_margins():
    rows, columns = masses(5, 0), masses(7, 1)
    _, plan, _ = entropic(cost_of(), rows, columns)
    torch.testing.assert_close(plan.sum(1), rows)
    torch.testing.assert_close(plan.sum(0), columns)


def test_two_points_by_hand():
    # Equal masses, cost 0 on the diagonal and c off it: a / b = e^(c / eps), a + b = 1/2.
    cost = torch.tensor([[0.0, 0.3], [0.3, 0.0]], dtype=torch.float64)
    half = torch.full((2,), 0.5, dtype=torch.float64)
    _, plan, _ = entropic(cost, half, half)
    assert plan[0, 0].item() == pytest.approx(0.5 / (1 + math.exp(-3)))


def test_small_eps_does_not_overflow():
    cost = 100 * cost_of()
    f, g = sinkhorn_potentials(cost, masses(5, 0), masses(7, 1), eps=1e-3)
    assert torch.isfinite(f).all()
    assert torch.isfinite(g).all()


def test_the_dual_is_the_gradient():
    """Against finite differences of the value by the logits of the column masses."""
    cost, rows, logits = cost_of(), masses(5, 0), torch.randn(7, dtype=torch.float64)
    lr, h = 0.01, 1e-5
    gradient = (logits - transported(logits, cost, lr=lr)) / lr
    rows = torch.full((5,), 0.2, dtype=torch.float64)
    for k in range(7):
        moved = [logits.index_add(0, torch.tensor([k]), torch.tensor([d * h], dtype=torch.float64)) for d in (1, -1)]
        up, down = (entropic(cost, rows, z.softmax(0))[0] for z in moved)
        assert gradient[k].item() == pytest.approx(((up - down) / (2 * h)).item(), rel=2e-3, abs=2e-5)


def test_combined_cost_by_hand():
    meta, batch = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    cost = combined_cost(meta, torch.tensor([0]), batch, torch.tensor([0, 0, 1]), classes=4)
    assert cost.tolist() == [[0.0, 0.5, 1.25]]


def test_the_last_layer_learns_late_and_alone(setup):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    made = setup(model)
    step = find("ot-reweighting").begin(made)
    counts = made.task.train.counts(2)
    torch.testing.assert_close(step.weights, effective_number(counts)[made.task.train.targets])
    rows = torch.arange(12)
    batch = made.task.train.inputs[rows], made.task.train.targets[rows]
    meta = made.task.meta.inputs, made.task.meta.targets
    moved = []
    for k in (0, 9):
        before, weights = [p.clone() for p in model.parameters()], step.weights.clone()
        setting = Setting(counts, torch.Generator(), indices=rows, step=k, steps=10)
        outcome = step(model, batch, meta, optimizer=made.make_optimizer(model), setting=setting)
        moved.append([not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)])
        assert torch.equal(weights[12:], step.weights[12:])
    assert moved == [[True] * 4, [False, False, True, True]]
    torch.testing.assert_close(outcome.weights * 12, step.weights[rows].double(), rtol=1e-6, atol=0)
