"""The operators behind the default loss: the loss that torch has, however it is differentiated, and where they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn

import metakern
from metakern.capture import row_losses as subject
from metakern.capture import trace_batch
from metakern.capture.independence.examples import ExampleAxis
from metakern.capture.independence.poison import poisoned_losses
from metakern.capture.losses import per_example_losses
from metakern.capture.row_losses import row_losses
from metakern.ops import extension
from metakern.testing import budget
from metakern.testing.catalogue.case import Setup
from metakern.testing.inputs import labels, normal, pair
from metakern.testing.judge import Snapshot, judge_step
from metakern.testing.models import Transformer

pytestmark = pytest.mark.skipif(extension.missing is not None, reason=str(extension.missing))

ROWS, CLASSES = 30, 50


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators serve logits of any size; which of them ran."""
    found: list[str] = []

    def noted(name: str, operator: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: found.append(name) or operator(*arguments)

    for name in ("cross_entropy_rows", "cross_entropy_rows_backward"):
        monkeypatch.setattr(metakern.ops, name, noted(name, getattr(metakern.ops, name)))
    monkeypatch.setattr(subject, "CLASSES", 1)
    monkeypatch.setattr(subject, "LOGITS", 1)
    return found


BOTH = ["cross_entropy_rows", "cross_entropy_rows_backward"]


def given(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, targets of which some are ignored, and a cotangent."""
    targets = labels(ROWS, classes=CLASSES)
    targets[::7] = -100
    return (3 * normal(ROWS, CLASSES, dtype=dtype)).requires_grad_(), targets, normal(ROWS, seed=1, dtype=dtype)


def wide_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def setup(n: int = 9, m: int = 4) -> Setup:
    return Setup(wide_network(), *pair(n, m, 6, classes=CLASSES, dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradient_are_those_of_torch(dtype: torch.dtype, autocast: bool, called: list[str]) -> None:
    logits, targets, cotangent = given(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = row_losses(logits, targets)
        torchs = F.cross_entropy(logits, targets, reduction="none")
    assert got.dtype == torchs.dtype
    want = F.cross_entropy(logits.double(), targets, reduction="none")
    budget.assert_within(got, want, 16.0, terms=CLASSES)
    cotangent = cotangent.to(got.dtype)
    (grad,) = torch.autograd.grad(got, logits, cotangent)
    (derivative,) = torch.autograd.grad(want, logits, cotangent.double())
    assert grad.dtype == dtype
    assert grad[::7].count_nonzero() == 0
    budget.assert_within(grad, derivative, cotangent.abs().max(), dtype=dtype, terms=CLASSES)
    assert called == BOTH


def test_a_gradient_can_be_differentiated_again(called: list[str]) -> None:
    logits, targets, cotangent = given()
    cotangent.requires_grad_()

    def second(losses: Tensor, logits: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        (grad,) = torch.autograd.grad(losses, logits, cotangent, create_graph=True)
        return torch.autograd.grad((grad * along.to(grad.dtype)).sum(), (logits, cotangent))

    along = normal(ROWS, CLASSES, seed=2, dtype=torch.float32)
    got = second(row_losses(logits, targets), logits, cotangent)
    exact = logits.detach().double().requires_grad_(), cotangent.detach().double().requires_grad_()
    want = second(F.cross_entropy(exact[0], targets, reduction="none"), *exact)
    for one, other in zip(got, want, strict=True):
        budget.assert_within(one, other, 16.0, terms=CLASSES)
    assert called == ["cross_entropy_rows"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own, of itself
def test_what_is_not_differentiated_backwards_is_left_to_torch(called: list[str]) -> None:
    logits, targets, _ = given()
    logits, along = logits.detach(), normal(ROWS, CLASSES, seed=2, dtype=torch.float32)
    want = F.cross_entropy(logits, targets, reduction="none")
    loss = partial(row_losses, targets=targets)
    _, tangent = torch.func.jvp(loss, (logits,), (along,))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(logits, along))).tangent
    grad = torch.func.grad(lambda z: loss(z).sum())(logits)
    assert dual is not None
    for found in (tangent, dual, (grad * along).sum(1)):
        budget.assert_within(found, tangent, 16.0, terms=CLASSES)
    mapped = torch.func.vmap(lambda z, y: row_losses(z[None], y[None])[0])(logits, targets)
    budget.assert_within(mapped, want, 16.0)
    assert called == []


@pytest.mark.parametrize(
    "keywords",
    [
        {"engine": "ghost"},
        {"engine": "ghost", "memory": "two_pass"},
        {"engine": "ghost", "micro_batch": 4},
        {"engine": "jvp"},
        {"engine": "double_backward"},
    ],
    ids=str,
)
def test_every_engine_is_exact(keywords: dict[str, Any], called: list[str]) -> None:
    some = setup()
    judge_step(metakern.l2rw_step, some, plain=some.oracle(dtype=torch.float32), **keywords)
    assert set(called) == set(BOTH)


def test_autocast_is_as_with_the_loss_of_torch(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> list[Tensor]:
        some = setup()
        with torch.autocast("cpu", torch.bfloat16):
            result = metakern.l2rw_step(some.model, some.batch, some.meta_batch, engine="ghost")
        return [*result[:4], *(p.grad for p in some.model.parameters() if p.grad is not None)]

    got = step()
    assert set(called) == set(BOTH)
    monkeypatch.setattr(subject, "LOGITS", 1 << 60)
    for one, other in zip(got, step(), strict=True):
        assert one.dtype == other.dtype == torch.float32
        budget.assert_within(one, other, other.abs().max(), dtype=torch.bfloat16)


def test_compiled_step(called: list[str]) -> None:
    some = setup()
    step = metakern.compile_step(some.model, some.batch, some.meta_batch, backend="eager")
    judge_step(lambda model, *given, loss_fn: step(*given), some, plain=some.oracle(dtype=torch.float32))
    assert set(called) == set(BOTH)


def test_rows_are_known_to_keep_their_order(called: list[str]) -> None:
    """Integers beside activations may pick rows; those of a loss do not, so no later step has to look."""
    some = setup()
    trainable = dict(some.model.named_parameters())
    assert not trace_batch(some.model, some.batch, None, trainable, "batch").reorders
    assert called == ["cross_entropy_rows"]


def test_nan_passes_a_row_that_is_ignored(called: list[str]) -> None:
    """It may have a label in the next batch, as in torch's loss."""
    model, (x, y) = wide_network(), setup().batch
    y[1] = -100
    inside = torch.arange(len(y)) < 3
    arguments = (model, (x, y), None, dict(model.named_parameters()), [[None], [None]], inside)
    assert poisoned_losses(*arguments).isfinite().all()
    axes = [ExampleAxis(0, 1, 1)]
    assert torch.equal(poisoned_losses(*arguments[:4], [axes, axes], inside).isnan(), inside)
    assert set(called) == {"cross_entropy_rows"}


@pytest.mark.parametrize("target", [-1, CLASSES])
def test_a_target_that_is_no_class_is_refused_before_anything_changes(target: int, called: list[str]) -> None:
    some = setup()
    some.batch[1][2] = target
    before = Snapshot.of(some.model)
    with pytest.raises(ValueError, match=f"Target {target} is out of bounds"):
        metakern.l2rw_step(some.model, some.batch, some.meta_batch)
    before.assert_unchanged(some.model)
    assert called == ["cross_entropy_rows"]


def test_only_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "cross_entropy_rows", lambda logits, targets: "operators")
    rows = subject.LOGITS // 1024
    logits, targets = torch.zeros(rows, 1024), torch.zeros(rows, dtype=torch.int64)
    assert row_losses(logits, targets) == "operators"
    assert row_losses(logits.bfloat16(), targets) == "operators"
    for others in ((logits[1:], targets[1:]), (logits.view(-1, 256), targets.repeat(4)), (logits.double(), targets)):
        assert isinstance(row_losses(*others), Tensor)
    with pytest.raises((RuntimeError, TypeError, IndexError)):
        row_losses(logits, targets.int())  # torch's own refusal


def test_token_logits_are_large_enough(called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    class Tokens(Transformer):
        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.norm(self.blocks(self.embedding(tokens)))).transpose(1, 2)

    torch.manual_seed(0)
    model = Tokens(width=8, depth=1, heads=1, classes=4096, vocabulary=4096)
    tokens = labels(8, 33, classes=4096)
    batch, meta_batch = (tokens[:, :-1], tokens[:, 1:]), (tokens[:2, :-1], tokens[:2, 1:])
    nodes: list[str] = []
    losses = per_example_losses(model, batch, None, "batch")
    stack = [losses.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            nodes.append(node.name())
            stack += [following for following, _ in node.next_functions]
    assert "_CrossEntropyRowsBackward" in nodes
    result = metakern.l2rw_step(model, batch, meta_batch, engine="ghost")
    budget.assert_within(result.losses, losses, 16.0)
