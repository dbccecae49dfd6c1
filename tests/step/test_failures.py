"""A call that fails leaves no trace, and its error says what to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

import metakern
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import Snapshot, judge_step


class Network(nn.Module):
    """Dropout, running statistics, a buffer that counts, and a forward pass that fails for batches of one size."""

    def __init__(self, fail_for: int = -1) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.drop = nn.Dropout(0.2)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.fail_for = fail_for

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        hidden = self.drop(torch.tanh(self.norm(self.first(x))))
        if len(x) == self.fail_for:
            raise OSError("the disk is on fire")
        return self.second(hidden)


@contextmanager
def untouched(model: nn.Module) -> Iterator[torch.optim.Optimizer]:
    """Whatever happens inside, the model, its gradients, the generators and the optimizer are as before."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.is_floating_point() else None
    optimizer.step()
    before = Snapshot.of(model, optimizer)
    yield optimizer
    before.assert_unchanged(model, optimizer)


def batches(n: int = 6, m: int = 4) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return inputs.pair(n, m, 4, classes=3)


ENGINES = pytest.mark.parametrize("engine", ["auto", "ghost", "jvp", "double_backward"])
MEMORIES = pytest.mark.parametrize("memory", ["reuse", "two_pass"])


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


IN_EITHER_PASS = pytest.mark.parametrize("fail_for", [6, 4], ids=["batch", "meta_batch"])


@ENGINES
@IN_EITHER_PASS
def test_forward_raises(engine: str, fail_for: int) -> None:
    """In the pass of either batch; the user's own error comes through."""
    torch.manual_seed(0)
    model = Network(fail_for).double()
    if engine == "ghost":
        model.norm.eval()
    with untouched(model) as optimizer, pytest.raises(OSError, match="on fire"):
        metakern.l2rw_step(model, *batches(), engine=engine, optimizer=optimizer)


@ENGINES
@IN_EITHER_PASS
def test_loss_raises(engine: str, fail_for: int) -> None:
    model = mlp()

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        values = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        if len(values) == fail_for:
            raise KeyError("no such label")
        return values

    with untouched(model) as optimizer, pytest.raises(KeyError, match="no such label"):
        metakern.l2rw_step(model, *batches(), loss_fn=losses, engine=engine, optimizer=optimizer)


@ENGINES
@MEMORIES
def test_backward_raises(engine: str, memory: str) -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise ArithmeticError("no gradient here")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(Failing.apply(self.first(x)))

    model = Model().double()
    with untouched(model) as optimizer, pytest.raises((ArithmeticError, NotImplementedError)):
        metakern.l2rw_step(model, *batches(), engine=engine, memory=memory, optimizer=optimizer)


@ENGINES
@MEMORIES
def test_rule_raises_or_returns_nonsense(engine: str, memory: str) -> None:
    def raising(dots: Tensor) -> Tensor:
        raise LookupError("no weights today")

    for rule, error, match in (
        (raising, LookupError, "no weights today"),
        (lambda dots: dots[:2], ValueError, r"rule.*\(6,\).*\(2,\)"),
        (lambda dots: None, ValueError, "rule"),
        (lambda dots: dots.masked_fill(dots == dots[1], torch.nan), ValueError, r"not finite for examples \[1\]"),
    ):
        model = mlp()
        with untouched(model) as optimizer, pytest.raises(error, match=match):
            metakern.reweight_step(model, *batches(), rule=rule, engine=engine, memory=memory, optimizer=optimizer)


@ENGINES
def test_optimizer_raises(engine: str) -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise MemoryError("no room for momentum")

    model = mlp()
    with untouched(model), pytest.raises(MemoryError, match="no room"):
        metakern.l2rw_step(model, *batches(), engine=engine, optimizer=Broken(model.parameters(), lr=0.1))


def per_example(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def scalar(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return per_example(model, batch).mean()


def matrix(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0])


def not_a_number(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return per_example(model, batch) * torch.where(torch.arange(len(batch[1])) == 1, torch.nan, 1.0)


def infinite(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return per_example(model, batch) + torch.where(torch.arange(len(batch[1])) == 2, torch.inf, 0.0)


def detached(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return per_example(model, batch).detach()


def a_float(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Any:
    return scalar(model, batch).item()


def integers(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return batch[1]


LOSSES: dict[Callable[..., Any], tuple[type[Exception], str]] = {
    scalar: (ValueError, r"one loss per example.*shape \(\).*reduction='none'"),
    matrix: (ValueError, r"one loss per example.*shape \(6, 3\)|one loss per example.*shape \(4, 3\)"),
    not_a_number: (ValueError, r"examples \[1\] are not finite"),
    infinite: (ValueError, r"examples \[2\] are not finite"),
    detached: (ValueError, "do not depend on any trainable parameter"),
    a_float: (TypeError, "losses must be a floating point tensor"),
    integers: (TypeError, "losses must be a floating point tensor"),
}


@ENGINES
@pytest.mark.parametrize("loss_fn", LOSSES, ids=lambda loss: loss.__name__)
def test_losses_that_are_none(engine: str, loss_fn: Callable[..., Any]) -> None:
    error, match = LOSSES[loss_fn]
    model = mlp()
    with untouched(model) as optimizer, pytest.raises(error, match=match):
        metakern.l2rw_step(model, *batches(), loss_fn=loss_fn, engine=engine, optimizer=optimizer)


@ENGINES
@MEMORIES
def test_gradients_that_are_not_finite(engine: str, memory: str) -> None:
    """The loss is finite and its gradient is not: sqrt at zero."""

    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        away = torch.where(torch.arange(len(batch[1])) == 1, 0.0, 1.0)
        return (per_example(model, batch) * away).sqrt()

    model = mlp()
    with untouched(model) as optimizer, pytest.raises(ValueError, match=r"not finite|nan"):
        metakern.l2rw_step(model, *batches(), loss_fn=losses, engine=engine, memory=memory, optimizer=optimizer)


@ENGINES
def test_no_examples(engine: str) -> None:
    for n, m, name in ((0, 3, "batch"), (4, 0, "meta_batch")):
        model = mlp()
        with untouched(model) as optimizer, pytest.raises(ValueError, match=rf"{name} has no examples"):
            metakern.l2rw_step(model, *batches(n, m), engine=engine, optimizer=optimizer)


@ENGINES
def test_wrong_shapes(engine: str) -> None:
    (x, y), meta_batch = batches()
    for batch, error, match in (
        ((x, y[:-1]), ValueError, r"batch.*\(5,\)"),
        ((x[:, :3], y), RuntimeError, "shape"),
        ((x, y.unsqueeze(1)), ValueError, r"batch.*\(6, 1\)"),
    ):
        model = mlp()
        with untouched(model) as optimizer, pytest.raises(error, match=match):
            metakern.l2rw_step(model, batch, meta_batch, engine=engine, optimizer=optimizer)
        with untouched(model) as optimizer, pytest.raises(error, match=match):
            metakern.l2rw_step(model, meta_batch, batch, engine=engine, optimizer=optimizer)


@ENGINES
def test_batches_of_no_known_form(engine: str) -> None:
    (x, y), meta_batch = batches()
    for batch, error, match in (
        (x, TypeError, "batch must be"),
        ((x,), TypeError, "batch must be"),
        (None, TypeError, "batch must be"),
        ({"input": x}, ValueError, "labels"),
        ((x, y.tolist()), TypeError, "targets"),
    ):
        model = mlp()
        with untouched(model) as optimizer, pytest.raises(error, match=match):
            metakern.l2rw_step(model, batch, meta_batch, engine=engine, optimizer=optimizer)


@ENGINES
def test_frozen_model(engine: str) -> None:
    model = mlp().requires_grad_(False)
    with untouched(model), pytest.raises(ValueError, match="requires_grad"):
        metakern.l2rw_step(model, *batches(), engine=engine)


class Idle(nn.Module):
    """Has a layer that the forward pass skips."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


@ENGINES
@MEMORIES
def test_parameter_that_took_no_part(engine: str, memory: str) -> None:
    model = Idle().double()
    with untouched(model) as optimizer, pytest.raises(ValueError, match=r"'idle\.weight'.*did not take part.*freeze"):
        metakern.l2rw_step(model, *batches(), engine=engine, memory=memory, optimizer=optimizer)
    model.idle.requires_grad_(False)
    metakern.l2rw_step(model, *batches(), engine=engine, memory=memory)


@ENGINES
@MEMORIES
def test_detached_branch_took_no_part(engine: str, memory: str) -> None:
    class Detached(Idle):
        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.idle(x).detach()

    model = Detached().double()
    with untouched(model) as optimizer, pytest.raises(ValueError, match=r"'idle\.weight'"):
        metakern.l2rw_step(model, *batches(), engine=engine, memory=memory, optimizer=optimizer)


@ENGINES
@MEMORIES
def test_no_parameter_took_part(engine: str, memory: str) -> None:
    """The loss requires a gradient, but of other leaves than the parameters."""

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.layer.weight.detach().requires_grad_())

    model = Apart().double()
    with untouched(model) as optimizer, pytest.raises(ValueError, match=r"'layer\.weight'.*did not take part"):
        metakern.l2rw_step(model, *batches(), engine=engine, memory=memory, optimizer=optimizer)


class Overwriting(nn.Module):
    """Changes the input of a layer after the layer has read it; autograd does not look, since B needs no such input."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.layer, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.embedding = nn.Embedding(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.stem(x)
        if self.kind == "activation":
            out = self.layer(hidden)
            hidden.mul_(2.0)
            return self.head(torch.tanh(out) + self.embedding((x[:, 0] > 0).long()))
        indices = (x[:, 0] > 0).long()
        out = self.embedding(indices)
        indices.fill_(3)
        return self.head(torch.tanh(out + self.layer(hidden)))


@MEMORIES
@pytest.mark.parametrize("kind", ["activation", "indices"])
def test_ghost_refuses_an_input_overwritten_in_place(memory: str, kind: str) -> None:
    model = Overwriting(kind).double()
    with untouched(model) as optimizer, pytest.raises((NotImplementedError, RuntimeError), match=r"in ?place"):
        metakern.l2rw_step(model, *batches(), engine="ghost", memory=memory, optimizer=optimizer)


def test_batch_overwritten_in_place() -> None:
    """The first layer's input is the user's own tensor."""

    class Normalising(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            x.zero_()
            return out

    model = Normalising().double()
    with untouched(model) as optimizer, pytest.raises((NotImplementedError, RuntimeError), match=r"in ?place"):
        metakern.l2rw_step(model, *batches(), engine="ghost", optimizer=optimizer)


@pytest.mark.parametrize(
    ("keywords", "error", "match"),
    [
        ({"engine": "ghosts"}, ValueError, "engine must be.*'ghosts'"),
        ({"memory": "less"}, ValueError, "memory must be.*'less'"),
        ({"loss_fn": 3}, TypeError, "loss_fn must be callable.*int"),
        ({"optimizer": 0.1}, TypeError, "optimizer must be.*float"),
        ({"params": "layer9.*"}, ValueError, r"params.*'layer9\.\*'"),
        ({"params": 7}, TypeError, "params must be.*int"),
        ({"params": [7]}, TypeError, "params must hold.*int"),
        ({"params": []}, ValueError, "params selects no"),
    ],
)
def test_arguments(keywords: dict[str, Any], error: type[Exception], match: str) -> None:
    model = mlp()
    with untouched(model), pytest.raises(error, match=match):
        metakern.l2rw_step(model, *batches(), **keywords)


def test_unknown_rule() -> None:
    model = mlp()
    with untouched(model), pytest.raises(ValueError, match=r"rule must be.*'best'"):
        metakern.reweight_step(model, *batches(), rule="best")


def test_optimizer_of_another_model() -> None:
    model = mlp()
    foreign = torch.optim.SGD(mlp().parameters(), lr=0.1)
    with untouched(model), pytest.raises(ValueError, match="optimizer holds none"):
        metakern.l2rw_step(model, *batches(), optimizer=foreign)


def test_optimizer_that_wants_a_closure() -> None:
    model = mlp()
    with untouched(model), pytest.raises(TypeError, match="LBFGS evaluates a closure"):
        metakern.l2rw_step(model, *batches(), optimizer=torch.optim.LBFGS(model.parameters()))


def test_models_that_cannot_be_served() -> None:
    with pytest.raises(TypeError, match="model must be"):
        metakern.l2rw_step(lambda x: x, *batches())  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="complex"):
        metakern.l2rw_step(nn.Linear(4, 3, dtype=torch.complex64), *batches())
    with pytest.raises(TypeError, match=r"model\.module"):
        metakern.l2rw_step(nn.DataParallel(mlp()), *batches())


def test_sharded_parameters() -> None:
    model = mlp()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match="whole ones"):
            metakern.l2rw_step(model, *batches())
    finally:
        dist.destroy_process_group()


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {})) * (2 if func is nn.functional.linear else 1)


@ENGINES
def test_function_modes_around_the_call(engine: str) -> None:
    """What a mode makes of a layer is seen within the forward pass only."""

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        with Doubled():
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    model = mlp()
    with untouched(model), Doubled(), pytest.raises(NotImplementedError, match="Doubled, is active around"):
        metakern.l2rw_step(model, *batches(), engine=engine)
    setup = Setup(model, *batches(), loss_fn=loss_fn)
    with torch.device("cpu"):
        judge_step(metakern.l2rw_step, setup, engine=engine)


@ENGINES
def test_function_modes_that_an_interrupt_leaves(engine: str) -> None:
    """As ctrl-C does between a mode's `__enter__` and its block."""

    def interrupted(model: nn.Module, batch: Any) -> Tensor:
        Doubled().__enter__()
        raise KeyboardInterrupt

    model = mlp()
    with untouched(model), pytest.raises(KeyboardInterrupt):
        metakern.l2rw_step(model, *batches(), loss_fn=interrupted, engine=engine)
    assert _get_current_function_mode_stack() == []


def test_inside_no_grad() -> None:
    model = mlp()
    with untouched(model), torch.no_grad(), pytest.raises(ValueError, match="no_grad"):
        metakern.l2rw_step(model, *batches())


def in_inference_mode(step: Callable[[], Any]) -> None:
    with torch.inference_mode():
        step()


def in_a_transform(step: Callable[[], Any]) -> None:
    torch.func.grad(lambda x: (step(), x.sum())[1])(torch.ones(2))


def untraceably(step: Callable[[], Any]) -> None:
    with torch._C.DisableTorchFunction():
        step()


@ENGINES
@pytest.mark.parametrize(
    ("around", "message"),
    [(in_inference_mode, "inside torch.inference_mode"), (in_a_transform, "torch.func"), (untraceably, "are disabled")],
)
def test_where_calls_are_not_seen_or_not_differentiated(engine: str, around: Any, message: str) -> None:
    """Running statistics could not be put back inside a transform, and hooks are not seen without torch functions."""
    torch.manual_seed(0)
    model = Network().double()
    with untouched(model), pytest.raises((ValueError, NotImplementedError), match=message):
        around(lambda: metakern.l2rw_step(model, *batches(), engine=engine))


def test_inference_tensors() -> None:
    model = mlp()
    with torch.inference_mode():
        batch, meta_batch = batches()
    with untouched(model), pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"(?i)inference"):
        metakern.l2rw_step(model, batch, meta_batch)


def test_integer_parameters_are_left_out() -> None:
    """A quantised or counting parameter cannot require a gradient and is nobody's business."""

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)
            self.count = nn.Parameter(torch.ones(3, dtype=torch.long), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.count

    model = Counted().double()
    result = metakern.l2rw_step(model, *batches())
    assert result.engine == "ghost"
    assert model.count.grad is None


def test_the_next_call_works() -> None:
    """A failure leaves nothing behind that would break or alter the step after it."""
    model, expected = mlp(), mlp()
    with pytest.raises(ValueError, match="engine"):
        metakern.l2rw_step(model, *batches(), engine="none")
    with pytest.raises(ValueError, match="finite"):
        metakern.l2rw_step(model, *batches(), loss_fn=not_a_number)
    got, want = (metakern.l2rw_step(each, *batches()) for each in (model, expected))
    assert torch.equal(got.dots, want.dots)
    for left, right in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(left.grad, right.grad)  # pyright: ignore
