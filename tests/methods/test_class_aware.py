"""CMW-Net: groups and meta set by hand, when its weight net learns, and the soft labels of its SL variant."""

import copy

import pytest
import torch
from torch import nn

from metakern.data import Examples, Task
from metakern.methods import Setting, find
from metakern.methods.class_aware_meta_weight_net import ClassAwareWeightNet, balanced_rows, class_groups
from metakern.methods.loss_curves import example_losses, lowest_losses
from metakern.methods.soft_class_aware_meta_weight_net import SoftLabels, SoftSettings, mixed


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def setting_of(step: int, steps: int = 100) -> Setting:
    return Setting(torch.tensor([18, 18]), torch.Generator(), indices=torch.arange(12), step=step, steps=steps)


def test_groups_of_classes_by_hand():
    assert class_groups(torch.tensor([1000, 12, 480, 950, 500, 10])).tolist() == [2, 0, 1, 2, 1, 0]
    assert class_groups(torch.tensor([7, 7, 7])).tolist() == [0, 0, 0]


def test_a_group_has_an_output_of_its_own():
    net = ClassAwareWeightNet(3)
    losses, groups = torch.rand(5, 1), torch.tensor([2, 0, 1, 1, 2])
    every = torch.sigmoid(net.layers[2](torch.relu(net.layers[0](losses))))
    torch.testing.assert_close(net(losses, groups).squeeze(1), every[torch.arange(5), groups])


def test_balanced_rows_have_equally_many_of_every_class():
    targets = torch.tensor([0] * 9 + [1] * 3 + [3] * 5)
    rows = balanced_rows(targets, torch.Generator().manual_seed(0))
    assert torch.bincount(targets[rows]).tolist() == [3, 3, 0, 3]
    assert len(rows.unique()) == 9


def test_the_weight_net_learns_in_the_last_fifth_on_the_training_set(model, setup):
    given = setup(model, steps=100)
    step = find("cmw-net").begin(given)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = given.task.train.inputs[:12], given.task.train.targets[:12]
    nowhere = torch.full((4, 6), torch.nan).double(), torch.zeros(4, dtype=torch.int64)  # the meta set is not read
    before = copy.deepcopy(step._step.weight_net.state_dict())
    plain = step(model, batch, nowhere, optimizer=optimizer, setting=setting_of(79))
    assert plain.weights.tolist() == [1 / 12] * 12
    assert all(torch.equal(value, before[name]) for name, value in step._step.weight_net.state_dict().items())
    learned = step(model, batch, nowhere, optimizer=optimizer, setting=setting_of(80))
    assert float(learned.weights.sum()) == pytest.approx(1)
    assert torch.isfinite(learned.meta_loss)
    assert any(not torch.equal(value, before[name]) for name, value in step._step.weight_net.state_dict().items())


def test_soft_labels_by_hand():
    net = ClassAwareWeightNet(1)
    labels, pseudo, order = torch.tensor([0, 1]), torch.tensor([[0.7, 0.3], [0.4, 0.6]]), torch.tensor([1, 0])
    losses, groups = torch.tensor([[0.5], [2.0]]), torch.zeros(2, dtype=torch.int64)
    (first,), (second,) = net(losses, groups)
    of_first = first * torch.tensor([1.0, 0.0]) + (1 - first) * pseudo[0]
    of_second = second * torch.tensor([0.0, 1.0]) + (1 - second) * pseudo[1]
    expected = torch.stack([0.8 * of_first + 0.2 * of_second, 0.8 * of_second + 0.2 * of_first])
    found = SoftLabels(net)(labels, losses, groups, pseudo, order, 0.8)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(1), torch.ones(2))


def test_mixed_inputs():
    inputs = torch.rand(5, 3)
    mixture = mixed(inputs, torch.Generator().manual_seed(1))
    expected = mixture.share * inputs + (1 - mixture.share) * inputs[mixture.order]
    assert 0.5 <= mixture.share < 1
    torch.testing.assert_close(mixture.inputs, expected)


def test_the_soft_variant_learns_every_tenth_step_and_has_a_slow_teacher(model, setup):
    given = setup(model, steps=100)
    step = find("cmw-net-sl").begin(given)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = given.task.train.inputs[:12], given.task.train.targets[:12]
    changed = []
    decay = SoftSettings().teacher_decay
    for k in (0, 10, 11):
        net = copy.deepcopy(step._labels.state_dict())
        slow, fast = step._teacher[0].weight.clone(), None
        outcome = step(model, batch, batch, optimizer=optimizer, setting=setting_of(k))
        fast = model[0].weight.detach()
        torch.testing.assert_close(step._teacher[0].weight, decay * slow + (1 - decay) * fast)
        changed.append(any(not torch.equal(value, net[name]) for name, value in step._labels.state_dict().items()))
        assert (outcome.meta_loss is not None) == changed[-1]
        assert ((outcome.weights >= 0) & (outcome.weights <= 1 / 12)).all()
    assert changed == [False, True, False]
    assert not any(module._forward_hooks for module in model.modules())


def test_the_lowest_losses_of_each_class(model, setup):
    train = setup(model).task.train
    losses = example_losses(model, train)
    rows = lowest_losses(model, train, 5)
    assert torch.bincount(train.targets[rows]).tolist() == [5, 5]
    for c in (0, 1):
        own, chosen = losses[train.targets == c], losses[rows[train.targets[rows] == c]]
        assert torch.equal(chosen, own.sort().values[:5])
    half = int(torch.bincount(train.targets).min()) // 2
    assert torch.bincount(train.targets[lowest_losses(model, train, 100)]).tolist() == [half, half]


def test_for_noisy_labels_the_meta_set_is_of_low_loss_after_a_warm_up(model, setup):
    """Drawn at random, as for long tails, it would have as many wrong labels as the training set."""
    given = setup(model, steps=90, lr=0.5)
    step, train = find("cmw-net-noise").begin(given), given.task.train
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    batch = train.inputs[:12], train.targets[:12]
    before = copy.deepcopy(step._step.weight_net.state_dict())
    changed = []
    for k in range(11):
        chosen = lowest_losses(model, train, 10)
        outcome = step(model, batch, batch, optimizer=optimizer, setting=setting_of(k, 90))
        assert (outcome.weights.tolist() == [1 / 12] * 12) == (k < 3)  # 90 / 30 plain steps
        if k in (3, 6):  # the first step with weights, and the first of an epoch
            assert step._subset.tolist() == chosen.tolist()
        changed.append(any(not torch.equal(v, before[name]) for name, v in step._step.weight_net.state_dict().items()))
    assert changed == [False] * 10 + [True]


def test_tokens_cannot_be_mixed(setup):
    tokens = Examples(torch.ones(4, 3, dtype=torch.int64), torch.tensor([0, 1, 0, 1]), torch.arange(4))
    task = Task("text", tokens, tokens, tokens, ("a", "b"), tokens.targets)
    with pytest.raises(ValueError, match="tokens cannot be; cmw-net takes them"):
        find("cmw-net-sl").begin(setup(nn.Linear(3, 2), task=task))
