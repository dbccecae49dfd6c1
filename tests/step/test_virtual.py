"""Virtual steps: theta^ against torch's own optimizers, J against autograd, and the form that never makes theta^."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.engines import implicit
from metakern.layers import per_example
from metakern.step import meta_pass
from metakern.step.mwnet import mwnet_step
from metakern.step.virtual import VirtualRule
from metakern.testing import inputs
from tests.step.virtual_reference import MODELS, WeightNet, assert_same, close, make, mwnet_reference, twin, update

OPTIMIZERS: dict[str, tuple[str, Callable[[Any], torch.optim.Optimizer]]] = {
    "plain": ("momentum", lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": ("momentum", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.1, dampening=0.4)),
    "nesterov": ("nesterov", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, weight_decay=0.1, nesterov=True)),
    "adam": ("adam", lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1)),
    "adamw": ("adam", lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1)),
    "amsgrad": ("adam", lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True)),
    "frozen": ("adam_frozen", lambda p: torch.optim.Adam(p, lr=0.1)),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_rules_are_those_of_torch(kind: str) -> None:
    """theta^ is where the optimizer goes, and J what differentiating the rule gives, over six steps of one state."""
    name, build = OPTIMIZERS[kind]
    p = nn.Parameter(inputs.normal(5, 3, seed=1))
    optimizer = build([p])
    rule = VirtualRule(name, None, optimizer)
    rule.require_usable({"p": p})
    for step in range(6):
        grad = inputs.normal(5, 3, seed=10 + step) * (0.1 if step == 3 else 1.0)
        state = copy.deepcopy(optimizer.state[p])
        got = rule.step({"p": p}, {"p": grad})
        leaf = grad.clone().requires_grad_()
        after = update(name, p.detach(), leaf, optimizer.param_groups[0], state, 0.1)
        along = inputs.normal(5, 3, seed=20 + step)
        (want,) = torch.autograd.grad(after, leaf, along)
        close(got.pulled_back({"p": along})["p"], -want, f"J of step {step}")
        p.grad = grad
        optimizer.step()
        close(got.parameters["p"], p, f"theta^ of step {step}")


def test_adam_at_gradient_zero() -> None:
    """With empty moments the slope of Adam at zero is 1/eps, and no NaN."""
    p = nn.Parameter(torch.ones(2, dtype=torch.float64))
    step = VirtualRule("adam", 0.1, torch.optim.Adam([p], eps=1e-3)).step({"p": p}, {"p": torch.zeros_like(p)})
    assert torch.equal(step.parameters["p"], p)
    close(torch.as_tensor(step.jacobian["p"]), torch.full((2,), 100.0, dtype=torch.float64), "J")


@pytest.mark.parametrize("name", ["momentum", "nesterov", "sgd"])
def test_origin_of_affine_rules(name: str) -> None:
    p = nn.Parameter(inputs.normal(4, seed=1))
    optimizer = torch.optim.SGD([p], lr=0.1, momentum=0.8, weight_decay=0.1, nesterov=name == "nesterov")
    p.grad = inputs.normal(4, seed=2)
    optimizer.step()
    rule = VirtualRule(name, 0.3, optimizer)
    grad = inputs.normal(4, seed=3)
    origin = rule.origin({"p": p})
    close(
        origin.parameters["p"] - origin.jacobian["p"] * grad, rule.step({"p": p}, {"p": grad}).parameters["p"], "theta^"
    )


def test_maximize_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(NotImplementedError, match="maximize"):
        VirtualRule("momentum", None, torch.optim.SGD([p], lr=0.1, maximize=True)).require_usable({"p": p})


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Take the implicit form wherever it is possible; lists the weights that it served, call by call."""
    served: list[list[str]] = []
    implicit_dots = meta_pass._implicit_dots

    def spy(problem: Any, train: Any, *others: Any) -> Any:
        answer = implicit_dots(problem, train, *others)
        served.append([] if answer is None else list(implicit.implicit_weights(problem, train)))
        return answer

    monkeypatch.setattr(implicit, "implicit_is_cheaper", lambda *sizes: True)
    monkeypatch.setattr(per_example, "LARGEST_SHARE", 0)
    monkeypatch.setattr(meta_pass, "_implicit_dots", spy)
    return served


RULES: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=0.05, dampening=0.3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=0.05, nesterov=True),
}


def compare(model: nn.Module, name: str, rule: str, steps: int = 3, **keywords: Any) -> None:
    torch.manual_seed(3)
    net = WeightNet().double()
    other, other_net = twin(model), twin(net)
    optimizers = [RULES[rule](each.parameters()) for each in (model, other)]
    weight_optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (net, other_net)]
    shared = {"virtual": rule, "virtual_lr": 0.3, **keywords}
    for step in range(steps):
        _, batch, meta_batch = make(name, seed=step)
        got = mwnet_step(
            model, net, batch, meta_batch, weight_optimizer=weight_optimizers[0], optimizer=optimizers[0], **shared
        )
        _, _, meta_loss = mwnet_reference(
            other,
            other_net,
            batch,
            meta_batch,
            weight_optimizer=weight_optimizers[1],
            optimizer=optimizers[1],
            **shared,
        )
        assert got.engine == "ghost"
        assert got.meta_loss is not None
        close(got.meta_loss, meta_loss, "meta loss", steps)
    assert_same(net, other_net, "weight net", steps)
    assert_same(model, other, "model", steps)


@pytest.mark.parametrize("name", ["mlp", "group-norm", "transformer"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("detach_losses", [True, False])
def test_implicit(name: str, rule: str, detach_losses: bool, taken: list[list[str]]) -> None:
    """Positions, several layers, with and without biases, beside parameters that move explicitly."""
    compare(make(name)[0], name, rule, detach_losses=detach_losses)
    expected = {
        "mlp": {"0.weight", "2.weight", "4.weight"},
        "group-norm": {"7.weight"},
        "transformer": {
            "blocks.0.attention.qkv.weight",
            "blocks.0.attention.out.weight",
            "blocks.0.mlp.0.weight",
            "blocks.0.mlp.2.weight",
            "head.weight",
        },
    }
    assert all(set(served) == expected[name] for served in taken)
    assert len(taken) == 3


class Plain(nn.Module):
    """No bias in the first layer, so nothing that moves explicitly lies before its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_implicit_only(taken: list[list[str]]) -> None:
    compare(Plain().double(), "mlp", "sgd")
    assert taken == [["first.weight", "second.weight"]] * 3


class TwiceForMeta(Plain):
    """Uses a weight once more for batches of the meta batch's size."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + self.second(torch.sin(self.first(x))) if len(x) == 4 else logits


class OtherwiseForMeta(Plain):
    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + x @ self.first.weight.t() @ self.second.weight.t() if len(x) == 4 else logits


class HiddenForMeta(Plain):
    """Reads a weight where no torch function is called."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits + Hidden.apply(x, self.first.weight).sum(1, keepdim=True) if len(x) == 4 else logits


class Hidden(torch.autograd.Function):
    """x W^T."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        with torch._C.DisableTorchFunction():
            return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


class Biased(nn.Module):
    """Biases move along with their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class BiasForMeta(Biased):
    """Reads a bias by itself."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits * self.first.bias.square().sum() if len(x) == 4 else logits


class OtherBiasForMeta(Biased):
    """Takes another bias beside a weight that moves, and none."""

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 4:
            return super().forward(x)
        hidden = F.linear(x, self.first.weight, torch.ones(4, dtype=x.dtype))
        return self.second(torch.tanh(F.linear(x, self.first.weight)) + torch.tanh(hidden))


class SharedBias(Biased):
    """One bias beside two weights moves explicitly."""

    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Linear(4, 4)
        self.between.bias = self.first.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.between(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("kind", [Biased, OtherBiasForMeta, SharedBias])
@pytest.mark.parametrize("rule", RULES)
def test_biases(kind: type[nn.Module], rule: str, taken: list[list[str]]) -> None:
    compare(kind().double(), "mlp", rule)
    assert all({"first.weight", "second.weight"} <= set(served) for served in taken)


class ConstantForMeta(Plain):
    """Reads the values of a weight without a gradient: they must be those at theta^."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        with torch.no_grad():
            scale = self.first.weight.norm() if len(x) == 4 else 1.0
        return logits * scale


def test_meta_batch_that_uses_weights_twice(taken: list[list[str]]) -> None:
    compare(TwiceForMeta().double(), "mlp", "sgd")
    assert taken == [["first.weight", "second.weight"]] * 3


@pytest.mark.parametrize("kind", [OtherwiseForMeta, HiddenForMeta, ConstantForMeta, BiasForMeta])
def test_meta_batch_that_uses_weights_otherwise(kind: type[nn.Module], taken: list[list[str]]) -> None:
    compare(kind().double(), "mlp", "sgd")
    assert taken == [[]] * 3


class Tied(nn.Module):
    """One weight in two places moves explicitly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_tied_weights(taken: list[list[str]]) -> None:
    compare(Tied().double(), "mlp", "sgd")
    assert taken == [["head.weight"]] * 3


@pytest.mark.parametrize("params", [["2", "4.bias"], ["2.weight", "0.bias"]])
def test_params(params: list[str], taken: list[list[str]]) -> None:
    model, batch, meta_batch = make("mlp")
    nets = [WeightNet().double()]
    nets.append(twin(nets[0]))  # pyright: ignore[reportArgumentType]
    other = twin(model)
    mwnet_step(model, nets[0], batch, meta_batch, weight_optimizer=None, virtual_lr=0.3, params=params)
    optimizer = torch.optim.SGD(nets[1].parameters(), lr=0.0)
    names = {name for name, _ in model.named_parameters() if name in params or name.split(".")[0] in params}
    mwnet_reference(other, nets[1], batch, meta_batch, weight_optimizer=optimizer, virtual_lr=0.3, names=names)
    assert_same(nets[0], nets[1], "weight net")
    assert_same(model, other, "model")
    assert taken == [["2.weight"]]


def test_dropout_of_the_fallback_is_that_of_the_first_try(taken: list[list[str]]) -> None:
    class Dropping(OtherwiseForMeta):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(super().forward(x), 0.3)

    found = []
    for engine in ("ghost", "double_backward"):
        torch.manual_seed(0)
        model, net = Dropping().double(), WeightNet().double()
        _, batch, meta_batch = make("mlp")
        torch.manual_seed(5)
        mwnet_step(model, net, batch, meta_batch, weight_optimizer=None, virtual_lr=0.3, engine=engine)
        found.append([p.grad for p in net.parameters()])
    for got, want in zip(*found, strict=True):
        assert got is not None
        assert want is not None
        close(got, want, "gradient")


def test_chosen_by_cost() -> None:
    """A wide layer and few meta rows; the same layer and many; a small layer."""
    assert implicit.implicit_is_cheaper(256, 16, 1024, 1024)
    assert not implicit.implicit_is_cheaper(2048, 2048, 1024, 1024)
    assert not implicit.implicit_is_cheaper(64, 8, 16, 16)


def test_wide_layers_take_it_by_themselves() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(5, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 3)).double()
    compare(wide, "mlp", "sgd", steps=1)


def test_every_model_without_forcing() -> None:
    """What the fixture forces elsewhere must not be needed here."""
    for name in MODELS:
        if name != "batch-norm":
            compare(make(name)[0], name, "sgd", steps=1)
