"""What backward passes inside a step add to `.grad` is gone after it; what was there before is as it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from metakern.testing.judge import Snapshot


class Reversible(torch.autograd.Function):
    """Calls `backward` of the layer in its own backward pass, as reversible layers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Module) -> Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return layer(x.detach()).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            ctx.layer(x).backward(grads[0])
        return x.grad, None


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(Reversible.apply(torch.tanh(self.first(x)), self.second)))


def with_gradients() -> Network:
    model = Network()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model


STEPS: dict[str, Callable[..., Any]] = {
    "ghost": lambda model, *given: metakern.l2rw_step(model, *given, engine="ghost"),
    "jvp": lambda model, *given: metakern.l2rw_step(model, *given, engine="jvp"),
    "double_backward": lambda model, *given: metakern.l2rw_step(model, *given, engine="double_backward"),
    "metabalance": lambda model, *given: metakern.metabalance_step(model, *given, inner_lr=0.1),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_leaves_gradients_as_they_were(step: str) -> None:
    model = with_gradients()
    before = Snapshot.of(model)
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
        STEPS[step](model, *inputs.pair(6, 3, 4, classes=3))
    before.assert_unchanged(model)


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_what_adds_by_itself_is_refused_where_the_rest_takes_part(memory: str) -> None:
    model = with_gradients()
    before = Snapshot.of(model)

    def losses(model: Any, batch: Any) -> Tensor:
        plain = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return plain + model.second(batch[0]).square().sum(1)

    with pytest.raises(NotImplementedError, match=r"adds to the gradient of parameter 'second\.weight' by itself"):
        metakern.l2rw_step(model, *inputs.pair(6, 3, 4, classes=3), loss_fn=losses, memory=memory)
    before.assert_unchanged(model)


def test_dots_leave_gradients_as_they_were() -> None:
    model = nn.Linear(4, 3).double()
    given = [torch.ones_like(p) for p in model.parameters()]
    for p, grad in zip(model.parameters(), given, strict=True):
        p.grad = grad
    metakern.grad_dots(model, *inputs.pair(6, 3, 4, classes=3))
    assert all(p.grad is grad for p, grad in zip(model.parameters(), given, strict=True))


@pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])
def test_adds_to_what_was_there(engine: str) -> None:
    """A loss that takes gradients by `backward` on its way, as adversarial training does."""

    def losses(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        nn.functional.cross_entropy(model(x), batch[1]).backward()
        assert x.grad is not None
        return nn.functional.cross_entropy(model(batch[0] + 0.1 * x.grad.sign()), batch[1], reduction="none")

    found = []
    for accumulate in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        given = inputs.pair(6, 3, 4, classes=3)
        metakern.l2rw_step(model, *given, loss_fn=losses, engine=engine, accumulate=accumulate)
        found.append([p.grad for p in model.parameters()])
    for one, more in zip(*found, strict=True):
        budget.assert_within(more, one + 1, 1.0)
