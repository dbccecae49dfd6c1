"""Rows that are picked where no call says by what: in custom autograd.Functions, operators of extensions, scripted
functions, registered modules; and by calls whose numbers to pick by are fractions.
"""

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import metakern
from metakern.capture import whole_modules
from metakern.capture.independence import examples
from metakern.testing import inputs
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import judge_step
from tests.capture.followed import IN_ORDER, MIXED, WIDTH, Losses, N, between, follow


class _Moved(torch.autograd.Function):
    """Rows in another order, which NumPy puts them in."""

    @classmethod
    def kept(cls, ctx: Any, order: Any) -> None:
        ctx.save_for_backward(order)

    @staticmethod
    def order(ctx: Any) -> Any:
        return ctx.saved_tensors[0].numpy().astype(int)

    @staticmethod
    def forward(ctx: Any, h: Tensor, order: Any) -> Tensor:
        type(ctx)._forward_cls.kept(ctx, order)
        return torch.from_numpy(h.detach().numpy()[np.asarray(getattr(order, "rows", order)).astype(int)])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        moved = np.empty_like(grad.numpy())
        moved[type(ctx)._forward_cls.order(ctx)] = grad.numpy()
        return torch.from_numpy(moved), None


class MovedByAList(_Moved):
    @classmethod
    def kept(cls, ctx: Any, order: Any) -> None:
        ctx.save_for_backward(torch.tensor(order))


class MovedByAPlan(_Moved):
    @classmethod
    def kept(cls, ctx: Any, order: Any) -> None:
        ctx.plan = {"rows": order}

    @staticmethod
    def order(ctx: Any) -> Any:
        return ctx.plan["rows"]


class Plan:
    def __init__(self, rows: list[int]) -> None:
        self.rows = rows


class MovedByAnObject(_Moved):
    @classmethod
    def kept(cls, ctx: Any, order: Any) -> None:
        ctx.plan = order

    @staticmethod
    def order(ctx: Any) -> Any:
        return ctx.plan.rows


@torch.library.custom_op("metakern_tests::moved", mutates_args=())
def moved(h: Tensor, order: Tensor, shift: float) -> Tensor:
    return h[(order + shift).long() % N]


def _taken(h: Tensor, order: Tensor) -> Tensor:
    return h[order]


def _filled(h: Tensor, missing: Tensor) -> Tensor:
    return torch.where(missing[:, None], h.mean(0)[None], h)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    scripted, scripted_mean = torch.jit.script(_taken), torch.jit.script(_filled)


def _moved_backward(ctx: Any, grad: Tensor) -> Any:
    return torch.zeros_like(grad).index_copy(0, ctx.rows, grad), None, None


def _moved_context(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.rows = (inputs[1] + inputs[2]).long() % N


moved.register_autograd(_moved_backward, setup_context=_moved_context)


def sampled(h: Tensor, rows: Tensor) -> Tensor:
    """Row by row from an image of which the rows are examples."""
    x, y = torch.linspace(-1, 1, WIDTH).expand(N, -1), (rows / (N - 1) * 2 - 1)[:, None].expand(-1, WIDTH)
    grid = torch.stack([x, y], -1)[None].to(h.dtype)
    return F.grid_sample(h.view(1, 1, N, WIDTH), grid, mode="nearest", align_corners=True).view(N, WIDTH)


def flat(h: Tensor, order: Tensor) -> Tensor:
    return torch.take_along_dim(h, torch.arange(h.numel()).view(N, WIDTH)[order].flatten()).view(N, WIDTH)


def both(make: Callable[[Any], Any]) -> tuple[Any, Any]:
    return make(IN_ORDER), make(MIXED)


def in_floating_point(order: list[int]) -> Tensor:
    return torch.tensor(order).double()


OUT_OF_SIGHT: dict[str, tuple[Losses, tuple[Any, Any]]] = {
    "function": (between(_Moved.apply), both(torch.tensor)),
    "function, fractions": (between(_Moved.apply), both(in_floating_point)),
    "function, list": (between(MovedByAList.apply), both(list)),
    "function, plan": (between(MovedByAPlan.apply), both(list)),
    "function, object": (between(MovedByAnObject.apply), both(Plan)),
    "operator": (between(lambda h, order: moved(h, order, 0.0)), both(torch.tensor)),
    "operator, fractions": (between(lambda h, order: moved(h, order, 0.0)), both(in_floating_point)),
    "operator, number": (between(lambda h, shift: moved(h, torch.arange(N), shift)), (0.5, 1.5)),
    "scripted": (between(scripted), both(torch.tensor)),
    "sampled": (between(sampled), both(torch.tensor)),
    "sampled by keyword": (
        between(lambda h, rows: torch.index_select(input=h, dim=0, index=rows)), both(torch.tensor),
    ),
    "flattened": (between(flat), both(torch.tensor)),
}  # fmt: skip


@pytest.mark.parametrize("name", OUT_OF_SIGHT)
def test_rows_picked_out_of_sight(name: str) -> None:
    losses, (apart, mixed) = OUT_OF_SIGHT[name]
    engines = follow(losses, [apart, apart, mixed])
    assert engines[:2] == ["ghost", "ghost"]
    assert engines[2] != "ghost"


def test_what_a_scripted_function_does_not_take_yet() -> None:
    apart, some = torch.zeros(N, dtype=torch.bool), torch.tensor(MIXED) > 2
    assert follow(between(scripted_mean), [apart, apart, apart, some])[-1] != "ghost"


class Base(nn.Module):
    """Rows written into a parameter, which has as many."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Parameter(torch.randn(N, WIDTH))

    def forward(self, h: Tensor, order: Tensor) -> Tensor:
        return self.base.index_copy(0, order, h) + self.base


def test_rows_written_into_a_parameter() -> None:
    losses = between(lambda h, _: h)
    assert follow(losses, both(torch.tensor), Base()) == ["ghost", "jvp"]


class Registered(nn.Module):
    def __init__(self, move: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.layer, self.move = nn.Linear(WIDTH, WIDTH), move

    def forward(self, h: Tensor, order: Any) -> Tensor:
        return self.move(self.layer(h), order)


@pytest.fixture
def registered() -> Iterator[None]:
    metakern.register_layer(Registered)
    yield
    whole_modules.REGISTERED.discard(Registered)


MOVES: dict[str, tuple[Callable[[Tensor, Any], Tensor], Any]] = {
    "indexed": (lambda h, order: h[order], torch.tensor),
    "scripted": (lambda h, order: scripted(h, order), torch.tensor),
    "listed": (lambda h, order: torch.stack([h[k] for k in order]), list),
}


@pytest.mark.parametrize("name", MOVES)
def test_registered_modules(name: str, registered: None) -> None:
    move, make = MOVES[name]
    assert follow(between(lambda h, _: h), both(make), Registered(move)) == ["ghost", "jvp"]


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, share: float) -> Tensor:
        ctx.share = share
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return -ctx.share * grad, None


class _Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h.exp())
        return h.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad * ctx.saved_tensors[0]


class _Rectified(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h > 0)
        return h.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad * ctx.saved_tensors[0]


HARMLESS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reversed": lambda h, _: _Reversed.apply(h, 0.3),
    "exponential": lambda h, _: _Exponential.apply(h),
    "exponential, checkpointed": lambda h, _: checkpoint(_Exponential.apply, h, use_reentrant=False),
    "rectified": lambda h, _: _Rectified.apply(h),
    "vmap": lambda h, _: torch.vmap(lambda c: c.softmax(0))(h),
    "attribute": lambda h, _: h.T.softmax(0).T,
    "images of the batch": lambda h, _: F.grid_sample(
        torch.ones(N, 1, N, N, dtype=h.dtype), h.tanh().view(N, 1, 4, 2), align_corners=False
    ).view(N, 4).repeat(1, 2) * h,
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_functions_that_keep_no_rows_cost_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "require_order", None)
    assert follow(between(HARMLESS[name]), [0, 0]) == ["ghost", "ghost"]


@pytest.mark.parametrize("memory", ["two_pass", "reuse"])
def test_inputs_with_a_graph_of_their_own(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their rows may come from anywhere, and no gradient is asked for below them. Parameters there are an error."""
    torch.manual_seed(0)
    encoder = inputs.normal(5, 5).requires_grad_()
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)).double()
    meta_batch = inputs.normal(3, 5), inputs.labels(3, classes=4)
    for start in (0, 1):
        encoded = (inputs.normal(N + 1, 5) @ encoder)[start : start + N]
        setup = Setup(model, (encoded, inputs.labels(N, classes=4)), meta_batch)
        truth = Setup(model, (encoded.detach(), setup.batch[1]), meta_batch).oracle()
        assert judge_step(metakern.l2rw_step, setup, truth=truth, memory=memory).result.engine == "ghost"
        monkeypatch.setattr(examples, "require_order", None)
        model.zero_grad()
    assert encoder.grad is None


def test_nested_tensors() -> None:
    def losses(model: nn.Module, batch: Any) -> Tensor:
        tokens = torch.nested.nested_tensor_from_jagged(batch[0], batch[1])
        return F.cross_entropy(model(tokens).to_padded_tensor(0.0).sum(1), batch[2], reduction="none")

    batch = torch.randn(12, 5), torch.tensor([0, 1, 4, 6, 8, 9, 12]), torch.arange(N) % 4
    model = nn.Linear(5, 4)
    for engine in ("auto", "ghost"):
        with pytest.raises(NotImplementedError, match=r"nested tensor.*engine='double_backward'"):
            metakern.l2rw_step(model, batch, batch, loss_fn=losses, engine=engine)
    metakern.l2rw_step(model, batch, batch, loss_fn=losses, engine="double_backward")


def test_inputs_that_want_a_gradient_are_not_kept() -> None:
    """Nor do they make a new structure of each batch."""
    torch.manual_seed(0)
    model, meta_batch = nn.Linear(5, 4).double(), (inputs.normal(3, 5), inputs.labels(3, classes=4))
    kept = list[weakref.ref[Tensor]]()

    def losses(model: nn.Module, batch: Any) -> Tensor:
        weighting = torch.ones(1, dtype=torch.float64).requires_grad_()
        kept.append(weakref.ref(weighting))
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * weighting

    for seed in range(3):
        batch = inputs.normal(N, 5, seed=seed), inputs.labels(N, classes=4)
        metakern.l2rw_step(model, batch, meta_batch, loss_fn=losses)
    gc.collect()
    assert not any(reference() is not None for reference in kept)
    assert len(examples._KNOWN[model].axes) == 1
