"""The label-correction step against double backward through the whole virtual step, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.step.label_net import LabelNet
from metakern.step.mlc import CorrectionResult, mlc_step
from metakern.testing import inputs
from metakern.testing.judge import Snapshot
from tests.step.virtual_reference import MODELS, Batch, assert_same, close, losses_at, make, moved, twin


def label_net(features: int = 2, skip: bool = False) -> LabelNet:
    torch.manual_seed(4)
    return LabelNet(3, features, hidden=6, embedding=4, skip=skip).double()


def given_features(n: int) -> Tensor:
    return inputs.normal(n, 2, seed=6)


def soft_loss(logits: Tensor, labels: Tensor, clean: Tensor | None) -> Tensor:
    losses = -(labels * torch.log_softmax(logits, 1)).sum(1)
    return losses.mean() if clean is None else torch.cat([losses, clean]).mean()


class Reference:
    """The step as its authors describe it, with the graph of the virtual step kept."""

    def __init__(self, model: nn.Module, net: LabelNet, rule: str, lr: float) -> None:
        self.model, self.net, self.rule, self.lr = model, net, rule, lr
        self.carry: list[Tensor] | None = None

    def logits(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        return torch.func.functional_call(self.model, {**parameters, **buffers}, (x,))

    def step(
        self,
        batch: Batch,
        meta_batch: Batch,
        *,
        optimizer: torch.optim.Optimizer,
        label_optimizer: torch.optim.Optimizer,
        clean_batch: Batch | None = None,
        fused: bool = False,
        step_label_net: bool = True,
    ) -> tuple[Tensor, Tensor]:
        features = given_features(len(batch[1]))
        parameters = {name: p.detach().clone().requires_grad_() for name, p in self.model.named_parameters()}
        leaves = list(parameters.values())
        clean = None if clean_batch is None else losses_at(self.model, parameters, clean_batch)
        labels = self.net(batch[1], features)
        loss = soft_loss(self.logits(parameters, batch[0]), labels, clean)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        after = moved(self.rule, parameters, dict(zip(parameters, grads, strict=True)), self.lr, optimizer, self.model)
        meta_loss = losses_at(self.model, after, meta_batch).mean()
        found = list(torch.autograd.grad(meta_loss, list(self.net.parameters()), retain_graph=True))
        if self.carry is not None:
            gamma = self.discount(leaves, list(after.values()), list(grads), meta_loss, meta_batch, parameters)
            found = [f + gamma * c for f, c in zip(found, self.carry, strict=True)]
        self.carry = None if step_label_net else found
        if step_label_net:
            for p, g in zip(self.net.parameters(), found, strict=True):
                p.grad = g
            label_optimizer.step()
        labels = labels.detach() if fused else self.net(batch[1], features).detach()
        self.model.zero_grad()
        clean = None if clean_batch is None else losses_at(self.model, dict(self.model.named_parameters()), clean_batch)
        soft_loss(self.model(batch[0]), labels, clean).backward()
        optimizer.step()
        return labels, meta_loss.detach()

    def discount(
        self,
        leaves: list[Tensor],
        after: list[Tensor],
        grads: list[Tensor],
        meta_loss: Tensor,
        meta_batch: Batch,
        parameters: dict[str, Tensor],
    ) -> Tensor:
        """<(1 - J) g', g> / |g|^2 with J by differentiating the update itself."""
        ends = torch.autograd.grad(meta_loss, after, retain_graph=True)
        starts = torch.autograd.grad(losses_at(self.model, parameters, meta_batch).mean(), leaves)
        pulled = torch.autograd.grad(after, grads, ends, retain_graph=True)  # -J g', with J a diagonal
        along = torch.stack([((e + p) * s).sum() for e, p, s in zip(ends, pulled, starts, strict=True)]).sum()
        return along / torch.stack([s.square().sum() for s in starts]).sum()


def compare(
    name: str,
    *,
    steps: int = 1,
    virtual: str = "sgd",
    skip: bool = False,
    clean: bool = False,
    every: int = 1,
    **keywords: Any,
) -> None:
    model, *_ = make(name)
    net = label_net(skip=skip)
    theirs, their_net = twin(model), twin(net)
    optimizers = [
        torch.optim.SGD(each.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01, nesterov=virtual == "nesterov")
        for each in (model, theirs)
    ]
    label_optimizers = [torch.optim.Adam(each.parameters(), lr=0.02, amsgrad=True) for each in (net, their_net)]
    reference = Reference(theirs, their_net, virtual, 0.3)
    carry = None
    for step in range(steps):
        _, batch, meta_batch = make(name, seed=step)
        _, clean_batch, _ = make(name, n=3, seed=50 + step)
        shared: dict[str, Any] = {"clean_batch": clean_batch if clean else None, **keywords}
        shared["step_label_net"] = (step + 1) % every == 0
        got = mlc_step(
            model,
            net,
            batch,
            meta_batch,
            label_optimizer=label_optimizers[0],
            virtual_lr=0.3,
            virtual=virtual,
            features=given_features(6),
            optimizer=optimizers[0],
            carry=carry,
            **shared,
        )
        carry = got.carry
        labels, meta_loss = reference.step(
            batch, meta_batch, optimizer=optimizers[1], label_optimizer=label_optimizers[1], **shared
        )
        close(got.labels, labels, f"labels of step {step}", steps)
        close(got.meta_loss, meta_loss, f"meta loss of step {step}", steps)
    assert (carry is None) == (steps % every == 0)
    assert_same(net, their_net, "label net", steps)
    assert_same(model, theirs, "model", steps)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_exact(name: str, fused: bool, skip: bool) -> None:
    compare(name, fused=fused, skip=skip)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("virtual", ["momentum", "nesterov"])
def test_fused_with_the_real_update(name: str, virtual: str) -> None:
    """theta^ is then where the optimizer goes."""
    compare(name, fused=True, virtual=virtual, steps=3)


@pytest.mark.parametrize("name", ["mlp", "group-norm", "transformer"])
def test_clean_examples_beside(name: str) -> None:
    compare(name, clean=True)


@pytest.mark.parametrize("name", MODELS)
def test_k_steps(name: str) -> None:
    compare(name, steps=7, every=3, virtual="momentum", fused=True)


@pytest.mark.parametrize("name", MODELS)
def test_fifty_steps(name: str) -> None:
    compare(name, steps=50, virtual="momentum", fused=True, skip=True)
    compare(name, steps=50, skip=True)


def test_fused_ends_at_theta_hat() -> None:
    """The meta loss that the step returns is the one at the parameters that it leaves."""
    model, batch, meta_batch = make("mlp")
    net = label_net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.01)
    for _ in range(2):
        got = mlc_step(
            model,
            net,
            batch,
            meta_batch,
            label_optimizer=None,
            virtual_lr=None,
            virtual="momentum",
            fused=True,
            features=given_features(6),
            optimizer=optimizer,
        )
        close(F.cross_entropy(model(meta_batch[0]), meta_batch[1]), got.meta_loss, "meta loss")


def test_tangents_are_those_of_the_log_probabilities() -> None:
    """Moving every label by a little changes the meta loss by lr/n <d log q_nk/dtheta, g_meta>."""
    model, batch, meta_batch = make("mlp")
    got = plain(model, label_net())
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    labels = got.labels.clone().requires_grad_()
    loss = soft_loss(torch.func.functional_call(model, parameters, (batch[0],)), labels, None)
    grads = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    after = {name: p - 0.3 * g for (name, p), g in zip(parameters.items(), grads, strict=True)}
    (want,) = torch.autograd.grad(losses_at(model, after, meta_batch).mean(), labels)
    close(got.tangents / 6, want, "tangents")


def plain(model: nn.Module, net: nn.Module, **keywords: Any) -> CorrectionResult:
    _, batch, meta_batch = make("mlp")
    given = {"label_optimizer": None, "virtual_lr": 0.3, "features": given_features(6), **keywords}
    return mlc_step(model, net, batch, meta_batch, **given)


class Failing(nn.Module):
    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self.net, self.fail_at, self.calls = label_net(), fail_at, 0

    def forward(self, labels: Tensor, features: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.fail_at:
            raise OSError("no labels today")
        return self.net(labels, features)


@pytest.mark.parametrize("fail_at", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "batch-norm"])
def test_failure_leaves_no_trace(name: str, fail_at: int) -> None:
    model, batch, meta_batch = make(name)
    net = Failing(fail_at)
    label_optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before, before_net = Snapshot.of(model, optimizer), Snapshot.of(net, label_optimizer)
    with pytest.raises(OSError, match="no labels today"):
        mlc_step(
            model,
            net,
            batch,
            meta_batch,
            label_optimizer=label_optimizer,
            virtual_lr=0.1,
            features=given_features(6),
            optimizer=optimizer,
        )
    before.assert_unchanged(model, optimizer)
    net.calls = 0
    before_net.assert_unchanged(net, label_optimizer)


def test_arguments() -> None:
    (model, *_), net = make("mlp"), label_net()
    for keywords, error, match in (
        ({"virtual": "adam"}, TypeError, "must be Adam or AdamW"),
        ({"label_optimizer": 3}, TypeError, "label_optimizer must be.*int"),
        ({"features": ()}, RuntimeError, "shape"),
        ({"clean_batch": 3}, TypeError, "clean_batch must be"),
    ):
        before = Snapshot.of(model)
        with pytest.raises(error, match=match):
            plain(model, net, **keywords)
        before.assert_unchanged(model, random=False)
    with pytest.raises(ValueError, match=r"label_net must return.*\(6, 3\); got \(6, 4\)"):
        plain(model, LabelNet(4, 2).double())
    with pytest.raises(TypeError, match=r"label_net must be.*str"):
        plain(model, "net")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("change", [torch.log, lambda p: 2 * p, lambda p: p + torch.tensor([2.0, -1.0, -1.0])])
def test_labels_that_are_no_distributions_are_refused(change: Callable[[Tensor], Tensor]) -> None:
    (model, *_), net = make("mlp"), label_net()
    net.register_forward_hook(lambda module, given, output: change(output))
    before = Snapshot.of(model)
    with pytest.raises(ValueError, match=r"label_net must return distributions.*of example 0 "):
        plain(model, net)
    before.assert_unchanged(model, random=False)
