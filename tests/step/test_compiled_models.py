"""What torch.compile compiled runs as it was written inside a step: compiled it hides parameters, loses tangents."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metakern
from metakern.capture.state.uncompiled import uncompiled
from metakern.testing import budget, inputs

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch about itself

# Traces and differentiates like inductor, without what takes a C++ compiler its time.
compiled = partial(torch.compile, backend="aot_eager")


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    return nn.functional.gelu(x) * scale


class Scale(nn.Module):
    """A parameter used inside a function."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor] = scaled) -> None:
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.rand(5)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.scale)


def network(function: Callable[[Tensor, Tensor], Tensor] = scaled, interacting: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5) if interacting else nn.LayerNorm(5)
    return nn.Sequential(nn.Linear(6, 5), norm, Scale(function), nn.Linear(5, 3)).double()


def whole(**settings: Any) -> nn.Module:
    return compiled(network(**settings))


def block(**settings: Any) -> nn.Module:
    model = network(**settings)
    model[2] = compiled(model[2])
    return model


def in_place(**settings: Any) -> nn.Module:
    model = network(**settings)
    model.compile(backend="aot_eager")
    return model


def function(**settings: Any) -> nn.Module:
    return network(compiled(scaled), **settings)


def losses(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def batches() -> Any:
    return inputs.pair(8, 3, 6, classes=3, dtype=torch.float64)


def assert_same(got: Tensor, want: Tensor) -> None:
    budget.assert_within(got, want, 1 + want.abs(), dtype=torch.float64)


@pytest.fixture(autouse=True)
def forgotten() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("interacting", [False, True])
@pytest.mark.parametrize("engine", ["auto", "jvp", "double_backward"])
@pytest.mark.parametrize("make", [whole, block, in_place, function])
def test_is_the_step_of_the_model_as_written(make: Callable[..., nn.Module], engine: str, interacting: bool) -> None:
    model, written = make(interacting=interacting), network(interacting=interacting)
    got = metakern.l2rw_step(model, *batches(), engine=engine)
    want = metakern.l2rw_step(written, *batches(), engine=engine)
    assert got.engine == want.engine
    assert_same(got.dots, want.dots)
    for p, q in zip(model.parameters(), written.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert_same(p.grad, q.grad)


@pytest.mark.parametrize("engine", ["auto", "jvp", "double_backward"])
def test_a_compiled_loss_function(engine: str) -> None:
    want = metakern.l2rw_step(network(), *batches(), loss_fn=losses, engine=engine)
    got = metakern.l2rw_step(network(), *batches(), loss_fn=compiled(losses), engine=engine)
    assert got.engine == want.engine
    assert_same(got.dots, want.dots)


def weight_net_step(model: nn.Module) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(1, 1), nn.Sigmoid()).double()
    metakern.mwnet_step(model, net, *batches(), weight_optimizer=None, virtual_lr=0.1)


@pytest.mark.parametrize(
    "step",
    [
        weight_net_step,
        lambda model: metakern.metabalance_step(model, *batches(), inner_lr=0.1),
        lambda model: metakern.l2rw_step(model, *batches(), micro_batch=3),
        lambda model: metakern.compile_step(model, *batches(), backend="eager")(*batches()),
    ],
    ids=["mwnet", "metabalance", "micro-batch", "compile-step"],
)
def test_other_steps(step: Callable[[nn.Module], object]) -> None:
    model, written = block(), network()
    step(model)
    step(written)
    for p, q in zip(model.parameters(), written.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert_same(p.grad, q.grad)


def test_reports() -> None:
    model, written = block(), network()
    assert_same(metakern.grad_dots(model, *batches()).dots, metakern.grad_dots(written, *batches()).dots)
    assert metakern.check(model, *batches()).ok
    forms, expected = ([use.form for use in metakern.explain(m, *batches()).uses] for m in (model, written))
    assert forms == expected


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # looked at by the compiler
def test_runs_compiled_before_and_after() -> None:
    calls = []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return lambda *given: calls.append(1) or graph(*given)

    def own(x: Tensor, scale: Tensor) -> Tensor:  # what other tests compiled of a function counts against its limit
        return nn.functional.gelu(x) * scale

    model = network(torch.compile(own, backend=counting))
    (x, y), meta_batch = batches()
    for _ in range(2):
        calls.clear()
        model(x)
        assert len(calls) == 1
        metakern.l2rw_step(model, (x, y), meta_batch)
        with pytest.raises(ValueError, match="not finite"):
            metakern.l2rw_step(model, (x * torch.nan, y), meta_batch)
        assert len(calls) == 1


def test_compiling_goes_on_after_blocks_that_end_out_of_order() -> None:
    calls = []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        return lambda *given: calls.append(1) or graph(*given)

    first, second = uncompiled(), uncompiled()
    for block in (first, second):
        block.__enter__()
    for block in (first, second):
        block.__exit__(None, None, None)
    torch.compile(lambda x: 2 * x, backend=counting)(torch.ones(3))
    assert calls == [1]
