"""Logit tangents against double backward, and what they are for: the dots of any loss on the logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import metakern
from metakern.step.logit_tangents import logit_tangents
from metakern.testing import inputs
from metakern.testing.judge import Snapshot
from tests.step.virtual_reference import MODELS, Batch, close, losses_at, make


def reference(model: nn.Module, batch: Batch, meta_batch: Batch) -> Tensor:
    """J v by two reversals: g(u) = J^T u is linear in u, and J v = d<g(u), v>/du."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    v = torch.autograd.grad(losses_at(model, parameters, meta_batch).mean(), list(parameters.values()))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits = functional_call(model, {**parameters, **buffers}, (batch[0],))
    u = torch.zeros_like(logits, requires_grad=True)
    grads = torch.autograd.grad(logits, list(parameters.values()), u, create_graph=True)
    (found,) = torch.autograd.grad(torch.stack([(g * d).sum() for g, d in zip(grads, v, strict=True)]).sum(), u)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_exact(name: str) -> None:
    model, batch, meta_batch = make(name)
    before = Snapshot.of(model)
    got = logit_tangents(model, batch, meta_batch)
    before.assert_unchanged(model)
    close(got.tangents, reference(model, batch, meta_batch), "tangents")
    close(got.logits, functional_call(model, {k: b.clone() for k, b in model.named_buffers()}, (batch[0],)), "logits")
    assert not got.tangents.requires_grad
    assert not got.logits.requires_grad


@pytest.mark.parametrize("name", MODELS)
def test_dots_of_any_loss(name: str) -> None:
    """<dl_n/dz_n, dz_n> is the dot of a loss that the pass knew nothing of."""
    model, batch, meta_batch = make(name)
    soft = torch.softmax(inputs.normal(6, 3, seed=9), 1)
    got = logit_tangents(model, batch, meta_batch)
    q = torch.softmax(got.logits, 1)
    want = metakern.grad_dots(model, (batch[0], soft), meta_batch)
    close(((q - soft) * got.tangents).sum(1), want.dots, "dots")
    hard = metakern.grad_dots(model, batch, meta_batch)
    close(((q - F.one_hot(batch[1], 3)) * got.tangents).sum(1), hard.dots, "dots")


def test_forms_and_subsets() -> None:
    model, batch, meta_batch = make("mlp")

    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.inner(x)}

    whole = logit_tangents(model, batch, meta_batch).tangents
    keyword = logit_tangents(
        Keyword(), {"x": batch[0], "labels": batch[1]}, {"x": meta_batch[0], "labels": meta_batch[1]}
    )
    close(keyword.tangents, whole, "tangents of a mapping")
    parts = [logit_tangents(model, batch, meta_batch, params=part).tangents for part in (["0", "2"], ["4"])]
    close(parts[0] + parts[1], whole, "tangents by parts")
    doubled = logit_tangents(model, batch, meta_batch, logits_fn=lambda net, given: 2 * net(given[0]))
    close(doubled.tangents, 2 * whole, "tangents of own logits")


def test_dropout_mask_is_that_of_the_logits() -> None:
    """Dropout of whole examples: the logits are the bias where an example was dropped, and the tangents zero."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bias = nn.Linear(5, 3, bias=False), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x * F.dropout(torch.ones(len(x), 1, dtype=x.dtype), 0.5)) + self.bias

    _, batch, meta_batch = make("mlp", n=40)
    got = logit_tangents(Dropping().double(), batch, meta_batch, params="layer.*")
    dropped = (got.logits == 1).all(1)
    assert 0 < int(dropped.sum()) < 40
    assert torch.equal(dropped, (got.tangents == 0).all(1))


def test_failures_leave_no_trace() -> None:
    model, batch, meta_batch = make("batch-norm")
    before = Snapshot.of(model)
    keywords: dict[str, Any]
    for keywords, error, match in (
        ({"logits_fn": lambda net, given: net(given[0])[:, 0]}, ValueError, r"logits of shape \[n, C\]"),
        ({"logits_fn": lambda net, given: net(given[0]) / 0}, ValueError, "not finite"),
        ({"params": "layer9"}, ValueError, "layer9"),
    ):
        with pytest.raises(error, match=match):
            logit_tangents(model, batch, meta_batch, **keywords)
        before.assert_unchanged(model)
    with pytest.raises(TypeError, match="batch must be"):
        logit_tangents(model, batch[0], meta_batch)
    before.assert_unchanged(model)


def test_inputs_by_keyword() -> None:
    """As `l2rw_step` takes them: ({"x": ...}, targets), and several arguments."""

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.linear(x) * scale

    torch.manual_seed(0)
    model = Keywords().double()
    (x, y), (mx, my) = inputs.pair(6, 3, 4, classes=3)
    found = [logit_tangents(model, (given, y), (mx, my)).tangents for given in (x, {"x": x}, (x, 1.0))]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_attributes_are_left_alone() -> None:
    class Counting(nn.Linear):
        passes = 0

        def forward(self, x: Tensor) -> Tensor:
            self.passes += 1
            return super().forward(x)

    model = Counting(4, 3).double()
    logit_tangents(model, *inputs.pair(6, 3, 4, classes=3))
    assert model.passes == 0
