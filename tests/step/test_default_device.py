"""Tensors that the library makes by itself are on the model's device, whatever torch's default device is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import metakern
from metakern.step.direction import preconditioned, with_weight_decay
from metakern.testing import inputs
from metakern.testing.catalogue import CASES, Case
from tests.step.awkward import TableOfLabels, drawing_model
from tests.step.virtual_reference import WeightNet


class Made(NamedTuple):
    """All that a step is given, on the CPU."""

    model: nn.Module  # with dropout
    coupled: nn.Module  # with batch statistics
    net: nn.Module
    table: nn.Module
    optimizer: torch.optim.Optimizer  # of the model
    batches: Any


def make() -> Made:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3)).double()
    optimizer = torch.optim.Adam(model.parameters())
    batches = inputs.pair(6, 3, 5, classes=3)
    metakern.l2rw_step(model, *batches, optimizer=optimizer)
    return Made(model, drawing_model(), WeightNet().double(), TableOfLabels(), optimizer, batches)


def l2rw(made: Made, **settings: Any) -> Any:
    return metakern.reweight_step(made.model, *made.batches, optimizer=made.optimizer, **settings)


def coupled(made: Made, **settings: Any) -> Any:
    return metakern.reweight_step(made.coupled, *made.batches, **settings)


def directed(made: Made, direction: Callable[..., Any], given: str) -> Any:
    along = direction(made.model, 0.1 if given == "rate" else made.optimizer)
    return metakern.reweight_step(made.model, *made.batches, direction=along)


def dots(made: Made, **settings: Any) -> Any:
    return metakern.grad_dots(made.model, *made.batches, **settings)


def mwnet(made: Made, **settings: Any) -> Any:
    given = {"weight_optimizer": None, "virtual_lr": 0.1, "optimizer": made.optimizer, **settings}
    return metakern.mwnet_step(made.model, made.net, *made.batches, **given)


def mlc(made: Made, carry: dict[Any, Tensor] | None) -> Any:
    given = {"label_optimizer": None, "virtual_lr": 0.1, "clean_batch": made.batches[1], "carry": carry}
    return metakern.mlc_step(made.model, made.table, *made.batches, **given, step_label_net=carry is None)


def metabalance(made: Made, **settings: Any) -> Any:
    return metakern.metabalance_step(made.model, *made.batches, inner_lr=0.1, **settings)


def check(made: Made, name: str) -> Any:
    return metakern.check(getattr(made, name), *made.batches).ok


def plan(made: Made, name: str, **settings: Any) -> Any:
    return str(metakern.explain(getattr(made, name), *made.batches, **settings))


def compiled(made: Made, compile_step: Callable[..., Any], *names: str, **settings: Any) -> Any:
    step = compile_step(*(getattr(made, name) for name in names), *made.batches, backend="eager", **settings)
    return step(*made.batches)


CALLS: dict[str, Callable[[Made], Any]] = {
    **{f"l2rw {engine}": partial(l2rw, engine=engine) for engine in ("ghost", "jvp", "double_backward")},
    **{f"rule {rule}": partial(l2rw, rule=rule) for rule in metakern.weights.RULES},
    "top k": partial(l2rw, rule=partial(metakern.weights.top_k, k=2)),
    "two passes": partial(l2rw, memory="two_pass"),
    "parts": partial(l2rw, micro_batch=2),
    "coupled": coupled,
    "frozen statistics": partial(coupled, batchnorm="frozen"),
    "weight decay": partial(directed, direction=with_weight_decay, given="rate"),
    "preconditioned": partial(directed, direction=preconditioned, given="optimizer"),
    "dots": dots,
    **{f"pairs {engine}": partial(dots, pairwise=True, engine=engine) for engine in ("ghost", "jvp")},
    **{f"mwnet {virtual}": partial(mwnet, virtual=virtual) for virtual in ("sgd", "adam")},
    "mwnet without learning": partial(mwnet, update_weight_net=False),
    "mlc": partial(mlc, carry=None),
    "mlc that carries": partial(mlc, carry={}),
    "tangents": lambda made: metakern.logit_tangents(made.model, *made.batches),
    **{f"metabalance {k}": partial(metabalance, order=k) for k in (1, 2)},
    "metabalance by differences": partial(metabalance, hessian="central_difference"),
    **{f"check {name}": partial(check, name=name) for name in ("model", "coupled")},
    **{f"plan {name}": partial(plan, name=name) for name in ("model", "coupled")},
    "plan by parts": partial(plan, name="model", micro_batch=2),
}
COMPILED = {
    "compiled": (metakern.compile_step, ("model",), {}),
    "compiled, coupled": (metakern.compile_step, ("coupled",), {}),
    "compiled mwnet": (metakern.compile_mwnet_step, ("model", "net"), {"weight_optimizer": None, "virtual_lr": 0.1}),
    "compiled mlc": (metakern.compile_mlc_step, ("model", "table"), {"label_optimizer": None, "virtual_lr": 0.1}),
}
CALLS.update({k: lambda made, c=c, n=n, s=s: compiled(made, c, *n, **s) for k, (c, n, s) in COMPILED.items()})


@pytest.mark.parametrize("name", CALLS)
def test_public_functions(name: str) -> None:
    found = []
    for device in ("cpu", "meta"):
        made = make()
        with torch.device(device):
            result = CALLS[name](made)
        grads = [p.grad for net in (made.model, made.coupled, made.net, made.table) for p in net.parameters()]
        found.append(tree_leaves((result, grads)))
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right


OWN_FACTORIES = {"containers"}
"""Models that make tensors on the default device themselves."""


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("engine", ["auto", "jvp"])
@pytest.mark.parametrize("case", [case for case in CASES if case.name not in OWN_FACTORIES], ids=lambda case: case.name)
def test_every_kind_of_layer(case: Case, engine: str) -> None:
    found = []
    for device in ("cpu", "meta"):
        setup = case.make(4, 2)
        torch.manual_seed(0)
        with torch.device(device):
            try:
                result = metakern.l2rw_step(
                    setup.model, setup.batch, setup.meta_batch, loss_fn=setup.loss_fn, engine=engine
                )
            except NotImplementedError:
                if device != "cpu":
                    raise
                pytest.skip("no engine serves it")
        found.append((*result, *(p.grad for p in setup.model.parameters())))
    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right
