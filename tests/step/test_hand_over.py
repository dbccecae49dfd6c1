"""What is done with the weighted gradient: left, added, stepped with; and over which parameters the dots run."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import Snapshot, gradients, judge_step


def setup_of(n: int = 6, m: int = 3) -> Setup:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    return Setup(model, *inputs.pair(n, m, 4, classes=3))


ENGINES = pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])


@ENGINES
def test_replaces_what_is_there(engine: str) -> None:
    setup = setup_of()
    for param in setup.model.parameters():
        param.grad = torch.full_like(param, 1e3)
    judge_step(metakern.l2rw_step, setup, engine=engine)


@ENGINES
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_accumulates(engine: str, memory: str) -> None:
    setup = setup_of()
    metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine=engine)
    once = {name: grad.clone() for name, grad in gradients(setup.model).items()}
    metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine=engine, memory=memory, accumulate=True)
    for name, grad in gradients(setup.model).items():
        budget.assert_within(grad, 2 * once[name], 1.0, name=name)


@pytest.mark.parametrize("stepping", [False, True])
def test_accumulates_in_the_memory_of_the_gradient(stepping: bool) -> None:
    """Code that clips, reduces or steps from one buffer of all gradients finds the sum there."""
    setup, others = setup_of(), setup_of()
    parameters = list(setup.model.parameters())
    buffer = torch.ones(sum(p.numel() for p in parameters), dtype=torch.float64)
    for p, q, part in zip(parameters, others.model.parameters(), buffer.split([p.numel() for p in parameters])):
        p.grad, q.grad = part.view_as(p), torch.ones_like(q)
    for each in (setup, others):
        optimizer = torch.optim.SGD(each.model.parameters(), lr=0.1) if stepping else None
        metakern.l2rw_step(each.model, each.batch, each.meta_batch, accumulate=True, optimizer=optimizer)
    assert torch.equal(buffer, torch.cat([q.grad.flatten() for q in others.model.parameters()]))  # pyright: ignore
    assert not torch.equal(buffer, torch.ones_like(buffer))
    for p, q in zip(parameters, others.model.parameters()):
        assert torch.equal(p, q)


def test_accumulates_onto_nothing() -> None:
    setup = setup_of()
    judge_step(metakern.l2rw_step, setup, accumulate=True)


def test_gradients_own_their_memory() -> None:
    """Clipping in place, or a second step, must not reach the first result or another parameter's gradient."""
    setup = setup_of()
    first = metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch)
    kept = {name: grad.clone() for name, grad in gradients(setup.model).items()}
    dots = first.dots.clone()
    addresses = [grad.untyped_storage().data_ptr() for grad in gradients(setup.model).values()]
    assert len(set(addresses)) == len(addresses)
    for name, grad in gradients(setup.model).items():
        assert torch.equal(grad, kept[name])
        assert not grad.requires_grad
        grad.mul_(0)
    metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch)
    assert torch.equal(first.dots, dots)


class Sum(nn.Module):
    """Parameters that meet one another before they meet data: gradients of both are one tensor, or one number."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.shift, self.offset, self.scale = (
            nn.Parameter(torch.randn(*shape).double()) for shape in ((4, 3), (3,), (3,), (5,))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight * self.scale.sum()) + (self.shift + self.offset)


@ENGINES
def test_gradients_are_laid_out_as_their_parameters(engine: str) -> None:
    """Fused optimizers read gradients in the order of their memory, clipping in place writes each once."""
    torch.manual_seed(0)
    model = nn.Sequential(Sum(), nn.Linear(3, 3).double())
    model[1].weight.data = model[1].weight.data.t().contiguous().t()  # type: ignore[union-attr]
    judge_step(metakern.l2rw_step, Setup(model, *inputs.pair(6, 3, 4, classes=3)), engine=engine)
    grads = [param.grad for param in model.parameters() if param.grad is not None]
    assert [grad.stride() for grad in grads] == [param.stride() for param in model.parameters()]
    before = [grad.clone() for grad in grads]
    for grad in grads:
        grad.mul_(0.5)
    for grad, whole in zip(grads, before, strict=True):
        budget.assert_within(grad, 0.5 * whole, 1.0)


@ENGINES
@pytest.mark.parametrize("rule", [lambda dots: dots > 0, lambda dots: dots.clamp_(min=0), lambda dots: dots.float()])
def test_rules_may_mask_work_in_place_or_round(engine: str, rule: Any) -> None:
    setup = setup_of()
    truth = setup.oracle()
    result = metakern.reweight_step(setup.model, setup.batch, setup.meta_batch, rule=rule, engine=engine)
    budget.assert_dots(result.dots, truth)
    budget.assert_gradient(gradients(setup.model), truth, weights=result.weights)


def test_results_are_detached() -> None:
    setup = setup_of()
    result = metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch)
    for value in (result.weights, result.dots, result.losses, result.meta_loss):
        assert not value.requires_grad
        assert value.grad_fn is None
    assert result.meta_loss.shape == ()


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_optimizer_steps_as_by_hand(make: Any) -> None:
    setup = setup_of()
    other = copy.deepcopy(setup.model)
    optimizer, manual = make(setup.model.parameters()), make(other.parameters())
    for _ in range(3):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, optimizer=optimizer)
        metakern.l2rw_step(other, setup.batch, setup.meta_batch)
        manual.step()
    for got, want in zip(setup.model.parameters(), other.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
@ENGINES
def test_thirty_steps_follow_the_oracle(engine: str, memory: str) -> None:
    """Training by the library and by the float64 loop: the same weights of examples and of the network all along."""
    setup = setup_of(8, 4)
    reference = copy.deepcopy(setup)
    optimizers = [torch.optim.SGD(each.model.parameters(), lr=0.1, momentum=0.9) for each in (setup, reference)]
    for _ in range(30):
        truth = reference.oracle()
        for name, grad in truth.gradient(truth.weights).items():
            reference.model.get_parameter(name).grad = grad
        optimizers[1].step()
        metakern.l2rw_step(
            setup.model, setup.batch, setup.meta_batch, optimizer=optimizers[0], engine=engine, memory=memory
        )
    for got, want in zip(setup.model.parameters(), reference.model.parameters(), strict=True):
        budget.assert_within(got, want, 1 + want.abs(), dtype=torch.float64, name="parameters after thirty steps")


@ENGINES
def test_params_restrict_the_dots_and_not_the_gradient(engine: str) -> None:
    for chosen, names in (
        ("0.*", ["0.weight", "0.bias"]),
        ("*.bias", ["0.bias", "2.bias", "3.bias"]),
        (["3.weight", "2.*"], ["2.weight", "2.bias", "3.weight"]),
    ):
        setup = setup_of()
        _judge_restricted(setup, chosen, names, engine)
    setup = setup_of()
    _judge_restricted(setup, setup.model[3], ["3.weight", "3.bias"], engine)
    setup = setup_of()
    _judge_restricted(setup, [setup.model[0].weight], ["0.weight"], engine)


def _judge_restricted(setup: Setup, chosen: Any, names: list[str], engine: str) -> None:
    restricted, whole = setup.oracle(names=names), setup.oracle()
    result = metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, params=chosen, engine=engine)
    budget.assert_dots(result.dots, restricted)
    budget.assert_gradient(gradients(setup.model), whole, weights=result.weights)


@ENGINES
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_any_rule(engine: str, memory: str) -> None:
    """Negative weights, and weights that do not sum to one."""

    def rule(dots: Tensor) -> Tensor:
        return torch.linspace(-2, 3, len(dots), dtype=dots.dtype)

    setup = setup_of()
    truth = setup.oracle()
    result = metakern.reweight_step(setup.model, setup.batch, setup.meta_batch, rule=rule, engine=engine, memory=memory)
    assert torch.equal(result.weights, rule(result.dots))
    budget.assert_gradient(gradients(setup.model), truth, weights=result.weights)


def test_rule_by_name_is_l2rw() -> None:
    setup = setup_of()
    judge_step(metakern.reweight_step, setup, rule="clip_normalise")


@ENGINES
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_no_example_helps(engine: str, memory: str) -> None:
    """All weights zero: a gradient of zeros, not None, not NaN."""
    setup = setup_of()
    result = metakern.reweight_step(
        setup.model, setup.batch, setup.meta_batch, rule=torch.zeros_like, engine=engine, memory=memory
    )
    assert not result.weights.any()
    for grad in gradients(setup.model).values():
        assert grad is not None
        assert not grad.any()


@ENGINES
def test_grad_dots_changes_nothing(engine: str) -> None:
    setup = setup_of()
    before = {name: param.clone() for name, param in setup.model.named_parameters()}
    result = metakern.grad_dots(setup.model, setup.batch, setup.meta_batch, engine=engine)
    budget.assert_dots(result.dots, setup.oracle())
    assert result.engine == engine
    for name, param in setup.model.named_parameters():
        assert param.grad is None
        assert torch.equal(param, before[name])


def test_engines_and_memories_agree() -> None:
    """The same numbers to rounding, whichever way they are computed."""
    setup = setup_of(9, 5)
    truth = setup.oracle()
    for engine in ("ghost", "jvp", "double_backward"):
        for memory in ("reuse", "two_pass"):
            setup.model.zero_grad()
            judge_step(metakern.l2rw_step, setup, truth=truth, engine=engine, memory=memory)


def test_frozen_parameters_have_no_gradient() -> None:
    """What an earlier step has left there would move them."""
    setup = setup_of()
    setup.model[0].requires_grad_(False)
    setup.model[0].weight.grad = torch.ones_like(setup.model[0].weight)
    metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, accumulate=True)
    assert bool((setup.model[0].weight.grad == 1).all())
    metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch)
    assert setup.model[0].weight.grad is None
    assert setup.model[0].bias.grad is None


@ENGINES
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_a_gradient_has_memory_of_its_own(engine: str, memory: str) -> None:
    """Losses that add a parameter for each example: autograd hands the weights on as its gradient."""

    class Offset(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 1)
            self.offset = nn.Parameter(torch.linspace(0.1, 1, 6))

    def losses(model: Offset, batch: Any) -> Tensor:
        found = model(batch[0]).square().squeeze(1)
        return found + model.offset if len(found) == 6 else found + model.offset.sum()

    batch, meta = inputs.pair(6, 3, 4, classes=3)
    model = Offset().double()
    result = metakern.reweight_step(
        model, batch, meta, rule=torch.ones_like, loss_fn=losses, engine=engine, memory=memory
    )
    model.offset.grad.zero_()
    assert result.weights.tolist() == [1.0] * 6


def with_temperature(temperature: Tensor) -> Any:
    return lambda model, batch: F.cross_entropy(model(batch[0]) * temperature, batch[1], reduction="none")


@pytest.mark.parametrize("engine", ["auto", "ghost", "jvp", "double_backward"])
def test_a_parameter_outside_the_model_is_an_error(engine: str) -> None:
    """The step would not train it, and with an optimizer move it by the gradient of an earlier step."""
    setup, temperature = setup_of(), nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.SGD([*setup.model.parameters(), temperature], lr=0.1)
    before = Snapshot.of(setup.model, optimizer)
    with pytest.raises(ValueError, match=r"parameter of shape .* not among the model's"):
        metakern.l2rw_step(
            *(setup.model, setup.batch, setup.meta_batch),
            **{"loss_fn": with_temperature(temperature), "optimizer": optimizer, "engine": engine},
        )
    before.assert_unchanged(setup.model, optimizer)
    metakern.l2rw_step(
        *(setup.model, setup.batch, setup.meta_batch),
        **{"loss_fn": with_temperature(temperature.detach()), "optimizer": optimizer, "engine": engine},
    )


def test_other_parameters_of_the_optimizer_do_not_move() -> None:
    setup, other = setup_of(), nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*setup.model.parameters(), other], lr=0.1)
    other.grad = torch.ones(3)
    metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, optimizer=optimizer, accumulate=True)
    assert torch.equal(other.detach(), torch.full((3,), 0.9))
    metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, optimizer=optimizer)
    assert torch.equal(other.detach(), torch.full((3,), 0.9))
