"""Settings of methods by name: read, refused, and used by the step."""

import pytest
import torch
from torch import nn

import metakern
from metakern.methods import METHODS, Setting, find
from metakern.methods.settings import parse, settings_for, shown, with_settings
from metakern.step.direction import with_weight_decay
from metakern.testing import budget


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def setting_of(step: int, steps: int = 100) -> Setting:
    return Setting(torch.tensor([18, 18]), torch.Generator(), indices=torch.arange(12), step=step, steps=steps)


def test_parsed():
    assert parse("") == {}
    assert parse(" rule=floor , lr=5e-4,") == {"rule": "floor", "lr": "5e-4"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rule", "NAME=VALUE,NAME=VALUE, got 'rule'"),
        ("rule=", "got 'rule='"),
        ("lr=1,lr=2", "names 'lr' twice"),
        ("width=3", "l2rw has no setting 'width'; it has rule=clip_normalise,weight_decay=0.0"),
        ("weight_decay=much", "takes a value like 0.0, got 'much'"),
        ("preconditioned=1", "takes true or false, got '1'"),
        ("rule=cubic", "rule must be one of"),
        ("preconditioned=true,weight_decay=0.1", "two directions"),
    ],
)
def test_refused(text, message):
    with pytest.raises(ValueError, match=message):
        find("l2rw", text)


def test_a_method_without_settings():
    with pytest.raises(ValueError, match="uniform has no setting 'lr'; it has none"):
        find("uniform", "lr=1")


@pytest.mark.parametrize("method", [method for method in METHODS.values() if method.settings], ids=lambda m: m.name)
def test_every_setting_can_be_given_back(method):
    again = with_settings(method, shown(method))
    assert (again.name, again.summary, again.settings) == (method.name, method.summary, method.settings)
    assert settings_for(method, "nothing=1," + shown(method)) == shown(method)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("mw-net", "optimizer=lion", "must be adam or nesterov, got 'lion'"),
        ("cmw-net", "plain_share=1.5", "plain_share must be from 0 to 1, got 1.5"),
        ("cmw-net-sl", "every=0", "every must be at least 1, got 0"),
        ("curve-net", "probing=0", "probing above 0, got 5, 0.0"),
        ("mlrnet", "width=0", "width must be at least 1"),
        ("mlc", "gold_share=2", "gold_share must be from 0 to 1"),
        ("metabalance", "inner=mixed", "the pools of metabalance are raw, .*; got 'mixed'"),
    ],
)
def test_values_that_make_no_sense(name, text, message):
    with pytest.raises(ValueError, match=message):
        find(name, text)


def examples(given) -> tuple:
    task = given.task
    return (task.train.inputs[:12], task.train.targets[:12]), (task.meta.inputs, task.meta.targets)


def test_l2rw_with_another_rule_and_direction(model, setup):
    batch, meta = examples(setup(model))
    dots = metakern.grad_dots(model, batch, meta).dots
    along = metakern.reweight_step(model, batch, meta, rule="unclipped", direction=with_weight_decay(model, 0.5))
    model.zero_grad()
    idle = torch.optim.SGD(model.parameters(), 0.0)
    for text, expected in (("", dots / dots.abs().sum()), (",weight_decay=0.5", along.weights)):
        step = find("l2rw", "rule=unclipped" + text).begin(setup(model))
        outcome = step(model, batch, meta, optimizer=idle, setting=setting_of(0))
        budget.assert_within(outcome.weights, expected, 1.0, terms=1000)
    assert not torch.allclose(along.dots, dots)


def test_l2rw_preconditioned_and_balanced(model, setup):
    batch, meta = examples(setup(model))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    method = find("l2rw", "preconditioned=true,balanced_meta=true")
    step = method.begin(setup(model))
    for k in range(2):
        assert torch.isfinite(step(model, batch, meta, optimizer=optimizer, setting=setting_of(k)).weights).all()
    targets = torch.tensor([0] * 20 + [1] * 4)
    rows = next(method.meta_sampler(targets, 8, torch.Generator().manual_seed(0)))
    assert torch.bincount(targets[rows]).tolist() == [4, 4]


@pytest.mark.parametrize("name", ["mw-net", "mw-net-imbalance", "mlrnet"])
def test_a_weight_net_that_learns_every_third_step(model, setup, name):
    given = setup(model)
    step = find(name, "every=3,lr=0.01").begin(given)
    if name == "mlrnet":
        step.prepare()
    net = (step._step if name == "mlrnet" else step).weight_net
    batch, meta = examples(given)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    learned = []
    for k in range(5):
        before = [p.clone() for p in net.parameters()]
        outcome = step(model, batch, meta, optimizer=optimizer, setting=setting_of(k))
        learned.append(any(not torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True)))
        assert (outcome.meta_loss is not None) == learned[-1]
    assert learned == [True, False, False, True, False]


def test_metabalance_pools_and_batches_by_settings():
    method = find("metabalance", "inner=smote,outer=raw,inner_batch=8")
    assert method.batch_size == 81 * 8
    assert method.training_set is not METHODS["metabalance"].training_set
    assert find("metabalance", "order=1").settings == METHODS["metabalance-as-shipped"].settings
    assert find("metabalance-raw-undersample").settings.outer == "undersample"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("class-balanced", "beta=1", r"beta must be in \[0, 1\), got 1.0"),
        ("focal", "gamma=-1", "gamma must be 0 or more, got -1.0"),
        ("cdb", "tau=-1", "tau must be 0 or more, got -1.0"),
    ],
)
def test_values_of_class_weights_and_losses_are_checked(name, text, message):
    with pytest.raises(ValueError, match=message):
        find(name, text)


@pytest.mark.parametrize("name", ["class-balanced", "focal", "focal-detached", "focal-sigmoid", "cdb", "cdb-cifar"])
def test_settings_of_class_weights_and_losses_reach_the_step(name, model, setup):
    inputs, targets = torch.randn(12, 6).double(), torch.tensor([0] * 9 + [1] * 3)
    meta = 9 * torch.randn(40, 6).double(), torch.arange(40) % 2  # of which the model gets some of each class right
    setting = Setting(torch.tensor([27, 9]), torch.Generator())
    found = []
    for text in ("", {"class-balanced": "beta=0.9", "cdb": "tau=0.5", "cdb-cifar": "tau=0.5"}.get(name, "gamma=0.5")):
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        step = find(name, text).begin(setup(model))
        found.append(step(model, (inputs, targets), meta, optimizer=optimizer, setting=setting))
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert not torch.equal(found[0].weights, found[1].weights) or not torch.equal(found[0].losses, found[1].losses)


def test_the_class_balanced_focal_loss(model, setup):
    """Focal losses with the weights of class-balanced."""
    inputs, targets = torch.randn(12, 6).double(), torch.tensor([0] * 9 + [1] * 3)
    setting = Setting(torch.tensor([27, 9]), torch.Generator())

    def outcome(name, text):
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        return find(name, text).begin(setup(model))(
            model, (inputs, targets), (inputs, targets), optimizer=optimizer, setting=setting
        )

    both = outcome("focal", "gamma=1,beta=0.99")
    assert torch.equal(both.weights, outcome("class-balanced", "beta=0.99").weights)
    assert torch.equal(both.losses, outcome("focal", "gamma=1").losses)
