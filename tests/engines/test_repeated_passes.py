"""Passes that metakern repeats: what they draw, keep and write must be that of the first, and must not count twice."""

import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.testing import budget, inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import Snapshot, judge_step

Between = Callable[["Network", Tensor], Tensor]


class Network(nn.Module):
    """Two linear layers with something between them; with a batch normalisation only forward mode serves it."""

    def __init__(self, between: Between, normalised: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.between = nn.Linear(4, 6), nn.Linear(6, 3), between
        self.norm = nn.BatchNorm1d(6) if normalised else nn.Identity()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self, torch.tanh(self.norm(self.first(x)))))


def setup_of(model: nn.Module) -> Setup:
    return Setup(model, *inputs.pair(5, 3, 4, classes=3), interacting=True)


def double_backward(model: nn.Module) -> metakern.StepResult:
    setup = setup_of(model)
    return metakern.l2rw_step(model, setup.batch, setup.meta_batch, engine="double_backward")


def without_gradient(model: Network, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        size = hidden.abs().mean(1, keepdim=True)
    return hidden / size


def without_gradient_of_a_parameter(model: Network, hidden: Tensor) -> Tensor:
    with torch.no_grad():
        size = model.second.weight.norm()
    return F.linear(hidden, (model.second.weight / size).t() @ model.second.weight)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("engine", ["auto", "jvp"])
@pytest.mark.parametrize("between", [without_gradient, without_gradient_of_a_parameter])
def test_a_block_without_gradient_is_a_constant(between: Between, engine: str, normalised: bool) -> None:
    setup = setup_of(Network(between, normalised))
    truth = setup.oracle()
    judge_step(metakern.l2rw_step, setup, truth=truth, engine=engine)


def drawn_by_python(model: Network, hidden: Tensor) -> Tensor:
    return torch.sin(hidden) if random.random() < 0.5 else hidden * random.gauss(1, 1)


def drawn_by_numpy(model: Network, hidden: Tensor) -> Tensor:
    return hidden * torch.from_numpy(np.random.rand(6))


def drawn_by_own(model: Network, hidden: Tensor) -> Tensor:
    if not hasattr(model, "generators"):
        model.generator, model.random, model.numpy = torch.Generator(), random.Random(0), np.random.default_rng(0)
        model.generators = True
    model.generator.initial_seed()
    noise = torch.rand(hidden.shape, generator=model.generator, dtype=hidden.dtype)
    return hidden * noise * model.random.random() * model.numpy.random()


@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("engine", ["ghost", "jvp"])
@pytest.mark.parametrize("between", [drawn_by_python, drawn_by_numpy, drawn_by_own])
def test_what_is_drawn_is_drawn_once(between: Between, engine: str, micro_batch: int | None) -> None:
    """Dots, weights and the state of the generators are those of an engine that runs either batch a single time."""
    if micro_batch is not None and engine != "ghost":
        pytest.skip("micro_batch is of ghost")
    results, drawn = [], []
    for name in ("double_backward", engine):
        random.seed(3), np.random.seed(3)
        model = Network(between)
        if between is drawn_by_own:
            between(model, torch.zeros(1, 6))
        setup = setup_of(model)
        size = micro_batch if name == "ghost" else None
        results.append(metakern.l2rw_step(model, setup.batch, setup.meta_batch, engine=name, micro_batch=size))
        drawn.append((random.random(), np.random.rand(), model(setup.batch[0]).sum().item()))
    budget.assert_within(results[1].dots, results[0].dots, 1.0)
    budget.assert_within(results[1].meta_loss, results[0].meta_loss, 1.0)
    assert micro_batch is not None or drawn[0] == drawn[1]


class Running(Network):
    """Keeps running values as an attribute, in a list, in a dictionary, in a frozen parameter and in place."""

    def __init__(self, normalised: bool, parameter: bool) -> None:
        super().__init__(lambda model, hidden: hidden, normalised)
        self.mean, self.size, self.calls, self.seen = torch.zeros(6).double(), 1.0, [], {}
        self.in_place = torch.zeros(6).double()
        self.centre = nn.Parameter(torch.zeros(6).double(), requires_grad=False) if parameter else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        out = self.second(hidden - self.mean - self.in_place) / self.size
        with torch.no_grad():
            self.mean = 0.9 * self.mean + 0.1 * hidden.mean(0)
            self.in_place.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
            self.size = 0.9 * self.size + 0.1 * float(hidden.abs().mean())
            self.calls.append(len(x))
            self.seen[len(x)] = hidden.mean()
            if self.centre is not None:
                self.centre.data.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
        return out


class Shared(Network):
    """Two modules hold one buffer: one writes it, the other reads what was written."""

    def __init__(self, normalised: bool) -> None:
        super().__init__(lambda model, hidden: hidden, normalised)
        calls = torch.zeros(()).double()
        self.first.register_buffer("calls", calls)
        self.second.register_buffer("calls", calls)

    def forward(self, x: Tensor) -> Tensor:
        self.first.calls += 1
        return self.second(torch.tanh(self.norm(self.first(x))) * self.second.calls.clone())


@pytest.mark.parametrize("normalised", [False, True])
def test_buffers_that_modules_share(normalised: bool) -> None:
    batches, engines = inputs.pair(5, 3, 4, classes=3), ("jvp", "double_backward")
    first, second = (metakern.l2rw_step(Shared(normalised), *batches, engine=engine) for engine in engines)
    budget.assert_within(first.dots, second.dots, 1 + second.dots.abs())


@pytest.mark.parametrize(("normalised", "parameter"), [(False, False), (False, True), (True, False)])
def test_running_values_count_once(normalised: bool, parameter: bool) -> None:
    """Three steps leave what they leave by an engine that repeats nothing."""
    models = [Running(normalised, parameter) for _ in range(2)]
    for _ in range(3):
        results = []
        for model, engine in zip(models, ("auto", "double_backward"), strict=True):
            setup = setup_of(model)
            results.append(metakern.l2rw_step(model, setup.batch, setup.meta_batch, engine=engine))
        budget.assert_within(results[0].dots, results[1].dots, 1.0)
    one, other = models
    budget.assert_within(one.mean, other.mean, 1.0)
    budget.assert_within(one.in_place, other.in_place, 1.0)
    assert one.calls == other.calls
    budget.assert_within(torch.tensor(one.size), torch.tensor(other.size), 1.0)
    assert one.seen.keys() == other.seen.keys()
    if parameter:
        budget.assert_within(one.centre, other.centre, 1.0)


def test_a_pass_that_cannot_be_repeated_is_refused() -> None:
    stream = (torch.full((6,), 1.0 + k, dtype=torch.float64) for k in itertools.count())  # moves on for good

    def between(model: Network, hidden: Tensor) -> Tensor:
        return hidden * next(stream)

    model = Network(between, normalised=True)
    setup, before = setup_of(model), Snapshot.of(model)
    with pytest.raises(NotImplementedError, match="two forward passes over the same batch do not agree"):
        metakern.l2rw_step(model, setup.batch, setup.meta_batch)
    before.assert_unchanged(model)
    assert double_backward(model).engine == "double_backward"


def test_parts_that_cannot_be_repeated_are_refused() -> None:
    """An iterator, which nobody can reset: the second run of a part would have other numbers than its dots."""
    numbers = itertools.count(1)

    def between(model: Network, hidden: Tensor) -> Tensor:
        return F.dropout(hidden, 0.1) / next(numbers)

    model = Network(between)
    setup, before = setup_of(model), Snapshot.of(model)
    with pytest.raises(NotImplementedError, match="two forward passes over the same batch do not agree"):
        metakern.reweight_step(model, setup.batch, setup.meta_batch, rule="softmax", micro_batch=2)
    before.assert_unchanged(model)


class Energy(nn.Module):
    """Takes a gradient inside its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        (force,) = torch.autograd.grad(torch.tanh(self.second(hidden)).sum(), hidden, create_graph=True)
        return self.second(hidden + force)


class Spectrum(nn.Module):
    """Complex numbers, scaled in place by those of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(torch.tanh(self.first(x)), dim=1)
        spectrum.mul_(torch.fft.rfft(self.second.weight, dim=1).sum(0))
        return self.second(torch.fft.irfft(spectrum, n=6, dim=1))


def test_gradients_inside_the_forward_pass() -> None:
    torch.manual_seed(0)
    model = Energy().double()
    setup, before = setup_of(model), Snapshot.of(model)
    for engine in ("auto", "jvp", "ghost"):
        with pytest.raises(NotImplementedError, match=r"forward mode|is used in a way"):
            metakern.l2rw_step(model, setup.batch, setup.meta_batch, engine=engine)
        before.assert_unchanged(model)
    judge_step(metakern.l2rw_step, setup, engine="double_backward")


class Force(nn.Module):
    """Takes the gradient in its input inside its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(self.second(torch.tanh(self.first(x))).sum(), x, create_graph=True)
        return force


@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_gradients_in_the_input_by_forward_mode(memory: str) -> None:
    torch.manual_seed(0)
    assert judge_step(metakern.l2rw_step, setup_of(Force().double()), memory=memory).result.engine == "jvp"


class Retaining(nn.Module):
    """Keeps an activation and its gradient, as maps of what a network looks at do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.norm(self.first(x))
        self.seen.retain_grad()
        return self.second(torch.tanh(self.seen))


def test_an_activation_whose_gradient_is_retained() -> None:
    torch.manual_seed(0)
    setup = setup_of(Retaining().double())
    assert judge_step(metakern.l2rw_step, setup, engine="jvp").result.engine == "jvp"


def adversarial(model: nn.Module, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_()
    F.cross_entropy(model(x), batch[1], reduction="sum").backward()
    model.zero_grad()
    return F.cross_entropy(model(batch[0] + 0.1 * x.grad.sign()), batch[1], reduction="none")


@pytest.mark.parametrize("settings", [{}, {"engine": "jvp"}, {"micro_batch": 2}])
def test_losses_that_take_a_backward_pass_of_their_own(settings: Any) -> None:
    torch.manual_seed(0)
    setup = setup_of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double())
    setup.loss_fn = adversarial
    judge_step(metakern.l2rw_step, setup, **settings)


@pytest.mark.parametrize("engine", ["auto", "double_backward"])
def test_losses_made_of_jacobians(engine: str) -> None:
    """What functorch writes into inside `vmap` is its own."""

    def losses(model: nn.Module, batch: Any) -> Tensor:
        jacobians = torch.func.vmap(torch.func.jacrev(model))(batch[0])
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") + jacobians.square().sum((1, 2))

    torch.manual_seed(0)
    setup = setup_of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double())
    setup.loss_fn = losses
    judge_step(metakern.l2rw_step, setup, engine=engine)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("engine", ["auto", "double_backward"])
def test_distances_of_all_pairs(p: float, engine: str) -> None:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])
        alike = batch[1].unsqueeze(1) == batch[1]
        distances = torch.cdist(outputs, outputs, p=p)
        return F.softplus((distances * alike).sum(1) - (distances * ~alike).sum(1))

    torch.manual_seed(0)
    setup = setup_of(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double())
    setup.loss_fn = losses
    judge_step(metakern.l2rw_step, setup, engine=engine)


def test_complex_numbers_that_are_scaled_in_place() -> None:
    torch.manual_seed(0)
    setup = setup_of(Spectrum().double())
    with pytest.raises(NotImplementedError, match="is complex"):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, engine="ghost")
    assert judge_step(metakern.l2rw_step, setup).result.engine == "jvp"
