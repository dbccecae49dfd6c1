"""`allow_unused`: parameters that took no part are no error, and all else is as if they were frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.testing import inputs
from metakern.testing.judge import Snapshot
from tests.step.awkward import Dropped, TableOfLabels

ENGINES = pytest.mark.parametrize("engine", ["ghost", "jvp", "double_backward"])


def batches() -> Any:
    return inputs.pair(6, 3, 4, classes=3)


def weight_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid()).double()


def mwnet(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> Any:
    net = weight_net()
    rates = torch.optim.Adam(net.parameters(), 0.1)
    rest = {"virtual_lr": None, "virtual": "momentum", "optimizer": optimizer, "weight_optimizer": rates}
    return metakern.mwnet_step(model, net, *batches(), **rest, **settings)


def mlc(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> Any:
    net = TableOfLabels()
    rates = torch.optim.Adam(net.parameters(), 0.1)
    rest = {"virtual_lr": None, "virtual": "momentum", "optimizer": optimizer, "label_optimizer": rates}
    return metakern.mlc_step(model, net, *batches(), **rest, **settings)


def metabalance(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> Any:
    return metakern.metabalance_step(model, *batches(), inner_lr=0.1, optimizer=optimizer, **settings)


def l2rw(model: nn.Module, optimizer: torch.optim.Optimizer, **settings: Any) -> Any:
    return metakern.l2rw_step(model, *batches(), optimizer=optimizer, **settings)


STEPS = {
    **{f"l2rw {engine}": (l2rw, {"engine": engine}) for engine in ("ghost", "jvp", "double_backward")},
    "l2rw two passes": (l2rw, {"memory": "two_pass"}),
    "l2rw by parts": (l2rw, {"micro_batch": 2}),
    **{f"mwnet {engine}": (mwnet, {"engine": engine}) for engine in ("ghost", "jvp", "double_backward")},
    "mwnet without learning": (mwnet, {"update_weight_net": False}),
    "mlc": (mlc, {}),
    "mlc fused": (mlc, {"fused": True}),
    "metabalance": (metabalance, {}),
}


ELSEWHERE = [name for name in STEPS if name not in ("l2rw by parts", "metabalance")]
"""Steps that leave alone what the meta batch alone uses; parts have other sizes, and an outer gradient is one."""


def trained(
    taken: Callable[..., Any], steps: int, frozen: bool, elsewhere: bool = False, **settings: Any
) -> tuple[Dropped, list[Any]]:
    """After some steps with every layer, and then without one of them; `elsewhere` the meta batch drops another."""
    model = Dropped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model.dropped = 3
    taken(model, optimizer, **settings)
    model.dropped, model.by_size = 1, {3: 2} if elsewhere else {}
    model.zero_grad()
    if frozen:
        model.layers[1].requires_grad_(False)
    more = {} if frozen else {"allow_unused": True}
    return model, [taken(model, optimizer, **settings, **more) for _ in range(steps)]


@pytest.mark.parametrize(
    ("name", "elsewhere"), [*((name, False) for name in STEPS), *((name, True) for name in ELSEWHERE)]
)
def test_as_if_frozen(name: str, elsewhere: bool) -> None:
    taken, settings = STEPS[name]
    model, found = trained(taken, 3, frozen=False, elsewhere=elsewhere, **settings)
    want_model, want = trained(taken, 3, frozen=True, elsewhere=elsewhere, **settings)
    for one, other in zip(found, want, strict=True):
        for got, expected in zip(one, other, strict=True):
            assert torch.equal(got, expected) if isinstance(got, Tensor) else got == expected
    for (parameter, p), q in zip(model.named_parameters(), want_model.parameters(), strict=True):
        assert torch.equal(p, q), parameter
    assert all(p.grad is None for p in model.layers[1].parameters())


@ENGINES
def test_gradients_that_are_there_stay_with_accumulate(engine: str) -> None:
    model = Dropped()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    metakern.l2rw_step(model, *batches(), engine=engine, accumulate=True, allow_unused=True)
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in model.layers[1].parameters())
    assert not bool((model.head.weight.grad == 1).all())  # pyright: ignore
    metakern.l2rw_step(model, *batches(), engine=engine, allow_unused=True)
    assert all(p.grad is None for p in model.layers[1].parameters())


def test_what_a_label_net_carries_is_as_if_frozen() -> None:
    carries = []
    for frozen in (False, True):
        model, net = Dropped({6: 1, 3: 2}), TableOfLabels()
        model.layers[1].requires_grad_(not frozen)
        given = {"label_optimizer": None, "virtual_lr": 0.1, "step_label_net": False, "allow_unused": True}
        carry = metakern.mlc_step(model, net, *batches(), **given).carry
        carries.append(metakern.mlc_step(model, net, *batches(), carry=carry, **given).carry)
    for got, want in zip(carries[0].values(), carries[1].values(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["mwnet ghost", "mwnet jvp", "mwnet double_backward", "mlc", "mlc fused"])
def test_a_virtual_step_of_nothing_else(name: str) -> None:
    """Where all that it moves took no part, it goes nowhere, and nothing is learnt."""
    taken, settings = STEPS[name]
    model = Dropped()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    result = taken(model, optimizer, params="layers.1", allow_unused=True, **settings)
    dots = result.dots if name.startswith("mwnet") else result.tangents
    assert not dots.any()
    assert all(p.grad is None for p in model.layers[1].parameters())
    assert model.head.weight.grad is not None


def test_nothing_is_carried_by_a_virtual_step_of_nothing() -> None:
    model, net = Dropped(), TableOfLabels()
    settings: dict[str, Any] = dict(label_optimizer=None, virtual_lr=0.1, params="layers.1", allow_unused=True)
    metakern.mlc_step(model, net, *batches(), carry={net.logits: torch.ones(3, 3).double()}, **settings)
    assert net.logits.grad is not None
    assert not net.logits.grad.any()


def test_dots_alone_a_plan_and_a_check() -> None:
    model, frozen = Dropped(), Dropped()
    frozen.layers[1].requires_grad_(False)
    for pairwise in (False, True):
        found = metakern.grad_dots(model, *batches(), pairwise=pairwise, allow_unused=True)
        assert torch.equal(found.dots, metakern.grad_dots(frozen, *batches(), pairwise=pairwise).dots)
    plan = metakern.plan(model, *batches(), allow_unused=True)
    assert len(plan.uses) == len(metakern.plan(frozen, *batches()).uses)
    assert metakern.check(model, *batches(), allow_unused=True).ok


def test_is_an_error_unless_allowed() -> None:
    model = Dropped()
    before = Snapshot.of(model)
    for step in (metakern.grad_dots, metakern.l2rw_step, metakern.plan, metakern.check):
        with pytest.raises(ValueError, match=r"'layers\.1\.weight'.*did not take part.*allow_unused"):
            step(model, *batches())
    with pytest.raises(ValueError, match="process_group"):
        metakern.l2rw_step(model, *batches(), allow_unused=True, process_group=object())
    before.assert_unchanged(model)


def test_uses_out_of_sight_are_still_refused() -> None:
    """A parameter that takes part where tracing does not see it is not an unused one."""

    class Custom(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
            ctx.save_for_backward(x, w)
            return x * w

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore
            x, w = ctx.saved_tensors
            return grad * w, (grad * x).sum(0)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(Custom.apply(x, self.scale))

    with pytest.raises(NotImplementedError, match="scale"):
        metakern.l2rw_step(Model().double(), *batches(), engine="ghost", allow_unused=True)
