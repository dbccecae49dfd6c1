"""The MetaBalance step against double backward through the inner step, in float64."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metakern.step.metabalance import metabalance_step
from metakern.testing import budget, inputs
from metakern.testing.judge import Snapshot
from tests.step.virtual_reference import MODELS, Batch, assert_same, close, losses_at, make, twin


def reference(
    model: nn.Module,
    inner: Batch,
    outer: Batch,
    *,
    inner_lr: float,
    order: int = 2,
    leak: float = 0.0,
    scale: float = 1.0,
    names: set[str] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradient and outer loss with the graph of the inner step kept; running statistics see inner, then outer."""
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    chosen = {name: p for name, p in parameters.items() if names is None or name in names}
    inner_loss = losses_at(model, parameters, inner).mean()
    grads = torch.autograd.grad(inner_loss, list(chosen.values()), create_graph=True)
    steps = {name: g if order == 2 else g.detach() for name, g in zip(chosen, grads, strict=True)}
    moved = {name: p - inner_lr * steps[name] if name in steps else p for name, p in parameters.items()}
    outer_loss = losses_at(model, moved, outer).mean()
    total = scale * (outer_loss + leak * inner_loss)
    found = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
    with torch.no_grad():
        model(inner[0])
        functional_call(model, moved, (outer[0],))
    return found, outer_loss.detach()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_exact(name: str, order: int, leak: float) -> None:
    model, inner, outer = make(name)
    other = twin(model)
    result = metabalance_step(model, inner, outer, inner_lr=0.3, order=order, leak=leak)
    found, outer_loss = reference(other, inner, outer, inner_lr=0.3, order=order, leak=leak)
    for key, p in other.named_parameters():
        p.grad = found[key]
    assert_same(model, other, "model")
    close(result.outer_loss, outer_loss, "outer loss")


@pytest.mark.parametrize("name", MODELS)
def test_central_difference(name: str) -> None:
    """The rounding error of a gradient is divided by r = sqrt(eps) / |v|, so half of the digits are left."""
    model, inner, outer = make(name)
    metabalance_step(model, inner, outer, inner_lr=0.3, hessian="central_difference")
    found, _ = reference(twin(model), inner, outer, inner_lr=0.3)
    allowed = 10 * torch.finfo(torch.float64).eps ** (1 / 2)
    for key, p in model.named_parameters():
        assert p.grad is not None
        result = budget.verdict(key, p.grad, found[key], allowed * (1 + float(found[key].abs().max())))
        assert result.ok, str(result)


def test_alignment() -> None:
    """To first order the outer loss is that at theta less inner_lr times the alignment of the gradients."""
    model, inner, outer = make("mlp")
    result = metabalance_step(model, inner, outer, inner_lr=0.0)
    grads = [
        torch.autograd.grad(losses_at(model, dict(model.named_parameters()), batch).mean(), list(model.parameters()))
        for batch in (inner, outer)
    ]
    close(result.alignment, torch.stack([(a * b).sum() for a, b in zip(*grads, strict=True)]).sum(), "alignment")
    close(result.inner_loss, F.cross_entropy(model(inner[0]), inner[1]), "inner loss")


@pytest.mark.parametrize("hessian", ["double_backward", "central_difference"])
def test_params_restrict_the_inner_step(hessian: str) -> None:
    model, inner, outer = make("mlp")
    metabalance_step(model, inner, outer, inner_lr=0.3, params=["2", "4.weight"], hessian=hessian)
    found, _ = reference(twin(model), inner, outer, inner_lr=0.3, names={"2.weight", "2.bias", "4.weight"})
    for key, p in model.named_parameters():
        assert p.grad is not None
        close(p.grad, found[key], key, 1.0 if hessian == "double_backward" else 1e5)


@pytest.mark.parametrize(("name", "order"), [*((name, 2) for name in MODELS), ("mlp", 1), ("batch-norm", 1)])
def test_fifty_steps_over_two_pairs(name: str, order: int) -> None:
    """Gradients of two pairs of batches are averaged before each step of the optimizer."""
    model, *_ = make(name)
    other = twin(model)
    ours, theirs = (torch.optim.SGD(each.parameters(), lr=0.05, momentum=0.9) for each in (model, other))
    for step in range(50):
        (_, inner1, outer1), (_, inner2, outer2) = make(name, seed=2 * step), make(name, seed=2 * step + 1)
        shared: dict[str, Any] = {"inner_lr": 0.1, "order": order, "leak": 0.01, "scale": 0.5}
        metabalance_step(model, inner1, outer1, **shared)
        metabalance_step(model, inner2, outer2, **shared, accumulate=True, optimizer=ours)
        first, _ = reference(other, inner1, outer1, **shared)
        second, _ = reference(other, inner2, outer2, **shared)
        for key, p in other.named_parameters():
            p.grad = first[key] + second[key]
        theirs.step()
    assert_same(model, other, "model", scale=50)


def test_dropout_mask_is_that_of_the_inner_pass() -> None:
    """Either way to the Hessian sees the mask of the inner gradient."""
    grads = []
    for hessian in ("double_backward", "central_difference"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
        _, inner, outer = make("mlp")
        torch.manual_seed(1)
        metabalance_step(model, inner, outer, inner_lr=0.5, hessian=hessian)
        grads.append([p.grad for p in model.parameters()])
    for got, want in zip(*grads, strict=True):
        assert got is not None
        assert want is not None
        close(got, want, "gradient", 1e5)


def test_fused_attention() -> None:
    """Double backward does without the fused kernel; the central difference keeps it."""
    from metakern.testing.models import Transformer

    torch.manual_seed(0)
    fused = Transformer(width=8, depth=1, heads=2, classes=3, vocabulary=11, fused=True).double()
    plain = Transformer(width=8, depth=1, heads=2, classes=3, vocabulary=11).double()
    plain.load_state_dict(fused.state_dict())
    _, inner, outer = make("transformer")
    found, _ = reference(plain, inner, outer, inner_lr=0.3)
    for hessian, scale in (("double_backward", 1.0), ("central_difference", 1e5)):
        metabalance_step(fused, inner, outer, inner_lr=0.3, hessian=hessian)
        for key, p in fused.named_parameters():
            assert p.grad is not None
            close(p.grad, found[key], key, scale)


class Failing(nn.Module):
    def __init__(self, model: nn.Module, fail_at: int) -> None:
        super().__init__()
        self.model, self.fail_at = model, fail_at
        self.calls = itertools.count(1)  # a number would be put back before a pass is repeated

    def forward(self, x: Tensor) -> Tensor:
        if next(self.calls) == self.fail_at:
            raise OSError("no logits today")
        return self.model(x)


class Bags(nn.Module):
    """Means of table rows, by torch's own bag or written out."""

    def __init__(self, own: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.own = nn.EmbeddingBag(7, 4), nn.Linear(4, 3), own
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        found = self.table(tokens) if self.own else F.embedding(tokens, self.table.weight).mean(1)
        return self.head(torch.tanh(found))


def test_bags_which_torch_does_not_differentiate_twice() -> None:
    inner, outer = ((inputs.labels(n, 3, classes=7, seed=n), inputs.labels(n, classes=3, seed=n + 1)) for n in (5, 3))
    grads = []
    for own in (True, False):
        model = Bags(own)
        metabalance_step(model, inner, outer, inner_lr=0.3)
        grads.append([p.grad for p in model.parameters()])
    for got, want in zip(*grads, strict=True):
        budget.assert_within(got, want, 1.0, terms=10)


class Normed(nn.Module):
    """Weight normalisation by torch's function, or written out."""

    def __init__(self, own: bool, dim: int) -> None:
        super().__init__()
        self.v, self.own, self.dim = nn.Parameter(inputs.normal(3, 5)), own, dim
        self.g = nn.Parameter(inputs.normal(*((3, 1) if dim == 0 else (1, 5)), seed=1))

    def forward(self, x: Tensor) -> Tensor:
        written = self.v * (self.g / self.v.norm(dim=1 - self.dim, keepdim=True))
        weight = torch._weight_norm(self.v, self.g, self.dim) if self.own else written  # type: ignore[attr-defined]
        return x @ weight.t()


@pytest.mark.parametrize("dim", [0, 1])
def test_weight_normalisation_whose_second_derivative_is_wrong_in_torch(dim: int) -> None:
    grads = []
    for own in (True, False):
        model = Normed(own, dim)
        metabalance_step(model, *inputs.pair(6, 4, 5, classes=3), inner_lr=0.3)
        grads.append([p.grad for p in model.parameters()])
    for got, want in zip(*grads, strict=True):
        budget.assert_within(got, want, 1.0, terms=10)


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])
def test_failure_leaves_no_trace(fail_at: int) -> None:
    model, inner, outer = make("batch-norm")
    failing = Failing(model, fail_at)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = Snapshot.of(failing, optimizer)
    with pytest.raises(OSError, match="no logits today"):
        metabalance_step(failing, inner, outer, inner_lr=0.1, hessian="central_difference", optimizer=optimizer)
    before.assert_unchanged(failing, optimizer)


def test_arguments() -> None:
    model, inner, outer = make("mlp")
    keywords: dict[str, Any]
    for keywords, error, match in (
        ({"order": 3}, ValueError, "order must be 1 or 2, got 3"),
        ({"hessian": "exact"}, ValueError, "hessian must be"),
        ({"inner_lr": float("inf")}, ValueError, "inner_lr must be a finite"),
        ({"leak": "some"}, ValueError, "leak must be a finite"),
        ({"params": "layer9"}, ValueError, "layer9"),
    ):
        before = Snapshot.of(model)
        with pytest.raises(error, match=match):
            metabalance_step(model, inner, outer, **{"inner_lr": 0.1, **keywords})
        before.assert_unchanged(model)
    with pytest.raises(TypeError, match="outer_batch must be"):
        metabalance_step(model, inner, outer[0], inner_lr=0.1)
