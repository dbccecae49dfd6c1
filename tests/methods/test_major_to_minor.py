from dataclasses import replace

import pytest
import torch
from torch import nn

from metakern.data import Examples, Task
from metakern.methods import Setting, find, major_to_minor
from metakern.methods.major_to_minor import TranslationStep, descend, seed_chances


def test_seed_chances_by_hand():
    chances = seed_chances(torch.tensor([100, 10, 50]), 2, beta=0.9)
    assert chances.tolist() == pytest.approx([1 - 0.9**50, 0, 0])


def test_descent_by_hand():
    """Linear networks: the direction is the same at every step, and its length is the step's."""
    guide, model = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        guide.weight.copy_(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
        model.weight.zero_()
    start = torch.tensor([[0.5, 0.5]])
    x = descend(start, torch.tensor([0]), torch.tensor([1]), guide, model, (-9, 9), steps=3)
    torch.testing.assert_close(x, start + 0.3 * torch.tensor([[0.6, 0.8]]))
    clipped = descend(start, torch.tensor([0]), torch.tensor([1]), guide, model, (0, 0.6), steps=3)
    torch.testing.assert_close(clipped, torch.tensor([[0.6, 0.6]]))
    with torch.no_grad():
        model.weight[0, 0] = 1e6  # away from where the model sees the seed's class
    away = descend(start, torch.tensor([0]), torch.tensor([1]), guide, model, (-9, 9), steps=1)
    torch.testing.assert_close(away, torch.tensor([[0.4, 0.5]]))


@pytest.fixture
def task() -> Task:
    generator = torch.Generator().manual_seed(0)
    targets = (torch.arange(220) < 20).long()
    inputs = torch.randn(220, 2, generator=generator) / 8 + (0.6 * targets - 0.3).unsqueeze(1)
    train = Examples(inputs, targets, torch.arange(220))
    return Task("made-up", train, train, train, ("many", "few"), targets)


def test_only_rare_examples_are_replaced_and_they_convince(task, setup):
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    step = TranslationStep(setup(model, task=task, steps=400, lr=2.0))
    step.prepare()
    targets = torch.tensor([0] * 30 + [1] * 200)
    inputs = torch.cat([task.train.inputs[20:50], *[task.train.inputs[:20]] * 10])
    setting = Setting(task.train.counts(2), torch.Generator().manual_seed(0), step=99, steps=100)
    made = step.translated(model, inputs, targets, setting)
    changed = (made != inputs).any(1)
    assert not changed[:30].any()
    assert 0 < int(changed.sum()) < 100
    assert (step.guide(made[changed]).softmax(1)[:, 1] >= 0.9).all()
    other = find("m2m").begin(setup(model, task=task))
    other.load_state_dict(step.state_dict())
    assert torch.equal(other.guide.weight, step.guide.weight)
    assert model.weight.requires_grad


@pytest.fixture
def far(task) -> Task:
    """The classes so far apart that no example gets across."""
    inputs = task.train.inputs + 50 * task.train.targets.unsqueeze(1)
    return replace(task, train=replace(task.train, inputs=inputs))


def last_step(step: TranslationStep, model: nn.Module, task: Task) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    setting = Setting(task.train.counts(2), torch.Generator().manual_seed(0), step=99, steps=100)
    batch = task.train.inputs[:40], task.train.targets[:40]
    step(model, batch, batch, optimizer=optimizer, setting=setting)


def test_a_run_that_kept_no_made_example_says_so(far, setup):
    model = nn.Linear(2, 2)
    step = TranslationStep(setup(model, task=far, steps=50, lr=0.1))
    step.prepare()
    with pytest.warns(UserWarning, match=r"m2m: the guide took none of the \d+ examples"):
        last_step(step, model, far)
    # Of a run that goes on from a checkpoint the whole counts.
    other = TranslationStep(setup(model, task=far))
    other.load_state_dict({**step.state_dict(), "kept": 1})
    last_step(other, model, far)


@pytest.mark.filterwarnings("ignore:m2m")
def test_lengths_are_for_pictures_from_0_to_1(task, setup, monkeypatch):
    """Normalised pictures are moved as far as the same pictures in 0..1; a standardised table as it is."""
    moved = []
    monkeypatch.setattr(major_to_minor, "descend", lambda start, *rest, size, **_: moved.append(size) or start)
    pictures = replace(task.train, inputs=task.train.inputs.view(220, 1, 1, 2))
    wide = replace(pictures, inputs=4 * (pictures.inputs - pictures.inputs.min()) / pictures.inputs.max() - 2)
    wide.inputs.clamp_(-2, 2)[0] = 2
    for train, model in ((task.train, nn.Linear(2, 2)), (wide, nn.Sequential(nn.Flatten(), nn.Linear(2, 2)))):
        given = replace(task, train=train)
        step = TranslationStep(setup(model, task=given))
        last_step(step, model, given)
    assert moved == pytest.approx([0.1, 0.4])


def test_tokens_are_refused(task, setup):
    tokens = Examples(torch.zeros(4, 3, dtype=torch.int64), torch.tensor([0, 1, 0, 1]), torch.arange(4))
    with pytest.raises(ValueError, match="m2m needs inputs that are numbers"):
        find("m2m").begin(setup(nn.Linear(2, 2), task=Task("t", tokens, tokens, tokens, ("a", "b"), tokens.targets)))
