"""Methods that learn from loss curves: curves by hand, MLRNet's meta-gradient by double backward, CurveNet's memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from metakern.methods import Setting, find
from metakern.methods.curve_net import CurveNet, CurveSettings, probing_epochs, probing_phases
from metakern.methods.features import features
from metakern.methods.loss_curves import Phase, class_centred, example_losses, probe
from metakern.methods.mlrnet import MLRNet
from metakern.methods.weight_net_step import virtual_rule

ROWS = torch.arange(12) * 3


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def begun(name: str, given):
    """A prepared step of the method with a weight net in float64, and its setting and batches."""
    step = find(name).begin(given)
    step._step.weight_net.double()
    step.prepare()
    task = given.task
    batch = task.train.inputs[ROWS], task.train.targets[ROWS]
    setting = Setting(torch.tensor([18, 18]), torch.Generator(), indices=ROWS, steps=10)
    return step, setting, batch, (task.meta.inputs, task.meta.targets)


def test_class_centred_by_hand():
    curves = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 5.0]])
    found = class_centred(curves, torch.tensor([0, 0, 2]), 3)
    assert found.tolist() == [[-1, -1], [1, 1], [0, 0]]


def test_probing_records_every_epoch_of_every_phase(model, setup):
    given = setup(model)
    rates = []

    def rate(epoch):
        rates.append(epoch)
        return 0.0 if epoch == 1 else 1.0

    curves = probe(given, [Phase(2, 12), Phase(2, 6, rate)])
    assert curves.shape == (36, 4)
    assert rates == [0] * 6 + [1] * 6
    # An epoch at rate 0 changes nothing.
    assert torch.equal(curves[:, 2], curves[:, 3])
    assert not torch.equal(curves[:, 1], curves[:, 2])
    torch.testing.assert_close(
        example_losses(model, given.task.train).mean() > curves[:, -1].mean(), torch.tensor(True)
    )


def test_mlrnet_has_the_papers_sizes():
    net = MLRNet(11, 768, 4)
    assert [tuple(p.shape) for name, p in net.named_parameters() if "weight" in name] == [
        *((4, 128), (128, 11), (128, 128), (128, 128)),
        *((128, 896), (128, 128)),
        *((128, 128), (128, 128), (128, 128), (1, 128)),
    ]


def test_mlrnets_meta_gradient_is_double_backwards(model, setup):
    given = setup(model, lr=0.3)
    step, setting, (inputs, targets), (meta_inputs, meta_targets) = begun("mlrnet", given)
    # Three epochs of 36 examples fit into ten steps of 12.
    assert step.curves.shape == (36, 1 + 3)
    torch.testing.assert_close(step.curves[given.task.train.targets == 0].sum(0), torch.zeros(4).double())
    net, seen = copy.deepcopy(step._step.weight_net), features(model, inputs)
    losses = F.cross_entropy(model(inputs), targets, reduction="none")
    weighted = (net(losses.detach().unsqueeze(1), step.curves[ROWS], seen, targets).squeeze(1) * losses).mean()
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(weighted, parameters, create_graph=True)
    moved = {name: p - 0.3 * g for name, p, g in zip(names, parameters, gradients, strict=True)}
    meta_loss = F.cross_entropy(functional_call(model, moved, meta_inputs), meta_targets)
    expected = torch.autograd.grad(meta_loss, list(net.parameters()))
    plain = copy.deepcopy(model)
    outcome = step(
        model,
        (inputs, targets),
        (meta_inputs, meta_targets),
        optimizer=torch.optim.SGD(model.parameters(), 0.3),
        setting=setting,
    )
    for p, gradient in zip(step._step.weight_net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(outcome.meta_loss, meta_loss.detach())
    new = step._step.weight_net(losses.detach().unsqueeze(1), step.curves[ROWS], seen, targets).squeeze(1)
    torch.testing.assert_close(outcome.weights, new.detach() / 12)
    (outcome.weights * F.cross_entropy(plain(inputs), targets, reduction="none")).sum().backward()
    torch.optim.SGD(plain.parameters(), 0.3).step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_mlrnet_with_the_optimizers_own_virtual_step(model, setup, kind):
    outcomes = []
    for name in ("mlrnet", "mlrnet-own-step"):
        own = copy.deepcopy(model)
        step, setting, batch, meta_batch = begun(name, setup(own))
        optimizer = kind(own.parameters(), 0.1)
        outcomes.append([step(own, batch, meta_batch, optimizer=optimizer, setting=setting) for _ in range(2)][1])
    assert (outcomes[0].meta_loss == outcomes[1].meta_loss) == (kind is torch.optim.SGD)


def test_curve_net_begins_near_one_and_knows_the_label():
    torch.manual_seed(0)
    net = CurveNet(7, 3)
    weights = net(torch.zeros(6, 1), torch.zeros(6, 7), torch.arange(6) % 3)
    assert weights.shape == (6, 1)
    assert ((weights > 0.9) & (weights < 1.02)).all()
    torch.testing.assert_close(weights[:3], weights[3:])


def test_curve_net_begins_with_a_label_that_does_not_drown_the_curve():
    """By the rule of its code: the embedding is uniform within Xavier's bound."""
    torch.manual_seed(0)
    net = CurveNet(295, 10).requires_grad_(False)
    assert float(net.labels.weight.abs().max()) <= (6 / 74) ** 0.5
    assert float(net.curve(torch.randn(64, 295)).std()) > 0.3 * float(2 * net.labels.weight.std())


def test_probing_phases_of_the_paper():
    first, late = probing_phases(300, 128)
    assert (first.epochs, first.batch_size, late.epochs, late.batch_size) == (120, 128, 180, 16)
    assert first.rate(0) == first.rate(119) == 1
    assert [late.rate(epoch) for epoch in (0, 14, 15, 29, 30)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.1])


def test_probing_leaves_out_the_papers_first_epochs_or_a_quarter():
    settings = CurveSettings()
    assert probing_epochs(settings, 200) == (300, 5)
    assert [probing_epochs(settings, run) for run in (13.4, 6.1, 1.3, 0.1)] == [(20, 5), (9, 2), (4, 1), (4, 1)]
    assert probing_epochs(CurveSettings(first_epoch=0), 1) == (4, 0)


def test_a_short_run_has_curves_of_several_epochs(model, setup):
    step, *_ = begun("curve-net", setup(model, steps=2))
    assert step.curves.shape == (36, 3)
    assert (step.curves.std(1) > 0).all()


def test_curve_nets_memory_takes_over(model, setup):
    given = setup(model)
    step, _, _, meta_batch = begun("curve-net", given)
    step._step.weight_net.float()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    def take(k, rows=ROWS):
        own = given.task.train.inputs[rows], given.task.train.targets[rows]
        setting = Setting(torch.tensor([18, 18]), torch.Generator(), indices=rows, step=k, steps=10)
        return step(model, own, meta_batch, optimizer=optimizer, setting=setting)

    learned = take(3).weights
    before = copy.deepcopy(step._step.weight_net.state_dict())
    remembered = take(4)
    assert remembered.meta_loss is None
    torch.testing.assert_close(remembered.weights, learned.to(remembered.weights), rtol=1e-6, atol=0)
    fresh = take(5, ROWS + 1).weights  # never came up while the net learned
    assert ((fresh > 0.9 / 12) & (fresh < 1.02 / 12)).all()
    assert all(torch.equal(value, before[name]) for name, value in step._step.weight_net.state_dict().items())


def test_virtual_rule_is_the_optimizers():
    parameters = [nn.Parameter(torch.zeros(1))]
    assert virtual_rule(torch.optim.SGD(parameters, 0.1)) == "sgd"
    assert virtual_rule(torch.optim.SGD(parameters, 0.1, momentum=0.9)) == "momentum"
    assert virtual_rule(torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True)) == "nesterov"
    assert virtual_rule(torch.optim.AdamW(parameters, 0.1)) == "adam_frozen"
