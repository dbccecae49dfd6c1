"""register_layer: a module served as a whole, or by a rule of the user's own."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.capture import whole_modules
from metakern.layers import generic, linear, table
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    functions, modules = dict(table._BY_FUNCTION), dict(table._BY_MODULE)
    registered = set(whole_modules.REGISTERED)
    yield
    for known, before in ((table._BY_FUNCTION, functions), (table._BY_MODULE, modules)):
        known.clear()
        known.update(before)
    whole_modules.REGISTERED.clear()
    whole_modules.REGISTERED.update(registered)


class Cube(torch.autograd.Function):
    """x * w^3 with a backward of its own and no forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x * weight**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad * weight**3, (grad * x * 3 * weight**2).flatten(0, -2).sum(0)


class CubeLayer(nn.Module):
    """What tracing cannot see into."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.linspace(0.5, 1.5, width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x, self.weight) + self.bias


class Louder(CubeLayer):
    """A subclass with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x) + self.weight


def setup_of(*layers: nn.Module, shape: tuple[int, ...] = (4,)) -> Setup:
    torch.manual_seed(0)
    head = [nn.Flatten(), nn.Linear(4 * (1 if len(shape) == 1 else shape[0]), 3)]
    return Setup(nn.Sequential(*layers, *head).double(), *inputs.pair(6, 3, *shape, classes=3))


MEMORIES = pytest.mark.parametrize("memory", ["reuse", "two_pass"])


@MEMORIES
@pytest.mark.parametrize("shape", [(4,), (5, 4)])
def test_module_as_a_whole(memory: str, shape: tuple[int, ...]) -> None:
    setup = setup_of(nn.Linear(4, 4), CubeLayer(), nn.Tanh(), shape=shape)
    with pytest.raises(NotImplementedError, match="register_layer"):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine="ghost", memory=memory)
    metakern.register_layer(CubeLayer)
    assert judge_step(metakern.l2rw_step, setup, memory=memory).result.engine == "ghost"


@MEMORIES
def test_subclasses_are_served_by_their_own_forward(memory: str) -> None:
    metakern.register_layer(CubeLayer)
    judge_step(metakern.l2rw_step, setup_of(nn.Linear(4, 4), Louder(), nn.Tanh()), engine="ghost", memory=memory)


@MEMORIES
def test_reused_tied_and_frozen(memory: str) -> None:
    metakern.register_layer(CubeLayer)
    layer, other = CubeLayer(), CubeLayer()
    other.weight = layer.weight
    frozen = CubeLayer().requires_grad_(False)
    setup = setup_of(layer, nn.Tanh(), layer, other, nn.Linear(4, 4), frozen)
    judge_step(metakern.l2rw_step, setup, engine="ghost", memory=memory)


@MEMORIES
def test_modules_inside_a_registered_module(memory: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.mix, self.norm = CubeLayer(), nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
            return torch.tanh(self.norm(self.mix(self.inner(x)))) * scale + x

    metakern.register_layer(Outer)
    judge_step(metakern.l2rw_step, setup_of(nn.Linear(4, 4), Outer()), engine="ghost", memory=memory)


class Two(nn.Module):
    """Two uses of parameters, and one as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Hinge(nn.Module):
    """Couples all examples, but not in these batches."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(x.sum() - 1e6)


@MEMORIES
def test_the_proof_sees_registered_modules_as_wholes(memory: str) -> None:
    """Uses before and after them have the examples in different places."""
    metakern.register_layer(Two)
    as_rows = nn.Flatten(0, 1), nn.Linear(4, 4), nn.Unflatten(0, (-1, 5))
    judge_step(metakern.l2rw_step, setup_of(Two(), *as_rows, shape=(5, 4)), engine="ghost", memory=memory)
    setup = setup_of(Two(), *as_rows, Hinge(), shape=(5, 4))
    with pytest.raises(NotImplementedError, match="perhaps not its gradient"):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine="ghost", memory=memory)


def test_the_forward_counts_once() -> None:
    """A replay for the dots is not another training step: buffers move as in a plain one."""

    class Counting(CubeLayer):
        def __init__(self) -> None:
            super().__init__()
            self.seen: Tensor
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            return super().forward(x)

    metakern.register_layer(Counting)
    setup = setup_of(nn.Linear(4, 4), Counting())
    metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine="ghost")
    assert float(setup.model[1].seen) == 6


class Nested(CubeLayer):
    """Two outputs of which the second is made from the first, and the first once more."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        first = super().forward(x)
        return first, [torch.tanh(first) * self.bias.exp(), first]


class UsesAll(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Nested()

    def forward(self, x: Tensor) -> Tensor:
        first, (second, again) = self.inner(x)
        return first + 2.0 * second * again


@MEMORIES
def test_outputs_made_from_one_another_count_once(memory: str) -> None:
    metakern.register_layer(Nested)
    judge_step(metakern.l2rw_step, setup_of(nn.Linear(4, 4), UsesAll()), engine="ghost", memory=memory)


@MEMORIES
def test_randomness_inside(memory: str) -> None:
    """The mask drawn inside the module is the one that its replay sees."""

    class Thinned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(torch.tanh(self.mix(x)))

    setup = setup_of(Thinned())
    answers = []
    for registered in (False, True):
        if registered:
            metakern.register_layer(Thinned)
        torch.manual_seed(3)
        answers.append(
            metakern.grad_dots(setup.model, setup.batch, setup.meta_batch, engine="ghost", memory=memory).dots
        )
    assert torch.equal(answers[0].sign(), answers[1].sign())
    assert float((answers[0] - answers[1]).abs().max()) < 1e-12


def test_interaction_inside_is_found() -> None:
    class Mixing(CubeLayer):
        def forward(self, x: Tensor) -> Tensor:
            hidden = super().forward(x)
            return hidden - hidden.mean(0)

    metakern.register_layer(Mixing)
    setup = setup_of(nn.Linear(4, 4), Mixing())
    setup.interacting = True
    with pytest.raises(NotImplementedError, match="interact"):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine="ghost")


def test_a_rule_of_ones_own() -> None:
    """Asked for by function, the rule is the one that is used."""
    asked = []

    def dots(record: Any, tangents: Any, examples: int) -> Tensor:
        asked.append(record.call.name)
        return generic.RULE.dots(record, tangents, examples)

    rule = metakern.LayerRule(lambda call: True, dots, generic.RULE.weighted_grads)
    metakern.register_layer(torch.nn.functional.linear, rule)
    setup = setup_of(nn.Linear(4, 4), nn.Tanh())
    judge_step(metakern.l2rw_step, setup, engine="ghost")
    asked.clear()  # the first step asks once more, to be held against autograd
    metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine="ghost")
    assert asked == ["linear", "linear"]


def test_a_rule_that_does_not_apply_leaves_the_call_to_forward_mode() -> None:
    rule = metakern.LayerRule(lambda call: False, linear.RULE.dots, linear.RULE.weighted_grads)
    metakern.register_layer(torch.nn.functional.linear, rule)
    judge_step(metakern.l2rw_step, setup_of(nn.Linear(4, 4), nn.Tanh()), engine="ghost")


@pytest.mark.parametrize(
    ("layer", "rule", "match"),
    [("linear", None, "layer must be"), (nn.Linear, "rule", "rule must be"), (torch.relu, None, "layer must be")],
)
def test_arguments(layer: Any, rule: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        metakern.register_layer(layer, rule)
