"""MLC: the meta-gradient against double backward, the division of gold data, five steps for one, labels proposed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakern.methods import Setting, find
from metakern.methods.meta_label_correction import CorrectionSettings, CorrectionStep, divided, label_net
from metakern.testing import budget


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def begun(setup, model, **settings) -> CorrectionStep:
    step = CorrectionStep(setup(model), CorrectionSettings(**settings))
    step.label_net.double()
    return step


def setting_of(step: int = 0) -> Setting:
    return Setting(torch.tensor([18, 18]), torch.Generator(), step=step, steps=10)


def batches(setup, model):
    task = setup(model).task
    return (task.train.inputs[:12], task.train.targets[:12]), (task.meta.inputs, task.meta.targets)


def by_double_backward(model, net, batch, meta, clean, lr: float):
    """Gradient of the label net through the whole virtual step, and the parameters after it."""
    names = [name for name, _ in model.named_parameters()]
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    hidden = torch.tanh(F.linear(batch[0], parameters[0], parameters[1]))
    labels = net(batch[1], hidden.detach())
    losses = [-(labels * torch.log_softmax(F.linear(hidden, parameters[2], parameters[3]), 1)).sum(1)]
    if clean is not None:
        logits = torch.func.functional_call(model, dict(zip(names, parameters)), clean[0])
        losses.append(F.cross_entropy(logits, clean[1], reduction="none"))
    gradient = torch.autograd.grad(torch.cat(losses).mean(), parameters, create_graph=True)
    moved = [p - lr * g for p, g in zip(parameters, gradient)]
    logits = torch.func.functional_call(model, dict(zip(names, moved)), meta[0])
    return torch.autograd.grad(F.cross_entropy(logits, meta[1]), list(net.parameters())), moved


@pytest.mark.parametrize("gold_share", [0.0, 0.5])
def test_the_step_of_the_code(model, setup, gold_share):
    step = begun(setup, model, gold_share=gold_share)
    batch, gold = batches(setup, model)
    cut = 6 if gold_share == 0 else 3
    meta, clean = (gold[0][:cut], gold[1][:cut]), (gold[0][cut:], gold[1][cut:]) if gold_share else None
    expected, moved = by_double_backward(model, copy.deepcopy(step.label_net), batch, meta, clean, 0.1)
    hidden = torch.tanh(model[0](batch[0])).detach()
    with torch.no_grad():
        kept = step.label_net(batch[1], hidden).gather(1, batch[1].unsqueeze(1)).squeeze(1) / 12
    outcome = step(model, batch, gold, optimizer=torch.optim.SGD(model.parameters(), 0.1), setting=setting_of())
    for p, g in zip(step.label_net.parameters(), expected):
        budget.assert_within(p.grad, g, max(float(g.abs().max()), 1e-3), terms=1000)
    for p, want in zip(model.parameters(), moved):
        budget.assert_within(p.detach(), want.detach(), 1.0, terms=1000)
    budget.assert_within(outcome.weights, kept, 1.0, terms=1000)


def test_new_labels_are_those_after_the_step_of_the_label_net(model, setup):
    before = copy.deepcopy(model)
    step = begun(setup, model, gold_share=0.0, fused=False)
    batch, gold = batches(setup, model)
    step(model, batch, gold, optimizer=torch.optim.SGD(model.parameters(), 0.1), setting=setting_of())
    hidden = torch.tanh(before[0](batch[0])).detach()
    with torch.no_grad():
        labels = step.label_net(batch[1], hidden)
    F.cross_entropy(before(batch[0]), labels).backward()
    for p, old in zip(model.parameters(), before.parameters()):
        budget.assert_within(p.detach(), (old - 0.1 * old.grad).detach(), 1.0, terms=1000)


def test_every_fifth_step_and_the_carry_is_part_of_the_state(model, setup):
    step = begun(setup, model, every=5, skip=True)
    batch, gold = batches(setup, model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    changed = []
    for k in range(6):
        before = copy.deepcopy(step.label_net.state_dict())
        if k == 3:
            state, twin_model = copy.deepcopy(step.state_dict()), copy.deepcopy(model)
            held = copy.deepcopy(optimizer.state_dict())
        step(model, batch, gold, optimizer=optimizer, setting=setting_of(k))
        after = step.label_net.state_dict()
        changed.append(any(not torch.equal(value, before[name]) for name, value in after.items()))
        if k == 4:
            at_five = copy.deepcopy(after)
    assert changed == [False, False, False, False, True, False]

    twin = begun(setup, twin_model, every=5, skip=True)
    twin.load_state_dict(state)
    twin_optimizer = torch.optim.SGD(twin_model.parameters(), 0.1, momentum=0.9)
    twin_optimizer.load_state_dict(held)
    for k in (3, 4):
        twin(twin_model, batch, gold, optimizer=twin_optimizer, setting=setting_of(k))
    for name, value in twin.label_net.state_dict().items():
        assert torch.equal(value, at_five[name]), name


def test_corrected_labels_are_the_label_net_on_every_training_example(model, setup):
    step = begun(setup, model)
    train = setup(model).task.train
    with torch.no_grad():
        expected = step.label_net(train.targets, torch.tanh(model[0](train.inputs)))
    torch.testing.assert_close(step.corrected_labels(model), expected)


def test_initial_values():
    net = label_net(3, 5)
    assert not any(layer.bias.any() for layer in net.layers if isinstance(layer, nn.Linear))
    assert net.embedding.weight.abs().max() <= (6 / (3 + 128)) ** 0.5


def test_division_of_gold_data():
    gold = torch.arange(5), torch.arange(5)
    (meta, _), clean = divided(gold, 0.5)
    assert meta.tolist() == [0, 1]
    assert clean[1].tolist() == [2, 3, 4]
    assert divided(gold, 0.0) == (gold, None)
    with pytest.raises(ValueError, match="1 cannot be divided so; give more by --meta-batch-size"):
        divided((torch.zeros(1), torch.zeros(1)), 0.5)


@pytest.mark.parametrize("name", ["mlc", "mlc-gold-apart", "mlc-new-labels", "mlc-skip"])
def test_registered(name, model, setup):
    step = find(name).begin(setup(model))
    batch, gold = batches(setup, model)
    outcome = step(model, batch, gold, optimizer=torch.optim.Adam(model.parameters()), setting=setting_of())
    assert torch.isfinite(outcome.losses).all()
    assert not any(module._forward_pre_hooks for module in model.modules())
