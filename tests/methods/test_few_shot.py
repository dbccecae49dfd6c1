"""The rules of few-shot learning against values by hand, and MAML's gradient against others of the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import metakern
from metakern.data import Examples
from metakern.methods.maml import adapted
from metakern.methods.prototypes import prototype_logits
from metakern.methods.support_balance import BALANCES, oversampled
from metakern.trainers.networks import BagOfTokens
from metakern.trainers.transformer import Transformer


def examples(inputs: torch.Tensor, targets: list[int]) -> Examples:
    return Examples(inputs, torch.tensor(targets), torch.arange(len(targets)))


def test_prototypes_by_hand():
    support = examples(torch.tensor([[0.0, 0.0], [4.0, 0.0], [2.0, 0.0], [0.0, 4.0]]), [0, 0, 0, 1])
    # Prototypes (2, 0) and (0, 4).
    logits = prototype_logits(nn.Identity(), support, torch.tensor([[2.0, 0.0], [0.0, 0.0], [1.0, 2.0]]))
    assert logits.tolist() == [[0, -20], [-4, -16], [-5, -5]]


def test_oversampling_fills_every_class_up_with_its_own():
    support = examples(torch.arange(6).float().unsqueeze(1), [0, 1, 1, 2, 2, 2])
    filled = oversampled(support, torch.Generator().manual_seed(0))
    assert filled.counts(3).tolist() == [3, 3, 3]
    assert set(filled.ids.tolist()) == set(range(6))
    assert torch.equal(support.targets[filled.ids], filled.targets)
    assert torch.equal(support.inputs[filled.ids], filled.inputs)


def test_losses_by_hand():
    """Two classes of 1 and 3 shots; probabilities 1/2 and 1/4 of the true class."""
    logits = torch.stack([torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()])
    targets, shots = torch.tensor([0, 1]), torch.tensor([1, 3])
    half, quarter = torch.log(torch.tensor(2.0)), torch.log(torch.tensor(4.0))

    def loss(name: str) -> float:
        return float(BALANCES[name].loss(logits, targets, shots))

    assert loss("none") == pytest.approx(float(half + quarter) / 2)
    assert loss("over-sampling") == loss("none")
    # 1/n: weights 1 and 1/3.
    assert loss("weighted") == pytest.approx(float(half + quarter / 3) / (4 / 3))
    # (1 - 0.9) / (1 - 0.9^n): 1 and 0.1 / 0.271.
    assert loss("class-balanced") == pytest.approx(float(half + quarter / 2.71) / (1 + 1 / 2.71))
    assert loss("focal") == pytest.approx(float(half / 4 + quarter * 9 / 16) / 2)


@pytest.mark.parametrize("name", BALANCES)
def test_losses_of_balanced_shots_are_the_plain_one(name):
    logits, targets = torch.randn(8, 4), torch.arange(8) % 4
    found = BALANCES[name].loss(logits, targets, torch.full((4,), 5))
    if name != "focal":
        assert float(found) == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-6)


def test_adapting_by_hand():
    """One weight, loss (w x)^2 / 2: w goes to w (1 - lr x^2)^steps."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    support = examples(torch.tensor([[0.5]]), [0])

    def loss(logits, targets):
        return logits.square().sum() / 2

    moved = adapted(model, support, loss, steps=3, lr=0.4, order=2)["weight"]
    # The gradient is w x^2, x = 1/2: each step multiplies w by 1 - 0.4 / 4.
    assert float(moved.detach()) == pytest.approx(2 * 0.9**3)
    assert float(torch.autograd.grad(moved.sum(), model.weight)[0]) == pytest.approx(0.9**3)
    first = adapted(model, support, loss, steps=3, lr=0.4, order=1)["weight"]
    assert float(first.detach()) == pytest.approx(2 * 0.9**3)
    assert float(torch.autograd.grad(first.sum(), model.weight)[0]) == 1
    assert float(model.weight.detach()) == 2


def small(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def batches() -> tuple[Examples, Examples]:
    source = torch.Generator().manual_seed(5)
    support = examples(torch.randn(6, 3, generator=source, dtype=torch.float64), [0, 0, 0, 0, 0, 1])
    query = examples(torch.randn(8, 3, generator=source, dtype=torch.float64), [0, 1] * 4)
    return support, query


def maml_gradient(model: nn.Module, support: Examples, query: Examples, *, steps: int, order: int):
    moved = adapted(model, support, F.cross_entropy, steps=steps, lr=0.3, order=order)
    outer = F.cross_entropy(functional_call(model, moved, (query.inputs,)), query.targets)
    return torch.autograd.grad(outer, list(model.parameters()))


@pytest.mark.parametrize("order", [1, 2])
def test_one_inner_step_is_the_gradient_of_metabalance(order):
    support, query = batches()
    model = small()
    found = maml_gradient(model, support, query, steps=1, order=order)
    pair = (support.inputs, support.targets), (query.inputs, query.targets)
    metakern.metabalance_step(model, *pair, inner_lr=0.3, order=order)
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-12, atol=1e-14)


def test_several_inner_steps_against_differences():
    """d L_query(theta_4) / d theta along a random direction, by a central difference in float64."""
    support, query = batches()
    model = small()
    found = maml_gradient(model, support, query, steps=4, order=2)
    torch.manual_seed(1)
    direction = [torch.randn_like(p) for p in model.parameters()]

    def outer(step: float) -> float:
        moved = small()
        with torch.no_grad():
            for p, d in zip(moved.parameters(), direction, strict=True):
                p.add_(step * d)
        final = adapted(moved, support, F.cross_entropy, steps=4, lr=0.3, order=1)
        return float(F.cross_entropy(functional_call(moved, final, (query.inputs,)), query.targets).detach())

    expected = (outer(1e-5) - outer(-1e-5)) / 2e-5
    along = sum(float((g * d).sum()) for g, d in zip(found, direction, strict=True))
    assert along == pytest.approx(expected, rel=1e-7)
    first = maml_gradient(model, support, query, steps=4, order=1)
    assert sum(float((g * d).sum()) for g, d in zip(first, direction, strict=True)) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("make", [lambda: BagOfTokens(9, 2), lambda: Transformer(9, 4, 2)])
def test_networks_for_text_have_the_second_order(make):
    torch.manual_seed(0)
    tokens = torch.randint(1, 9, (6, 4))
    support = examples(tokens, [0, 0, 1, 1, 1, 0])
    model = make()
    moved = adapted(model, support, F.cross_entropy, steps=2, lr=0.1, order=2)
    F.cross_entropy(functional_call(model, moved, (tokens,)), support.targets).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("settings", "named"), [({"order": 3}, "order"), ({"steps": -1}, "steps")])
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        adapted(small(), batches()[0], F.cross_entropy, **{"steps": 1, "lr": 0.1, **settings})


def test_a_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        adapted(nn.Identity(), batches()[0], F.cross_entropy, steps=1, lr=0.1)
