"""The weight-net step against double backward through the whole virtual step, in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metakern.step.mwnet import MetaStepResult, mwnet_step
from metakern.testing import inputs
from metakern.testing.judge import Snapshot
from tests.step.virtual_reference import (
    MODELS,
    WeightNet,
    assert_same,
    close,
    make,
    mwnet_reference,
    twin,
)

NORMALISATIONS = ["sum", "detached_sum", "mean", "none"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def weight_net(features: int = 0) -> WeightNet:
    torch.manual_seed(3)
    return WeightNet(features).double()


def compare(name: str, *, engine: str = "auto", memory: str = "reuse", features: int = 0, **keywords: Any) -> None:
    """One step of the library and one of the reference on copies of everything."""
    model, batch, meta_batch = make(name)
    net = weight_net(features)
    given = (inputs.normal(len(batch[1]), features, seed=5),) if features else ()
    reference, reference_net = twin(model), twin(net)
    got = mwnet_step(
        model,
        net,
        batch,
        meta_batch,
        weight_optimizer=torch.optim.SGD(net.parameters(), lr=0.5),
        virtual_lr=0.7,
        features=given,
        engine=engine,
        memory=memory,
        **keywords,
    )
    weights, losses, meta_loss = mwnet_reference(
        reference,
        reference_net,
        batch,
        meta_batch,
        weight_optimizer=torch.optim.SGD(reference_net.parameters(), lr=0.5),
        virtual_lr=0.7,
        features=given,
        **keywords,
    )
    assert got.meta_loss is not None
    close(got.weights, weights, "weights")
    close(got.losses, losses, "losses")
    close(got.meta_loss, meta_loss, "meta loss")
    assert_same(net, reference_net, "weight net")
    assert_same(model, reference, "model")
    assert engine in ("auto", got.engine)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("normalise", NORMALISATIONS)
@pytest.mark.parametrize("detach_losses", [True, False])
def test_exact(name: str, normalise: str, detach_losses: bool) -> None:
    compare(name, normalise=normalise, detach_losses=detach_losses)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("engine", "memory"), [("ghost", "reuse"), ("ghost", "two_pass"), ("jvp", "reuse"), ("double_backward", "reuse")]
)
def test_engines(name: str, engine: str, memory: str) -> None:
    if name == "batch-norm" and engine == "ghost":
        with pytest.raises(NotImplementedError, match="interact"):
            compare(name, engine=engine, memory=memory)
        return
    compare(name, engine=engine, memory=memory)


@pytest.mark.parametrize("name", ["mlp", "batch-norm"])
def test_features(name: str) -> None:
    compare(name, features=2, detach_losses=False)


class Derived(nn.Module):
    """The same weight twice, once transposed: its gradient goes through a derivation that two weightings share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(5, 3), nn.Parameter(torch.ones(3, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight * torch.tanh(self.scale)
        return torch.tanh(x @ weight.t()) @ weight @ weight.t()


def test_derived_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    class WithBias(Derived):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.first.bias

    monkeypatch.setitem(MODELS, "mlp", WithBias)
    compare("mlp", engine="ghost")


# Some gradients are zero but for rounding (a key's bias), and Adam divides them by eps: hence one that is not tiny.
OPTIMIZERS: dict[str, tuple[str, Callable[[Any], torch.optim.Optimizer]]] = {
    "momentum": ("momentum", lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=0.01, dampening=0.3)),
    "nesterov": ("nesterov", lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, weight_decay=0.01, nesterov=True)),
    "adam": ("adam", lambda p: torch.optim.Adam(p, lr=0.05, weight_decay=0.01, eps=1e-4)),
    "adamw": ("adam", lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, eps=1e-4)),
    "amsgrad": ("adam", lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True, eps=1e-4)),
    "frozen": ("adam_frozen", lambda p: torch.optim.Adam(p, lr=0.05, eps=1e-4)),
    "sgd": ("sgd", lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9)),
}


def trajectory(name: str, kind: str, steps: int, **keywords: Any) -> None:
    """The same steps by the library and by the reference, each with optimizers of its own."""
    virtual, build = OPTIMIZERS[kind]
    model, *_ = make(name)
    net = weight_net()
    reference, reference_net = twin(model), twin(net)
    ours, theirs = (
        {
            "optimizer": build(each.parameters()),
            "weight_optimizer": torch.optim.Adam(each_net.parameters(), lr=0.01),
            "virtual": virtual,
            "virtual_lr": 0.2 if kind in ("momentum", "nesterov", "sgd") else 0.05,
            **keywords,
        }
        for each, each_net in ((model, net), (reference, reference_net))
    )
    for step in range(steps):
        _, batch, meta_batch = make(name, seed=100 + step)
        got = mwnet_step(model, net, batch, meta_batch, **ours)
        _, losses, _ = mwnet_reference(reference, reference_net, batch, meta_batch, **theirs)
        close(got.losses, losses, f"losses of step {step}", scale=steps)
    assert_same(net, reference_net, "weight net", scale=steps)
    assert_same(model, reference, "model", scale=steps)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_virtual_optimizers(name: str, kind: str) -> None:
    """Three steps, so that empty, young and older optimizer states are met."""
    trajectory(name, kind, steps=3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, "sgd") for name in MODELS),
        *((name, kind) for name in ("mlp", "batch-norm") for kind in ("nesterov", "adam")),
    ],
)
def test_fifty_steps(name: str, kind: str) -> None:
    trajectory(name, kind, steps=50, detach_losses=False)


@pytest.mark.parametrize(
    ("name", "params", "names"),
    [
        ("mlp", ["2", "4.weight"], {"2.weight", "2.bias", "4.weight"}),
        ("group-norm", ["1.bias", "4.weight", "7.bias"], {"1.bias", "4.weight", "7.bias"}),
        ("transformer", ["blocks.0.norm1.bias", "embedding"], {"blocks.0.norm1.bias", "embedding.weight"}),
        ("batch-norm", ["1.bias", "3"], {"1.bias", "3.weight"}),
    ],
)
def test_params_restrict_the_virtual_step(name: str, params: list[str], names: set[str]) -> None:
    """Only those move virtually; the real gradient is of all."""
    model, batch, meta_batch = make(name)
    net = weight_net()
    reference, reference_net = twin(model), twin(net)
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (net, reference_net)]
    mwnet_step(model, net, batch, meta_batch, weight_optimizer=optimizers[0], virtual_lr=0.7, params=params)
    mwnet_reference(
        reference, reference_net, batch, meta_batch, weight_optimizer=optimizers[1], virtual_lr=0.7, names=names
    )
    assert_same(net, reference_net, "weight net")
    assert_same(model, reference, "model")


def plain(model: nn.Module, net: nn.Module, **keywords: Any) -> MetaStepResult:
    _, batch, meta_batch = make("mlp")
    return mwnet_step(model, net, batch, meta_batch, **{"weight_optimizer": None, "virtual_lr": 0.7, **keywords})


def test_without_update() -> None:
    """meta_every=k: between updates the step is one forward and one backward pass, and phi stays."""
    (model, batch, _), net = make("mlp"), weight_net()
    before = Snapshot.of(net)
    result = mwnet_step(
        model, net, batch, None, weight_optimizer=None, virtual_lr=None, update_weight_net=False, normalise="mean"
    )
    before.assert_unchanged(net)
    assert result.dots is None
    assert result.meta_loss is None
    assert result.engine == "backward"
    losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    weights = net(losses.detach()[:, None]).detach().flatten() / len(losses)
    want = torch.autograd.grad((weights * losses).sum(), list(model.parameters()))
    for p, g in zip(model.parameters(), want, strict=True):
        assert p.grad is not None
        close(p.grad, g, "gradient")


def test_without_weight_optimizer() -> None:
    """The meta-gradient is left in `.grad` and the weights are those of the present phi."""
    (model, *_), net = make("mlp"), weight_net()
    stepped, stepped_net = twin(model), twin(net)
    left = plain(model, net)
    taken = plain(stepped, stepped_net, weight_optimizer=torch.optim.SGD(stepped_net.parameters(), lr=0.5))
    for p, q, start in zip(net.parameters(), stepped_net.parameters(), weight_net().parameters(), strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, q.grad)  # pyright: ignore[reportArgumentType]
        assert torch.equal(p, start)
    close(left.weights, net(left.losses[:, None]).flatten() / net(left.losses[:, None]).sum(), "weights")
    assert not torch.equal(left.weights, taken.weights)


def test_virtual_lr_from_the_optimizer() -> None:
    (model, *_), net = make("mlp"), weight_net()
    other, other_net = twin(model), twin(net)
    groups = [{"params": list(model.parameters())[:2], "lr": 0.7}, {"params": list(model.parameters())[2:]}]
    plain(model, net, virtual_lr=None, optimizer=torch.optim.SGD(groups, lr=0.7))
    plain(other, other_net, virtual_lr=0.7)
    for p, q in zip(net.parameters(), other_net.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # pyright: ignore[reportArgumentType]


def test_features_from_the_forward_pass() -> None:
    """A callable is asked after the forward pass of the train batch, so that it may hand on what a hook kept."""
    (model, batch, meta_batch), net = make("mlp"), weight_net(7)
    kept: list[Tensor] = []
    handle = model.get_submodule("1").register_forward_hook(lambda module, args, output: kept.append(output))
    calls = []

    def features(given: nn.Module, at: Any) -> Tensor:
        assert given is model
        assert at is batch
        calls.append(len(kept))
        return kept[-1]

    result = mwnet_step(
        model, net, batch, meta_batch, weight_optimizer=None, virtual_lr=0.7, features=features, normalise="none"
    )
    handle.remove()
    assert calls == [1]
    close(result.weights, net(result.losses[:, None], kept[0].detach()).flatten(), "weights")


def test_dropout_masks_are_shared() -> None:
    """Virtual gradient, dots and real gradient see one mask, whatever the engine; meta masks are drawn after it."""
    grads = []
    for engine, memory in (("ghost", "reuse"), ("ghost", "two_pass"), ("jvp", "reuse"), ("double_backward", "reuse")):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 3)).double()
        net = weight_net()
        torch.manual_seed(7)
        plain(model, net, engine=engine, memory=memory)
        grads.append([p.grad for p in (*model.parameters(), *net.parameters())])
    for other in grads[1:]:
        for got, want in zip(other, grads[0], strict=True):
            assert got is not None
            assert want is not None
            close(got, want, "gradient")


def test_accumulate() -> None:
    (model, *_), net = make("mlp"), weight_net()
    plain(model, net)
    once = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    plain(model, net, accumulate=True)
    for p, g in zip(model.parameters(), once, strict=True):
        assert p.grad is not None
        close(p.grad, 2 * g, "gradient")


class Head(nn.Module):
    """A weight net that fails at a chosen call."""

    def __init__(self, fail_at: int) -> None:
        super().__init__()
        self.net, self.fail_at, self.calls = weight_net(), fail_at, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, losses: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        if self.calls == self.fail_at:
            raise OSError("no weights today")
        return self.net(losses)


@pytest.mark.parametrize("fail_at", [1, 2])
@pytest.mark.parametrize("name", ["mlp", "batch-norm"])
def test_failure_leaves_no_trace(name: str, fail_at: int) -> None:
    """Also when the weight net's optimizer has stepped already."""
    model, batch, meta_batch = make(name)
    net = Head(fail_at)
    weight_optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    net(torch.ones(2, 1, dtype=torch.float64)).sum().backward() if fail_at > 1 else None
    weight_optimizer.step()
    net.calls = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before, before_net = Snapshot.of(model, optimizer), Snapshot.of(net, weight_optimizer)
    with pytest.raises(OSError, match="no weights today"):
        mwnet_step(
            model,
            net,
            batch,
            meta_batch,
            weight_optimizer=weight_optimizer,
            virtual_lr=0.1,
            optimizer=optimizer,
        )
    before.assert_unchanged(model, optimizer)
    before_net.assert_unchanged(net, weight_optimizer)


def test_arguments() -> None:
    (model, *_), net = make("mlp"), weight_net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for keywords, error, match in (
        ({"normalise": "max"}, ValueError, "normalise must be.*'max'"),
        ({"virtual": "lion"}, ValueError, "virtual must be.*'lion'"),
        ({"virtual": "adam"}, TypeError, "optimizer, which must be Adam or AdamW; got NoneType"),
        ({"virtual": "adam", "optimizer": sgd}, TypeError, "got SGD"),
        ({"virtual_lr": None}, ValueError, "virtual_lr=None takes"),
        ({"virtual_lr": float("nan")}, ValueError, "virtual_lr must be a finite"),
        ({"weight_optimizer": 3}, TypeError, "weight_optimizer must be.*int"),
        ({"weight_optimizer": sgd}, ValueError, "weight_optimizer holds none"),
        ({"features": torch.ones(6, 2).double()}, RuntimeError, "shape"),
        ({"engine": "ghosts"}, ValueError, "engine must be"),
    ):
        before, before_net = Snapshot.of(model, sgd), Snapshot.of(net)
        with pytest.raises(error, match=match):
            plain(model, net, **keywords)
        before.assert_unchanged(model, sgd, random=False)  # making the batches seeds the generator
        before_net.assert_unchanged(net, random=False)
    with pytest.raises(TypeError, match=r"weight_net must be.*int"):
        plain(model, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="nothing to learn"):
        plain(model, twin(net).requires_grad_(False))
    with pytest.raises(ValueError, match=r"weight_net must return.*\(6,\) or \(6, 1\); got \(6, 2\)"):
        plain(model, nn.Linear(1, 2).double())
    partly = torch.optim.SGD([next(model.parameters())], lr=0.1, momentum=0.9)
    with pytest.raises(ValueError, match="does not hold parameter"):
        plain(model, net, optimizer=partly, virtual="momentum")


def test_weight_net_keeps_its_precision_under_autocast() -> None:
    """Its gradient is a sum that cancels; features that the model made in half precision are cast."""
    seen: list[Any] = []

    class Watching(WeightNet):
        def forward(self, losses: Tensor, *features: Tensor) -> Tensor:
            seen.append((losses.dtype, *(f.dtype for f in features), torch.is_autocast_enabled("cpu")))
            return super().forward(losses, *features)

    torch.manual_seed(0)
    (model, batch, meta_batch), net = make("mlp"), Watching(2)
    batch, meta_batch = ((x.float(), y) for x, y in (batch, meta_batch))
    features = torch.ones(6, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        got = mwnet_step(
            model.float(), net, batch, meta_batch, weight_optimizer=None, virtual_lr=0.7, features=features
        )
    assert set(seen) == {(torch.float32, torch.float32, False)}
    assert got.weights.dtype == torch.float32


def test_weights_that_are_not_finite() -> None:
    class Broken(WeightNet):
        def forward(self, losses: Tensor, *features: Tensor) -> Tensor:
            return super().forward(losses) / 0

    (model, batch, meta_batch), broken = make("mlp"), Broken().double()
    before = Snapshot.of(model)
    with pytest.raises(ValueError, match="weight_net returned weights that are not finite"):
        mwnet_step(model, broken, batch, meta_batch, weight_optimizer=None, virtual_lr=0.7)
    before.assert_unchanged(model)
