"""The meta batch passes between the forward and the backward pass of the train batch, and leaves nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import metakern
from metakern.testing import budget, inputs

WAYS: list[dict[str, Any]] = [
    {}, {"memory": "two_pass"}, {"engine": "jvp"}, {"engine": "double_backward"},
]  # fmt: skip


class Layers(nn.Module):
    def __init__(self, norm: bool) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 8), nn.BatchNorm1d(8) if norm else nn.Identity()
        self.inner, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def features(self, x: Tensor) -> Tensor:
        return self.norm(self.first(x))

    def block(self, h: Tensor) -> Tensor:
        return torch.tanh(self.inner(h))


class Noted(Layers):
    """A checkpointed block reads what forward has noted, as Swin transformers note height and width."""

    mask: Tensor

    def block(self, h: Tensor) -> Tensor:
        return super().block(h) * self.mask

    def forward(self, x: Tensor) -> Tensor:
        self.mask = x[:, :1].abs()
        return self.last(checkpoint(self.block, self.features(x), use_reentrant=False))


class Scaled(Layers):
    """A running scale, written before it is used."""

    def __init__(self, norm: bool, *, registered: bool) -> None:
        super().__init__(norm)
        self.registered = registered
        if registered:
            self.register_buffer("scale", torch.ones(1))
        else:
            self.scale = torch.ones(1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.block(self.features(x))
        with torch.no_grad():
            scale = self.scale if self.registered else self.scale.data
            scale.mul_(0.5).add_(0.5 * h.abs().mean())
        return self.last(h / self.scale)


class Staged(Layers):
    """Every pass fills the same memory with its inputs."""

    def __init__(self, norm: bool, fill: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__(norm)
        self.memory, self.fill = torch.zeros(16, 5), fill

    def forward(self, x: Tensor) -> Tensor:
        rows = self.memory[: len(x)]
        self.fill(rows, x)
        return self.last(self.block(self.features(rows)))


class Spectral(Layers):
    """A power iteration in buffers, by hand."""

    def __init__(self, norm: bool) -> None:
        super().__init__(norm)
        self.register_buffer("u", F.normalize(torch.randn(8), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(8), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        w = self.inner.weight
        with torch.no_grad():
            self.v.copy_(F.normalize(w.t() @ self.u, dim=0))
            self.u.copy_(F.normalize(w @ self.v, dim=0))
        return self.last(torch.tanh(F.linear(self.features(x), w / (self.u @ (w @ self.v)), self.inner.bias)))


MODELS: dict[str, Callable[[bool], nn.Module]] = {
    "noted": Noted,
    "scale in an attribute": lambda norm: Scaled(norm, registered=False),
    "scale in a buffer": lambda norm: Scaled(norm, registered=True),
    "staged": lambda norm: Staged(norm, lambda rows, x: rows.copy_(x)),
    "staged by data": lambda norm: Staged(norm, lambda rows, x: rows.data.copy_(x)),
    "staged by NumPy": lambda norm: Staged(norm, lambda rows, x: rows.numpy().__setitem__(slice(None), x.numpy())),
    "spectral": Spectral,
}


def flat(losses: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """The gradient of each loss, [n, parameters]."""
    found = [torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True) for one in losses]
    zeros = [torch.zeros_like(p) for p in parameters]
    return torch.stack([torch.cat([(z if g is None else g).flatten() for g, z in zip(f, zeros)]) for f in found])


def entropies(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.fixture
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("norm", [True, False], ids=["BatchNorm", "none"])
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("pairwise", [False, True])
def test_dots_and_gradient(make: Any, way: dict[str, Any], norm: bool, pairwise: bool, double: None) -> None:
    torch.manual_seed(0)
    model = make(norm)
    batch, meta_batch = inputs.pair(8, 4, 5, classes=3)
    meta_batch = (3 * meta_batch[0], meta_batch[1])
    for _ in range(2):  # the first one is looked at more closely
        twin = copy.deepcopy(model)
        parameters = list(twin.parameters())
        each = flat(entropies(twin, batch), parameters)  # backward passes right after their forward passes
        buffers = copy.deepcopy([*twin.buffers()])
        meta = flat(entropies(twin, meta_batch), parameters)
        if pairwise:
            result = metakern.grad_dots(model, batch, meta_batch, loss_fn=entropies, pairwise=True, **way)
            budget.assert_within(result.dots, each @ meta.t(), 10.0)
            continue
        result = metakern.l2rw_step(model, batch, meta_batch, loss_fn=entropies, **way)
        budget.assert_within(result.dots, each @ meta.mean(0), 10.0)
        found = torch.cat(
            [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()]
        )
        budget.assert_within(found, result.weights @ each, 10.0)
        assert all(map(torch.equal, model.buffers(), buffers))  # which the train batch alone moves on
        if isinstance(model, Scaled) and not model.registered:
            assert torch.equal(model.scale, twin.scale)  # either batch


def test_a_meta_batch_of_another_size(double: None) -> None:
    torch.manual_seed(0)
    model = Noted(True)
    batch, meta_batch = inputs.pair(8, 3, 5, classes=3)
    assert metakern.l2rw_step(model, batch, meta_batch).engine == "jvp"


class Counting:
    """A loss that counts its calls and may couple examples."""

    def __init__(self) -> None:
        self.calls, self.couples, self.mean = 0, False, torch.zeros(3)

    def __call__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        outputs = model(batch[0])
        self.calls += 1
        self.mean.mul_(0.9).add_(outputs.detach().mean(0))
        return F.cross_entropy(outputs - outputs.mean(0) if self.couples else outputs, batch[1], reduction="none")


def test_either_batch_counts_once(double: None) -> None:
    model, loss = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), Counting()
    batch, meta_batch = inputs.pair(8, 4, 5, classes=3)
    metakern.l2rw_step(model, batch, meta_batch, loss_fn=loss)
    assert loss.calls == 2
    loss.couples, mean = True, loss.mean.clone()
    with pytest.raises(NotImplementedError):
        metakern.l2rw_step(model, batch, meta_batch, loss_fn=loss, engine="ghost")
    assert (loss.calls, torch.equal(loss.mean, mean)) == (2, True)
    assert metakern.l2rw_step(model, batch, meta_batch, loss_fn=loss).engine == "jvp"
    assert loss.calls == 4
    loss.couples = False
    metakern.l2rw_step(model, batch, meta_batch, loss_fn=loss, micro_batch=4)
    assert loss.calls == 7  # two parts and the meta batch


def test_what_an_optimizer_leaves_on_the_model_stays(double: None) -> None:
    model = Noted(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_post_hook(lambda *_: setattr(model, "steps", vars(model).get("steps", 0) + 1))
    batch, meta_batch = inputs.pair(8, 4, 5, classes=3)
    for k in (1, 2):
        metakern.l2rw_step(model, batch, meta_batch, optimizer=optimizer)
        assert vars(model)["steps"] == k
        assert torch.equal(model.mask, meta_batch[0][:, :1].abs())  # the meta batch passes last
