import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metakern
from metakern.methods.features import features, kept_features, last_linear
from metakern.methods.plain_training import predict, train_plainly


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 2)).double()


def test_features_are_what_the_last_linear_layer_reads(model):
    inputs = torch.randn(7, 6, dtype=torch.float64)
    found = features(model, inputs, batch_size=3)
    torch.testing.assert_close(found, torch.tanh(model[0](inputs)).detach())
    assert model.training
    assert not found.requires_grad
    model.eval()
    torch.testing.assert_close(predict(model, inputs, batch_size=3), model[3](found))


def test_a_weight_net_sees_the_features_of_the_steps_own_forward_pass(model):
    seen = []

    class Net(nn.Linear):
        def forward(self, losses, given):
            seen.append(given)
            return super().forward(given)

    batch = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    model.eval()
    with kept_features(model) as kept:
        metakern.mwnet_step(
            model, Net(8, 1).double(), batch, batch, weight_optimizer=None, virtual_lr=0.1, features=kept
        )
    assert all(torch.equal(given, features(model, batch[0])) for given in seen)
    assert not last_linear(model)._forward_pre_hooks


def test_no_linear_layer_is_said():
    with pytest.raises(ValueError, match=r"Conv1d has no nn\.Linear"):
        last_linear(nn.Conv1d(1, 1, 1))


def test_plain_training_leaves_the_model_alone_and_follows_the_seed(model, setup):
    before = copy.deepcopy(model)
    given = setup(model)
    calls = []
    model.eval()
    first, again = (
        train_plainly(given, given.task.train, steps=9, after_step=lambda k, network: calls.append(k)) for _ in range(2)
    )
    assert calls == [*range(1, 10)] * 2
    for ours, other, was, untouched in zip(*(m.parameters() for m in (first, again, before, model)), strict=True):
        assert torch.equal(ours, other)
        assert torch.equal(was, untouched)
        assert not torch.equal(ours, was)
    inputs, targets = given.task.train.inputs, given.task.train.targets
    assert F.cross_entropy(first(inputs), targets) < F.cross_entropy(model(inputs), targets)


def test_a_network_on_the_way_has_the_runs_course_and_augmentation(model, setup):
    rates, seen = [], []

    def make_optimizer(network):
        optimizer = torch.optim.SGD(network.parameters(), 0.1)
        optimizer.register_step_pre_hook(lambda own, *_: rates.append(own.param_groups[0]["lr"]))
        return optimizer

    def augment(inputs, generator):
        seen.append(len(inputs))
        return inputs

    given = setup(
        model, make_optimizer=make_optimizer, augment=augment, rate_factor=lambda step, steps: 1 - step / steps
    )
    train_plainly(given, given.task.train, steps=4)
    assert rates == [0.1, 0.75 * 0.1, 0.05, 0.25 * 0.1]
    assert seen == [12] * 4


def test_a_network_on_the_way_that_diverges_says_in_which_step(model, setup):
    given = setup(model, lr=float("inf"))
    with pytest.raises(ValueError, match="step 2 of a plain network: its loss is not finite"):
        train_plainly(given, given.task.train, steps=9)
    network = train_plainly(given, given.task.train, steps=1)
    with pytest.raises(ValueError, match="the prediction of 36 of 36 examples is not finite"):
        predict(network, given.task.train.inputs)


def test_predictions_leave_each_module_in_its_mode():
    """As of a network with a frozen normalisation."""
    network = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3).eval(), nn.Linear(3, 2))
    predict(network, torch.randn(5, 4))
    assert [module.training for module in network.modules()] == [True, True, False, True]
