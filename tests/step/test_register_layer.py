"""Layers that tracing cannot see into: refused without registration, exact with it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.capture import module_call
from metakern.layers import table
from metakern.testing import budget, inputs
from metakern.testing.judge import Snapshot
from metakern.testing.oracle import oracle


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight.square(), (2 * grad * x * weight).sum(0)


class Opaque(nn.Module):
    """Its parameter goes straight into a custom function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return _Scale.apply(x, self.weight)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Registrations of a test end with it."""
    monkeypatch.setattr(table, "_BY_MODULE", dict(table._BY_MODULE))
    monkeypatch.setattr(table, "_BY_FUNCTION", dict(table._BY_FUNCTION))
    before = set(module_call.REGISTERED)
    yield
    module_call.REGISTERED.clear()
    module_call.REGISTERED.update(before)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), Opaque(), nn.Tanh(), nn.Linear(6, 3)).double()


def test_refused_without_registration(registry: None) -> None:
    model, (batch, meta_batch) = network(), inputs.pair(6, 4, 4, classes=3)
    before = Snapshot.of(model)
    with pytest.raises(NotImplementedError, match=r"1\.weight.*register_layer"):
        metakern.l2rw_step(model, batch, meta_batch, engine="ghost")
    before.assert_unchanged(model)


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@pytest.mark.parametrize("own_rule", [False, True])
def test_exact_when_registered(registry: None, memory: str, own_rule: bool) -> None:
    model, (batch, meta_batch) = network(), inputs.pair(6, 4, 4, classes=3)

    def dots(record: Any, tangents: Any, examples: int) -> Tensor:
        x, weight = record.call.args[0], record.call.kwargs["parameter:weight"]
        return (record.output_grad * 2 * x * weight * tangents[id(weight)]).detach().sum(1)

    def weighted_grads(record: Any, weights: Any) -> Any:
        x, weight = record.call.args[0], record.call.kwargs["parameter:weight"]
        scaled = record.output_grad * weights.values.unsqueeze(1)
        return {id(weight): (scaled * 2 * x * weight).detach().sum(0)}

    rule = metakern.LayerRule(lambda call: True, dots, weighted_grads) if own_rule else None
    metakern.register_layer(Opaque, rule)
    truth = oracle(model, batch, meta_batch)
    result = metakern.l2rw_step(model, batch, meta_batch, engine="ghost", memory=memory)
    budget.assert_dots(result.dots, truth)
    grads = {name: p.grad for name, p in model.named_parameters()}
    budget.assert_gradient(grads, truth, weights=result.weights)


def test_whole_blocks_can_be_registered(registry: None) -> None:
    """Without a rule: forward mode through the module, parameters of children included."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.shift = nn.Linear(4, 4), nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.inner(x)) * (1 + self.shift) + x

    torch.manual_seed(0)
    model = nn.Sequential(Block(), nn.Dropout(0.0), Block(), nn.Linear(4, 3)).double()
    metakern.register_layer(Block)
    batch, meta_batch = inputs.pair(5, 3, 4, classes=3)
    budget.assert_dots(
        metakern.grad_dots(model, batch, meta_batch, engine="ghost").dots, oracle(model, batch, meta_batch)
    )
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_arguments(registry: None) -> None:
    with pytest.raises(TypeError, match="layer must be"):
        metakern.register_layer(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layer must be"):
        metakern.register_layer(torch.relu)
    with pytest.raises(TypeError, match="rule must be"):
        metakern.register_layer(Opaque, lambda record: None)  # type: ignore[arg-type]
