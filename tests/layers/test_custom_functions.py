"""Forward mode of custom autograd.Functions by their backward pass, which may be no derivative of what they compute."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionMeta, once_differentiable

import metakern
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import Snapshot, judge_step


class Rounded(Function):
    """Rounding with the gradient of none, as networks are trained that will be quantised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, steps: int) -> Tensor:
        return (x * steps).round() / steps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class RoundedForward(Rounded):
    """Its forward mode is that of rounding: not the derivative that its backward pass takes."""

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return torch.zeros_like(tangent)


class OnceBackward(Function):
    """Its backward pass cannot be differentiated; it has a forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 2 * tangent


class Spike(Function):
    """A step with the slope of a smooth one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / (1 + ctx.saved_tensors[0].abs()) ** 2


class Reversed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -0.5 * grad


class Sparsemax(Function):
    """The nearest point of the simplex; returns what it was made of as well, which has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ordered, places = x.sort(1, descending=True)[0], torch.arange(1, x.shape[1] + 1)
        count = (1 + places * ordered > ordered.cumsum(1)).sum(1, keepdim=True)
        output = (x - (ordered.cumsum(1).gather(1, count - 1) - 1) / count).clamp(min=0)
        ctx.save_for_backward(output, count)
        ctx.mark_non_differentiable(count)
        return output, count

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Tensor:
        output, count = ctx.saved_tensors
        grad = grad.masked_fill(output == 0, 0.0)
        return (grad - grad.sum(1, keepdim=True) / count).masked_fill(output == 0, 0.0)


class Product(Function):
    """Of two tensors, in two outputs, by `setup_context`."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return x * weight, x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight + other * x.cos(), (grad * x).sum(0)


rounded = Rounded.apply  # kept before any pass, as modules keep it


@torch.no_grad()
def _constants(h: Tensor, w: Tensor) -> Tensor:
    return rounded(h, 8) * Rounded.apply(w, 4) * OnceBackward.apply(h) + Product.apply(h, w)[0]


TAKEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "straight through": lambda h, w: rounded(h, 8) * rounded(w, 4),
    "surrogate": lambda h, w: Spike.apply(h * w) + h,
    "reversed": lambda h, w: Reversed.apply(h) * w,
    "two outputs": lambda h, w: torch.mul(*Product.apply(h, w)),
    "one without gradient": lambda h, w: torch.mul(*Sparsemax.apply(h * w)),
    "forward mode of another derivative": lambda h, w: RoundedForward.apply(h, 8) * w,
    "forward mode alone": lambda h, w: OnceBackward.apply(h) * w,
    "without gradients": lambda h, w: h * w * _constants(h, w),
    "its forward pass as plain operations": lambda h, w: Rounded.forward(None, h, 8) + Product.forward(h, w)[0],
}


class Normalised(nn.Module):
    """Batch statistics, so that forward mode is asked."""

    def __init__(self, taken: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.weight, self.taken = nn.Parameter(torch.linspace(0.5, 1.5, 5)), taken

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.taken(self.norm(self.first(x)), self.weight))


def setup(taken: Callable[[Tensor, Tensor], Tensor]) -> Setup:
    torch.manual_seed(0)
    return Setup(Normalised(taken).double(), *inputs.pair(6, 3, 4, classes=3), interacting=True)


@pytest.mark.parametrize("name", TAKEN)
def test_exact(name: str) -> None:
    assert judge_step(metakern.l2rw_step, setup(TAKEN[name])).result.engine == "jvp"
    assert "__getattribute__" not in vars(FunctionMeta)


@pytest.mark.parametrize("name", TAKEN)
def test_exact_in_a_program(name: str) -> None:
    case = setup(TAKEN[name])
    program = metakern.compile_step(case.model, case.batch, case.meta_batch, backend="eager")

    def step(model: nn.Module, batch: Any, meta_batch: Any, loss_fn: Any) -> Any:
        return program(batch, meta_batch)

    assert judge_step(step, case).result.engine == "jvp"


class _Doubled(Function):
    """Twice the input, by a backward pass that a subclass spoils."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x


class Unrecorded(_Doubled):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        with torch.no_grad():
            return 2 * grad


class Once(_Doubled):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class HalfLost(_Doubled):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad + grad.data


class Clipped(_Doubled):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (2 * grad).clamp(-100, 100)


class InPlace(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@pytest.mark.parametrize("function", [Unrecorded, Once, HalfLost, Clipped, InPlace])
def test_refused(function: Any) -> None:
    """What a backward pass loses or clips is said, and nothing has changed."""
    case = setup(lambda h, w: function.apply(h * w))
    before = Snapshot.of(case.model)
    with pytest.raises(NotImplementedError, match=f"{function.__name__} has no forward mode of its own"):
        metakern.l2rw_step(case.model, case.batch, case.meta_batch)
    before.assert_unchanged(case.model)
    assert "__getattribute__" not in vars(FunctionMeta)


def test_refused_where_the_forward_pass_takes_a_gradient_through_it() -> None:
    """A gradient penalty: two backward passes of the function alone would cut it."""

    def penalised(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0].detach().requires_grad_()
        with torch.enable_grad():
            losses = nn.functional.cross_entropy(model(x), batch[1], reduction="none")
            (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
        return losses + slope.square().sum(1)

    case = setup(lambda h, w: Spike.apply(h * w) + h)
    with pytest.raises(NotImplementedError, match="Spike has no forward mode of its own"):
        metakern.l2rw_step(case.model, case.batch, case.meta_batch, loss_fn=penalised)
    case.loss_fn = penalised
    judge_step(metakern.l2rw_step, case, engine="double_backward")
