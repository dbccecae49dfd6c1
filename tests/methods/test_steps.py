"""Every method takes its step as its formula says: parameters after it equal a plain step on sum_n w_n l_n."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metakern
from metakern.methods import METHODS, Setting, find
from metakern.methods.method import Prepared

# Methods that weigh the plain cross entropy by a formula; the others change the loss and are tested by it.
FIXED = [
    "uniform",
    "random",
    "proportion",
    "proportion-as-shipped",
    "resample",
    "hard-mining",
    "hard-mining-as-shipped",
    "inverse-sqrt",
    "class-balanced",
    "self-paced",
    "self-paced-linear",
    "cdb",
]


# Methods whose steps need not lower the loss on this batch: they follow a clean set or balanced data of another kind,
# or train on nodes of a graph. Their own tests judge them.
ELSEWHERE = {name for name in METHODS if name.startswith(("l2rw", "mlc", "metabalance", "meta-gcn"))}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)

    def batch(n: int):
        inputs = torch.randn(n, 6, generator=generator, dtype=torch.float64)
        return inputs, (torch.rand(n, generator=generator) < 0.7).long()

    return batch(12), batch(4)


def begun(name: str, model: nn.Module, setup):
    step = find(name).begin(setup(model))
    if isinstance(step, Prepared):
        step.prepare()
    return step


def take(name: str, model: nn.Module, batches, setup, lr: float = 0.1, step=None):
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    setting = Setting(torch.tensor([30, 70]), torch.Generator().manual_seed(2), indices=torch.arange(12))
    return (step or begun(name, model, setup))(model, *batches, optimizer=optimizer, setting=setting)


@pytest.mark.parametrize("name", FIXED)
def test_step_is_the_weighted_gradient(name, model, batches, setup):
    plain = copy.deepcopy(model)
    outcome = take(name, model, batches, setup)
    (inputs, targets), _ = batches
    losses = F.cross_entropy(plain(inputs), targets, reduction="none")
    (outcome.weights * losses).sum().backward()
    torch.optim.SGD(plain.parameters(), 0.1).step()
    torch.testing.assert_close(outcome.losses, losses.detach())
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("name", FIXED)
def test_weights_are_a_share(name, model, batches, setup):
    weights = take(name, model, batches, setup).weights
    assert (weights >= 0).all()
    if not name.endswith("proportion-as-shipped"):
        assert float(weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    "name", [name for name, method in METHODS.items() if name not in ELSEWHERE and method.fit is None]
)
def test_every_step_learns(name, model, batches, setup):
    (inputs, targets), _ = batches
    before = F.cross_entropy(model(inputs), targets).item()
    step = begun(name, model, setup)
    for _ in range(30):
        take(name, model, batches, setup, step=step)
    assert F.cross_entropy(model(inputs), targets).item() < before


def test_l2rw_hands_over_the_optimizer_and_the_engine(model, batches, monkeypatch, setup):
    seen = {}

    def stub(model, batch, meta_batch, **keywords):
        from types import SimpleNamespace

        seen.update(keywords, batch=batch, meta_batch=meta_batch)
        return SimpleNamespace(weights=torch.ones(12) / 12, losses=torch.ones(12), meta_loss=torch.tensor(0.5))

    monkeypatch.setattr(metakern, "reweight_step", stub, raising=False)
    outcome = take("l2rw", model, batches, setup)
    assert seen["batch"] is batches[0]
    assert seen["meta_batch"] is batches[1]
    assert seen["engine"] == "auto"
    assert isinstance(seen["optimizer"], torch.optim.SGD)
    assert float(outcome.meta_loss) == 0.5


@pytest.mark.skipif(not hasattr(metakern, "reweight_step"), reason="metakern.l2rw_step is not there")
def test_l2rw_weights_by_hand(model, batches, setup):
    (inputs, targets), (meta_inputs, meta_targets) = batches
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(F.cross_entropy(model(meta_inputs), meta_targets), parameters)
    dots = []
    for n in range(12):
        gradient = torch.autograd.grad(F.cross_entropy(model(inputs[n : n + 1]), targets[n : n + 1]), parameters)
        dots.append(sum((a * b).sum() for a, b in zip(gradient, wanted, strict=True)))
    clipped = torch.stack(dots).clamp(min=0)
    torch.testing.assert_close(take("l2rw", model, batches, setup).weights, clipped / clipped.sum())


def test_unknown_method_lists_the_known():
    with pytest.raises(ValueError, match="unknown method 'l3rw'") as caught:
        find("l3rw")
    assert all(name in str(caught.value) for name in METHODS)


@pytest.mark.skipif(not hasattr(metakern, "mwnet_step"), reason="metakern.mwnet_step is not there")
@pytest.mark.parametrize("name", ["mw-net", "mw-net-imbalance"])
def test_mw_net_learns_a_weight_net_of_its_own_in_each_run(name, model, batches, setup):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    setting = Setting(torch.tensor([30, 70]), torch.Generator())
    (inputs, targets), _ = batches
    step = find(name).begin(setup(model))
    before = F.cross_entropy(model(inputs), targets).item()
    outcomes = [step(model, *batches, optimizer=optimizer, setting=setting) for _ in range(30)]
    assert F.cross_entropy(model(inputs), targets).item() < before
    assert all((outcome.weights > 0).all() for outcome in outcomes)
    mass = 12 * outcomes[0].weights.mean()
    assert float(mass) == pytest.approx(1) if name == "mw-net-imbalance" else 0.3 < float(mass) < 0.7
    states = []
    for begin_seed in (0, 0, 1):
        other = nn.Linear(6, 2).double()
        fresh = find(name).begin(setup(other, seed=begin_seed))
        nn.init.zeros_(other.weight)
        nn.init.zeros_(other.bias)
        plain = torch.optim.SGD(other.parameters(), 0.1)
        states.append(fresh(other, *batches, optimizer=plain, setting=setting).weights)
    assert torch.equal(states[0], states[1])
    if name == "mw-net":
        assert not torch.equal(states[0], states[2])
