"""Methods with a noise channel: what they estimate, what they learn, and what a step descends."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakern.data import Examples, Task
from metakern.methods import Setting, find
from metakern.methods.noise_channel import forward_corrected_loss


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


@pytest.fixture
def noisy() -> Task:
    """Two classes far apart; 40 % of class 0 carry the label 1, class 1 keeps its labels."""
    generator = torch.Generator().manual_seed(3)

    def examples(n: int, first: int) -> Examples:
        targets = torch.arange(n) % 2
        inputs = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        inputs[:, 0] += 4.0 * (2 * targets - 1)
        return Examples(inputs, targets, torch.arange(first, first + n))

    clean, meta, test = examples(600, 0), examples(40, 600), examples(200, 640)
    flipped = (clean.targets == 0) & (torch.rand(600, generator=generator) < 0.4)
    train = Examples(clean.inputs, torch.where(flipped, 1, clean.targets), clean.ids)
    return Task("made-up", train, meta, test, ("a", "b"), clean.targets)


def take(name, model, task, setup, steps=300):
    method = find(name)
    task = method.training_set(task, 0)
    made = setup(model, task=task, steps=steps, batch_size=60, lr=0.2)
    step = method.begin(made)
    if hasattr(step, "prepare"):
        step.prepare()
    optimizer = made.make_optimizer(model)
    generator = torch.Generator().manual_seed(0)
    for k in range(steps):
        rows = torch.randperm(len(task.train), generator=generator)[:60]
        setting = Setting(task.train.counts(2), generator, indices=rows, step=k, steps=steps)
        batch = task.train.inputs[rows], task.train.targets[rows]
        step(model, batch, (task.meta.inputs, task.meta.targets), optimizer=optimizer, setting=setting)
    return step


TRUTH = torch.tensor([[0.6, 0.4], [0.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("name", ["glc", "confusion-correction", "forward-correction"])
def test_the_channel_is_estimated(name, model, noisy, setup):
    step = take(name, model, noisy, setup)
    # Predicted classes instead of probabilities: 60 % for label 0 become all of them.
    expected = torch.eye(2).double() if name == "confusion-correction" else TRUTH
    assert (step.channel - expected).abs().max() < 0.12


def test_correction_undoes_the_noise(model, noisy, setup):
    take("glc", model, noisy, setup)
    q = model(noisy.test.inputs).softmax(1)
    own = q.gather(1, noisy.test.targets.unsqueeze(1))
    assert own.mean() > 0.9  # a network fitted to the labels says 0.6 for class 0
    assert (q.argmax(1) == noisy.test.targets).double().mean() > 0.98


def test_top_down_turns_labels_into_classes(model, noisy, setup):
    step = take("top-down", model, noisy, setup)
    # Of the labels 1, 2 in 7 are class 0; a label 0 is certain.
    expected = torch.tensor([[1.0, 0.0], [2 / 7, 5 / 7]], dtype=torch.float64)
    assert (step.channel - expected).abs().max() < 0.1


@pytest.mark.parametrize("name", ["s-model", "s-model-conf", "noise-adaptation", "bottom-up"])
def test_learned_channels_move_and_networks_learn(name, model, noisy, setup):
    step = take(name, model, noisy, setup, steps=120)
    predicted = model(noisy.test.inputs).argmax(1)
    assert (predicted == noisy.test.targets).double().mean() > 0.95
    fresh = find(name).begin(setup(model, task=noisy))
    fresh.load_state_dict(step.state_dict())
    for ours, theirs in zip(fresh.channel.parameters(), step.channel.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    start = find(name).begin(setup(model, task=noisy))
    assert any(
        not torch.equal(ours, theirs)
        for ours, theirs in zip(start.channel.parameters(), step.channel.parameters(), strict=True)
    )


def test_bottom_up_stays_stochastic(model, noisy, setup):
    channel = take("bottom-up", model, noisy, setup, steps=120).channel()
    torch.testing.assert_close(channel.sum(1), torch.ones(2).double())
    assert (channel >= 0).all()


def test_glc_step_descends_both_parts(model, noisy, setup):
    method = find("glc")
    task = method.training_set(noisy, 0)
    assert len(task.train) == 640
    assert torch.equal(task.train.targets[600:], noisy.meta.targets)
    step = method.begin(setup(model, task=task))
    step.channel = TRUTH
    rows = torch.tensor([0, 1, 600, 639])
    inputs, targets = task.train.inputs[rows], task.train.targets[rows]
    logits = model(inputs)
    plain = F.cross_entropy(logits, targets, reduction="none")
    corrected = forward_corrected_loss(logits, targets, TRUTH)
    expected = torch.cat([corrected[:2], plain[2:]])
    (expected.mean()).backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    setting = Setting(task.train.counts(2), torch.Generator(), indices=rows)
    outcome = step(model, (inputs, targets), (inputs, targets), optimizer=optimizer, setting=setting)
    torch.testing.assert_close(outcome.losses, expected.detach())
    for parameter, old, gradient in zip(model.parameters(), before, wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), old - gradient)


def test_a_channel_learns_at_the_runs_present_rate(model, noisy, setup):
    step = find("s-model").begin(setup(model, task=noisy, lr=0.2))
    optimizer = torch.optim.SGD(model.parameters(), 0.02)  # which the run has lowered
    batch = noisy.train.inputs[:20], noisy.train.targets[:20]
    before = step.channel.logits.detach().clone()
    step(model, batch, batch, optimizer=optimizer, setting=Setting(torch.tensor([1, 1]), torch.Generator()))
    moved = step.channel.logits.detach() - before
    torch.testing.assert_close(moved, -0.02 * step.channel.logits.grad)
