"""The compiled step of a weight net against the uncompiled one, which is held against double backward elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import inputs
from metakern.testing.budget import assert_within
from metakern.testing.judge import Snapshot
from tests.step.awkward import Failing, Worn, drawing_model
from tests.step.virtual_reference import MODELS, WeightNet, assert_same, close, make, twin

# What inductor does to a program but the code: in-place writes become values, views are followed.
compile_mwnet_step = partial(metakern.compile_mwnet_step, backend="aot_eager")

Build = Callable[[nn.Module], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weight_net(features: int = 0) -> WeightNet:
    torch.manual_seed(3)
    return WeightNet(features).double()


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.01)


def sgd(module: nn.Module, momentum: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=momentum, weight_decay=0.01)


def trajectory(name: str, *, build: Build = sgd, features: int = 0, steps: int = 3, **settings: Any) -> None:
    """The same steps compiled and uncompiled, on copies of everything."""
    model, batch, meta_batch = make(name)
    net = weight_net(features)
    other, other_net = twin(model), twin(net)
    first, second = (
        {"weight_optimizer": adam(n), "optimizer": build(m), "virtual_lr": 0.2, **settings}
        for m, n in ((model, net), (other, other_net))
    )
    if settings.get("virtual", "sgd") != "sgd":  # momentum must be there
        for m, n, given in ((model, net, first), (other, other_net, second)):
            metakern.mwnet_step(m, n, batch, meta_batch, **given)
    extra = inputs.normal(len(batch[1]), features, seed=1) if features else None
    before, before_net = Snapshot.of(model, first["optimizer"]), Snapshot.of(net, first["weight_optimizer"])
    step = compile_mwnet_step(model, net, batch, meta_batch, features=extra, **first)
    before.assert_unchanged(model, first["optimizer"])
    before_net.assert_unchanged(net, first["weight_optimizer"])
    for seed in range(steps):
        _, batch, meta_batch = make(name, seed=100 + seed)
        extra = inputs.normal(len(batch[1]), features, seed=seed) if features else None
        got = step(batch, meta_batch, extra)
        want = metakern.mwnet_step(other, other_net, batch, meta_batch, features=extra, **second)
        assert got.engine == want.engine
        for one, two, field in zip(got[:4], want[:4], want._fields, strict=False):
            assert isinstance(one, Tensor)
            assert isinstance(two, Tensor)
            close(one, two, f"{field} of step {seed}", scale=steps)
    assert_same(net, other_net, "weight net", scale=steps)
    assert_same(model, other, "model", scale=steps)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("normalise", ["sum", "none"])
def test_exact(name: str, normalise: str) -> None:
    trajectory(name, normalise=normalise, detach_losses=normalise == "sum")


@pytest.mark.parametrize("virtual", ["momentum", "nesterov"])
def test_virtual_steps_with_momentum(virtual: str) -> None:
    for name in ("mlp", "batch-norm"):
        trajectory(name, build=partial(sgd, momentum=0.9), virtual=virtual)


def test_features_come_anew() -> None:
    trajectory("mlp", features=2, detach_losses=False)


def test_params_and_engine() -> None:
    trajectory("mlp", params=["2", "4.weight"])
    trajectory("mlp", engine="jvp")


def wide() -> tuple[nn.Module, Any, Any]:
    """So wide beside its meta batch that the virtual step is implicit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 3)).double()
    return model, *inputs.pair(16, 2, 64, classes=3)


def test_learning_rates_may_change() -> None:
    """Those of the virtual step too, where it takes them from the optimizer's groups."""
    model, batch, meta_batch = wide()
    net = weight_net()
    other, other_net = twin(model), twin(net)
    settings = []
    for m, n in ((model, net), (other, other_net)):
        groups = [{"params": list(m.parameters())[:2]}, {"params": list(m.parameters())[2:], "lr": 0.3}]
        optimizer = torch.optim.SGD(groups, lr=0.1)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        settings.append(
            (optimizer, schedule, {"weight_optimizer": adam(n), "virtual_lr": None, "optimizer": optimizer})
        )
    step = compile_mwnet_step(model, net, batch, meta_batch, **settings[0][2])
    for _ in range(3):
        got = step(batch, meta_batch)
        want = metakern.mwnet_step(other, other_net, batch, meta_batch, **settings[1][2])
        assert got.dots is not None
        assert want.dots is not None
        close(got.dots, want.dots, "dots")
        for _, schedule, _ in settings:
            schedule.step()
    assert_same(net, other_net, "weight net")
    assert_same(model, other, "model")


class Noisy(nn.Module):
    """A weight net with dropout and running statistics; Adam has no derivative where a bias has none."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(1, 4, bias=False), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1), nn.Sigmoid()
        )

    def forward(self, losses: Tensor) -> Tensor:
        return self.net(losses)


def test_draws_and_running_statistics_of_model_and_weight_net() -> None:
    model = drawing_model()
    net = Noisy().double()
    other, other_net = twin(model), twin(net)
    _, batch, meta_batch = make("mlp")
    step = compile_mwnet_step(model, net, batch, meta_batch, weight_optimizer=adam(net), virtual_lr=0.2)
    second = adam(other_net)
    for seed in range(3):
        _, batch, meta_batch = make("mlp", seed=seed)
        torch.manual_seed(seed)
        got, left = step(batch, meta_batch), torch.get_rng_state()
        torch.manual_seed(seed)
        want = metakern.mwnet_step(other, other_net, batch, meta_batch, weight_optimizer=second, virtual_lr=0.2)
        assert torch.equal(torch.get_rng_state(), left)
        close(got.weights, want.weights, "weights")
    assert_same(net, other_net, "weight net")
    assert_same(model, other, "model")


class Picky(nn.Module):
    """Another function where the losses are large, and where a switch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.net = weight_net()
        self.register_buffer("switch", torch.zeros(()))

    def forward(self, losses: Tensor) -> Tensor:
        found = self.net(losses)
        return found if bool((losses < 50).all()) else found.square()


class Branching(nn.Module):
    """Another function of its weights once its bias is large."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.bias = weight_net(), nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, losses: Tensor) -> Tensor:
        found = self.net(losses) + self.bias
        return found if bool(self.bias < 50) else found.sin().abs()


@pytest.mark.parametrize("late", [False, True])
def test_another_branch_is_taken_uncompiled(late: bool) -> None:
    """In the first part, and in the second after the weight net's optimizer has stepped, which then counts once."""
    model, batch, meta_batch = make("mlp")
    net = Branching() if late else Picky()
    other, other_net = twin(model), twin(net)
    optimizers = [Worn(n, 100.0) if late else adam(n) for n in (net, other_net)]
    step = compile_mwnet_step(model, net, batch, meta_batch, weight_optimizer=optimizers[0], virtual_lr=0.1)
    batch = (100 * batch[0], batch[1]) if not late else batch
    got = step(batch, meta_batch)
    want = metakern.mwnet_step(other, other_net, batch, meta_batch, weight_optimizer=optimizers[1], virtual_lr=0.1)
    close(got.weights, want.weights, "weights")
    assert_same(net, other_net, "weight net")
    assert_same(model, other, "model")


class Breaking(nn.Module):
    """Weights that are not finite once its optimizer has stepped."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.steps = weight_net(), nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, losses: Tensor) -> Tensor:
        return self.net(losses) + (self.steps - 1).detach().sqrt() + 0 * self.steps


def test_failures_leave_no_trace() -> None:
    """A loss that is not finite in the first part; weights that are not, in the second."""
    model, batch, meta_batch = make("mlp")
    net = Breaking()
    net.net.requires_grad_(False)
    weight_optimizer = torch.optim.SGD(net.parameters(), lr=1.0, weight_decay=0.1)
    optimizer = sgd(model, 0.9)
    given = {"weight_optimizer": weight_optimizer, "virtual_lr": 0.1, "optimizer": optimizer}
    step = compile_mwnet_step(model, net, batch, meta_batch, **given)
    before, before_net = Snapshot.of(model, optimizer), Snapshot.of(net, weight_optimizer)
    x = batch[0].clone()
    x[2] = torch.nan
    with pytest.raises(ValueError, match=r"losses of examples \[2\] are not finite"):
        step((x, batch[1]), meta_batch)
    with pytest.raises(ValueError, match="weights that are not finite"):
        step(batch, meta_batch)
    before.assert_unchanged(model, optimizer)
    before_net.assert_unchanged(net, weight_optimizer)


def test_an_optimizer_that_fails_leaves_no_trace() -> None:
    model, batch, meta_batch = make("batch-norm")
    net = weight_net()
    optimizer, weight_optimizer = Failing(model.parameters(), lr=0.1), adam(net)
    given = {"weight_optimizer": weight_optimizer, "virtual_lr": 0.1, "optimizer": optimizer}
    step = compile_mwnet_step(model, net, batch, meta_batch, **given)
    before, before_net = Snapshot.of(model, optimizer), Snapshot.of(net, weight_optimizer)
    with pytest.raises(OSError, match="no step today"):
        step(batch, meta_batch)
    before.assert_unchanged(model, optimizer)
    before_net.assert_unchanged(net, weight_optimizer)


class Ignoring(WeightNet):
    def forward(self, losses: Tensor, *features: Tensor) -> Tensor:
        return super().forward(losses)


def test_refusals() -> None:
    model, batch, meta_batch = make("mlp")
    net = Ignoring().double()
    for keywords, error, match in (
        ({"virtual": "adam", "optimizer": adam(model)}, NotImplementedError, "step count; use mwnet_step"),
        ({"virtual": "momentum", "optimizer": sgd(model, 0.9)}, ValueError, "let it step once before"),
        ({"normalise": "max"}, ValueError, "normalise must be"),
        ({"virtual_lr": None}, ValueError, "virtual_lr=None takes"),
        ({"features": lambda model, batch: torch.tensor(batch[0].sum().item())}, NotImplementedError, "floating point"),
    ):
        before, before_net = Snapshot.of(model), Snapshot.of(net)
        with pytest.raises(error, match=match):
            compile_mwnet_step(
                model, net, batch, meta_batch, **{"weight_optimizer": adam(net), "virtual_lr": 0.1, **keywords}
            )
        before.assert_unchanged(model)
        before_net.assert_unchanged(net)


def test_what_it_looks_at_must_stay() -> None:
    """Momentum and weight decay of a virtual step, and the weight net."""
    model, batch, meta_batch = make("mlp")
    net, optimizer = weight_net(1), sgd(model, 0.9)
    extra = inputs.normal(len(batch[1]), 1, seed=0)
    given = {"weight_optimizer": None, "virtual_lr": 0.1, "optimizer": optimizer, "virtual": "momentum"}
    metakern.mwnet_step(model, net, batch, meta_batch, features=extra, **given)
    step = compile_mwnet_step(model, net, batch, meta_batch, features=extra, **given)
    with pytest.raises(ValueError, match="at position 4"):
        step(batch, meta_batch, extra.half())
    step(batch, meta_batch, extra)
    optimizer.param_groups[0]["momentum"] = 0.5
    with pytest.raises(ValueError, match="make another step"):
        step(batch, meta_batch, extra)
    optimizer.param_groups[0]["momentum"] = 0.9
    step(batch, meta_batch, extra)
    net.eval()
    with pytest.raises(ValueError, match="make another step"):
        step(batch, meta_batch, extra)


@pytest.mark.parametrize("change", ["moved", "added", "maximize"])
def test_groups_of_the_learning_rates_must_stay(change: str) -> None:
    """Which parameter takes which rate is part of the program."""
    model, batch, meta_batch = make("mlp")
    net, parameters = weight_net(), list(model.parameters())
    optimizer = torch.optim.SGD([{"params": parameters[:2], "lr": 0.1}, {"params": parameters[2:], "lr": 10.0}])
    given = {"weight_optimizer": None, "virtual_lr": None, "optimizer": optimizer}
    step = compile_mwnet_step(model, net, batch, meta_batch, **given)
    optimizer.param_groups[0]["lr"] = 0.2
    step(batch, meta_batch)
    if change == "moved":
        optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    elif change == "added":
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    else:
        optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(ValueError, match="make another step"):
        step(batch, meta_batch)


def test_other_shapes_are_taken_uncompiled() -> None:
    model, batch, meta_batch = make("mlp")
    net, extra = weight_net(1), inputs.normal(len(batch[1]), 1, seed=0)
    given = {"weight_optimizer": None, "virtual_lr": 0.1}
    step = compile_mwnet_step(model, net, batch, meta_batch, features=extra, **given)
    for n in (3, len(extra)):
        some = batch[0][:n], batch[1][:n]
        got = step(some, meta_batch, extra[:n])
        want = metakern.mwnet_step(model, net, some, meta_batch, features=extra[:n], **given)
        close(got.weights, want.weights, "weights")
        close(got.dots, want.dots, "dots")


def test_features_by_a_function() -> None:
    model, batch, meta_batch = make("mlp")
    net = weight_net(5)
    given = {"weight_optimizer": None, "virtual_lr": 0.1, "features": lambda model, batch: batch[0].square()}
    step = compile_mwnet_step(model, net, batch, meta_batch, **given)
    _, batch, meta_batch = make("mlp", seed=5)
    got = step(batch, meta_batch)
    want = metakern.mwnet_step(model, net, batch, meta_batch, **given)
    close(got.weights, want.weights, "weights")


def test_a_loss_that_goes_backward_by_itself_leaves_gradients_alone() -> None:
    """As adversarial training does; what its backward passes leave in `.grad` is no part of the step."""

    def losses(model: nn.Module, batch: Any) -> Tensor:
        x = batch[0].clone().requires_grad_()
        nn.functional.cross_entropy(model(x), batch[1]).backward()
        assert x.grad is not None
        return nn.functional.cross_entropy(model(batch[0] + 0.1 * x.grad.sign()), batch[1], reduction="none")

    model, batch, meta_batch = make("mlp")
    net = weight_net()
    other, other_net = twin(model), twin(net)
    for p in (*model.parameters(), *other.parameters()):
        p.grad = torch.ones_like(p)
    before = Snapshot.of(model)
    given = {"weight_optimizer": None, "virtual_lr": 0.1, "loss_fn": losses}
    step = compile_mwnet_step(model, net, batch, meta_batch, **given)
    before.assert_unchanged(model)
    for _ in range(2):
        step(batch, meta_batch, accumulate=True)
        metakern.mwnet_step(other, other_net, batch, meta_batch, accumulate=True, **given)
    assert_same(net, other_net, "weight net")
    assert_same(model, other, "model")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
def test_inductor_is_exact() -> None:
    model, batch, meta_batch = wide()
    net = weight_net()
    other, other_net = twin(model), twin(net)
    given = {"weight_optimizer": adam(net), "virtual_lr": 0.2}
    step = metakern.compile_mwnet_step(model, net, batch, meta_batch, **given)
    step(batch, meta_batch)
    metakern.mwnet_step(other, other_net, batch, meta_batch, weight_optimizer=adam(other_net), virtual_lr=0.2)
    assert_same(net, other_net, "weight net")
    assert_same(model, other, "model")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_autocast_is_that_of_the_making(backend: str) -> None:
    """The program holds its casts: around a run autocast would cast the weight net too, which a step does not."""
    model, batch, meta_batch = make("mlp")
    model, net = model.float(), weight_net().float()
    given = (batch[0].float(), batch[1]), (meta_batch[0].float(), meta_batch[1])
    settings: dict[str, Any] = dict(weight_optimizer=None, virtual_lr=0.1)
    found = []
    with torch.autocast("cpu", torch.bfloat16):
        step = metakern.compile_mwnet_step(model, net, *given, backend=backend, **settings)
        for take in (step, partial(metakern.mwnet_step, model, net, **settings)):
            result = take(*given)
            found.append([result.weights, result.dots, *(p.grad for p in net.parameters())])
    for got, want in zip(*found, strict=True):
        assert_within(got, want, want.abs().max(), terms=100)
