"""The compiled step of label correction against the uncompiled one, which is held against double backward elsewhere."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.step.label_net import LabelNet
from metakern.testing import inputs
from metakern.testing.judge import Snapshot
from tests.step.awkward import Failing, Worn, drawing_model
from tests.step.virtual_reference import MODELS, assert_same, close, make, twin

# What inductor does to a program but the code: in-place writes become values, views are followed.
compile_mlc_step = partial(metakern.compile_mlc_step, backend="aot_eager")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def label_net(features: int = 2, skip: bool = False) -> LabelNet:
    torch.manual_seed(4)
    return LabelNet(3, features, hidden=6, embedding=4, skip=skip).double()


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.02, amsgrad=True)


def sgd(module: nn.Module, momentum: float = 0.0, nesterov: bool = False) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=momentum, weight_decay=0.01, nesterov=nesterov)


def given_features(seed: int) -> Tensor:
    return inputs.normal(6, 2, seed=seed)


def trajectory(
    name: str,
    *,
    steps: int = 3,
    every: int = 1,
    virtual: str = "sgd",
    clean: bool = False,
    skip: bool = False,
    **settings: Any,
) -> None:
    """The same steps compiled and uncompiled, on copies of everything."""
    model, batch, meta_batch = make(name)
    net = label_net(skip=skip)
    other, other_net = twin(model), twin(net)
    first, second = (
        {
            "label_optimizer": adam(n),
            "optimizer": sgd(m, momentum=0.9 if virtual != "sgd" else 0.0, nesterov=virtual == "nesterov"),
            "virtual_lr": None,
            "virtual": virtual,
            **settings,
        }
        for m, n in ((model, net), (other, other_net))
    )
    extra = {"features": given_features(0), "clean_batch": make(name, n=3, seed=50)[1] if clean else None}
    if virtual != "sgd":  # momentum must be there
        for m, n, given in ((model, net, first), (other, other_net, second)):
            metakern.mlc_step(m, n, batch, meta_batch, **extra, **given)
    before, before_net = Snapshot.of(model, first["optimizer"]), Snapshot.of(net, first["label_optimizer"])
    step = compile_mlc_step(model, net, batch, meta_batch, **extra, **first, carries=every > 1)
    before.assert_unchanged(model, first["optimizer"])
    before_net.assert_unchanged(net, first["label_optimizer"])
    carries: list[Any] = [None, None]
    for seed in range(steps):
        _, batch, meta_batch = make(name, seed=100 + seed)
        extra = {"features": given_features(seed), "clean_batch": make(name, n=3, seed=seed)[1] if clean else None}
        turn = {"step_label_net": (seed + 1) % every == 0}
        got = step(batch, meta_batch, **extra, **turn, carry=carries[0])
        want = metakern.mlc_step(other, other_net, batch, meta_batch, **extra, **turn, carry=carries[1], **second)
        carries = [got.carry, want.carry]
        assert (got.carry is None) == (want.carry is None) == turn["step_label_net"]
        assert got.engine == want.engine
        for field in ("labels", "tangents", "losses", "meta_loss"):
            close(getattr(got, field), getattr(want, field), f"{field} of step {seed}", scale=steps)
    assert_same(net, other_net, "label net", scale=steps)
    assert_same(model, other, "model", scale=steps)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused", [True, False])
def test_exact(name: str, fused: bool) -> None:
    trajectory(name, fused=fused, steps=10 if name == "mlp" else 3, skip=fused)


@pytest.mark.parametrize("virtual", ["momentum", "nesterov"])
def test_virtual_steps_with_momentum(virtual: str) -> None:
    fused = virtual == "momentum"
    trajectory("mlp" if fused else "batch-norm", fused=fused, virtual=virtual)


@pytest.mark.parametrize("fused", [True, False])
def test_clean_examples_beside(fused: bool) -> None:
    trajectory("batch-norm", fused=fused, clean=True)


@pytest.mark.parametrize("fused", [True, False])
def test_k_steps(fused: bool) -> None:
    trajectory("mlp", steps=7, every=3, fused=fused, virtual="momentum")


def test_params() -> None:
    trajectory("mlp", params=["2", "4.weight"])


@pytest.mark.parametrize("fused", [True, False])
def test_learning_rates_may_change(fused: bool) -> None:
    """Of both optimizers, and of the virtual step, which takes them from the groups."""
    model, batch, meta_batch = make("mlp")
    net = label_net()
    other, other_net = twin(model), twin(net)
    settings, schedules = [], []
    for m, n in ((model, net), (other, other_net)):
        groups = [{"params": list(m.parameters())[:2]}, {"params": list(m.parameters())[2:], "lr": 0.3}]
        given = {"optimizer": torch.optim.SGD(groups, lr=0.1), "label_optimizer": adam(n)}
        schedules += [torch.optim.lr_scheduler.StepLR(each, 1, gamma=0.5) for each in given.values()]
        settings.append({"virtual_lr": None, "fused": fused, **given})
    step = compile_mlc_step(model, net, batch, meta_batch, features=given_features(0), **settings[0])
    for seed in range(3):
        extra = given_features(seed)
        got = step(batch, meta_batch, extra)
        want = metakern.mlc_step(other, other_net, batch, meta_batch, features=extra, **settings[1])
        close(got.meta_loss, want.meta_loss, "meta loss")
        for schedule in schedules:
            schedule.step()
    assert_same(net, other_net, "label net")
    assert_same(model, other, "model")


class Noisy(nn.Module):
    """A label net with dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(3, 4)
        self.net = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3), nn.Softmax(1))

    def forward(self, targets: Tensor) -> Tensor:
        return self.net(self.embedding(targets))


@pytest.mark.parametrize("fused", [True, False])
def test_draws_and_running_statistics_of_model_and_label_net(fused: bool) -> None:
    model = drawing_model()
    net = Noisy().double()
    other, other_net = twin(model), twin(net)
    given = {"virtual_lr": 0.2, "fused": fused}
    _, batch, meta_batch = make("mlp")
    step = compile_mlc_step(model, net, batch, meta_batch, label_optimizer=sgd(net), **given)
    second = sgd(other_net)
    for seed in range(3):
        _, batch, meta_batch = make("mlp", seed=seed)
        torch.manual_seed(seed)
        got, left = step(batch, meta_batch), torch.get_rng_state()
        torch.manual_seed(seed)
        want = metakern.mlc_step(other, other_net, batch, meta_batch, label_optimizer=second, **given)
        assert torch.equal(torch.get_rng_state(), left)
        close(got.labels, want.labels, "labels")
    assert_same(net, other_net, "label net")
    assert_same(model, other, "model")


class Shifting(nn.Module):
    """Another function of its weights once its bias is large; no distribution once it is larger."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.bias = label_net(0), nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, targets: Tensor) -> Tensor:
        found = self.net(targets) * (1 + (self.bias > 500))
        return found if bool(self.bias < 50) else found.flip(1)


@pytest.mark.parametrize("late", [False, True])
def test_another_branch_is_taken_uncompiled(late: bool) -> None:
    """In the first part, and in the second after the label net's optimizer has stepped, which then counts once."""
    model, batch, meta_batch = make("mlp")
    net = Shifting()
    other, other_net = twin(model), twin(net)
    optimizers = [Worn(n, 100.0 if late else 0.0) for n in (net, other_net)]
    step = compile_mlc_step(model, net, batch, meta_batch, label_optimizer=optimizers[0], virtual_lr=0.1)
    for n in (net, other_net):
        n.bias.data.fill_(0.0 if late else 60.0)
    got = step(batch, meta_batch)
    want = metakern.mlc_step(other, other_net, batch, meta_batch, label_optimizer=optimizers[1], virtual_lr=0.1)
    close(got.labels, want.labels, "labels")
    assert_same(net, other_net, "label net")
    assert_same(model, other, "model")


def test_failures_leave_no_trace() -> None:
    """Logits that are not finite in the first part; labels that are no distributions, in the second."""
    model, batch, meta_batch = make("batch-norm")
    net = Shifting()
    label_optimizer, optimizer = Worn(net, 1000.0), sgd(model, 0.9)
    given = {"label_optimizer": label_optimizer, "virtual_lr": 0.1, "optimizer": optimizer}
    step = compile_mlc_step(model, net, batch, meta_batch, **given)
    before, before_net = Snapshot.of(model, optimizer), Snapshot.of(net, label_optimizer)
    x = batch[0].clone()
    x[2] = torch.nan
    with pytest.raises(ValueError, match=r"logits of examples .*2.* are not finite"):
        step((x, batch[1]), meta_batch)
    with pytest.raises(ValueError, match="label_net must return distributions"):
        step(batch, meta_batch)
    before.assert_unchanged(model, optimizer)
    before_net.assert_unchanged(net, label_optimizer)


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_that_fails_leaves_no_trace(fused: bool) -> None:
    model, batch, meta_batch = make("batch-norm")
    model = nn.Sequential(model, nn.Dropout(0.5), nn.Linear(3, 3).double())
    net = label_net(0)
    optimizer, label_optimizer = Failing(model.parameters(), lr=0.1), adam(net)
    given = {"label_optimizer": label_optimizer, "virtual_lr": 0.1, "optimizer": optimizer, "fused": fused}
    step = compile_mlc_step(model, net, batch, meta_batch, **given)
    before, before_net = Snapshot.of(model, optimizer), Snapshot.of(net, label_optimizer)
    with pytest.raises(OSError, match="no step today"):
        step(batch, meta_batch)
    before.assert_unchanged(model, optimizer)
    before_net.assert_unchanged(net, label_optimizer)


def test_refusals() -> None:
    model, batch, meta_batch = make("mlp")
    net = label_net(0)
    for keywords, error, match in (
        (
            {"virtual": "adam", "optimizer": torch.optim.Adam(model.parameters())},
            NotImplementedError,
            "step count; use mlc_step",
        ),
        ({"virtual": "momentum", "optimizer": sgd(model, 0.9)}, ValueError, "let it step once before"),
        ({"virtual_lr": None}, ValueError, "virtual_lr=None takes"),
        ({"label_optimizer": 3}, TypeError, "label_optimizer must be.*int"),
        ({"clean_batch": 3}, TypeError, "clean_batch must be"),
        ({"logits_fn": lambda model, batch: model(batch[0]) * batch[0].sum().item()}, NotImplementedError, "floating"),
    ):
        before, before_net = Snapshot.of(model), Snapshot.of(net)
        with pytest.raises(error, match=match):
            compile_mlc_step(
                model, net, batch, meta_batch, **{"label_optimizer": adam(net), "virtual_lr": 0.1, **keywords}
            )
        before.assert_unchanged(model)
        before_net.assert_unchanged(net)


def test_what_it_looks_at_must_stay() -> None:
    """Momentum of a virtual step, the label net, the shapes of batches, and what there is to carry."""
    model, batch, meta_batch = make("mlp")
    net, optimizer, extra = label_net(), sgd(model, 0.9), given_features(0)
    given = {"label_optimizer": None, "virtual_lr": 0.1, "optimizer": optimizer, "virtual": "momentum"}
    metakern.mlc_step(model, net, batch, meta_batch, features=extra, **given)
    step = compile_mlc_step(model, net, batch, meta_batch, features=extra, **given)
    with pytest.raises(ValueError, match="at position 4"):
        step(batch, meta_batch, extra.half())
    with pytest.raises(ValueError, match="must be nested like"):
        step(batch, meta_batch, extra, batch)
    with pytest.raises(ValueError, match=r"^carry: .* compile it with carries=True"):
        step(batch, meta_batch, extra, carry={})
    with pytest.raises(ValueError, match=r"^step_label_net=False: .* compile it with carries=True"):
        step(batch, meta_batch, extra, step_label_net=False)
    step(batch, meta_batch, extra)
    optimizer.param_groups[0]["momentum"] = 0.5
    with pytest.raises(ValueError, match="make another step"):
        step(batch, meta_batch, extra)
    optimizer.param_groups[0]["momentum"] = 0.9
    step(batch, meta_batch, extra)
    net.skip = True
    with pytest.raises(ValueError, match="make another step"):
        step(batch, meta_batch, extra)


def test_features_by_a_function_and_own_logits_are_accumulated() -> None:
    """A batch by keyword, gradients added to those that are there."""

    class Keywords(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model, *_ = make("mlp")
    model, net = Keywords(model), label_net(5)
    other, other_net = twin(model), twin(net)
    given = {
        "label_optimizer": None,
        "virtual_lr": 0.1,
        "features": lambda model, batch: batch["x"].square(),
        "logits_fn": lambda model, batch: 2 * model(batch["x"]),
        "loss_fn": lambda model, batch: model(batch["x"]).square().sum(1),
    }

    def batches(seed: int) -> list[dict[str, Tensor]]:
        _, *found = make("mlp", seed=seed)
        return [{"x": x, "labels": y} for x, y in found]

    step = compile_mlc_step(model, net, *batches(0), **given)
    for seed in range(2):
        got = step(*batches(seed), accumulate=True)
        want = metakern.mlc_step(other, other_net, *batches(seed), accumulate=True, **given)
        close(got.labels, want.labels, "labels")
    assert_same(net, other_net, "label net")
    assert_same(model, other, "model")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself
@pytest.mark.parametrize("fused", [True, False])
def test_inductor_is_exact(fused: bool) -> None:
    model, batch, meta_batch = make("mlp")
    net = label_net(0)
    other, other_net = twin(model), twin(net)
    given = {"virtual_lr": 0.2, "fused": fused}
    step = metakern.compile_mlc_step(model, net, batch, meta_batch, label_optimizer=adam(net), **given)
    second = adam(other_net)
    for seed in range(2):
        _, batch, meta_batch = make("mlp", seed=seed)
        step(batch, meta_batch)
        metakern.mlc_step(other, other_net, batch, meta_batch, label_optimizer=second, **given)
    assert_same(net, other_net, "label net")
    assert_same(model, other, "model")
