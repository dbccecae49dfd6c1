import pytest
import torch
from torch import nn

from metakern.methods import Setting, find
from metakern.methods.mentor import MentorNet, Percentile, made_up_lessons, predefined_curriculum, taught


def test_curriculum_by_hand():
    differences = torch.tensor([-1.0, 0.0, 0.5, 2.0])
    assert predefined_curriculum(differences).tolist() == [1, 1, 0.5, 0]
    assert predefined_curriculum(differences, width=0).tolist() == [1, 1, 0, 0]


def test_percentile_by_hand():
    running = Percentile(share=0.5, decay=0.9)
    assert running.differences(torch.tensor([1.0, 2.0, 3.0])).tolist() == [-1, 0, 1]
    running.differences(torch.tensor([12.0]))
    assert running.value == pytest.approx(0.9 * 2 + 0.1 * 12)


def test_a_taught_mentor_knows_the_curriculum():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    mentor = taught(MentorNet(), made_up_lessons(generator), steps=500)
    *seen, wanted = next(made_up_lessons(generator))
    said = mentor(*seen).sigmoid()
    assert (said - wanted).abs().mean() < 0.06
    # Everything about an example but its loss may be unknown to the curriculum: the epoch changes little.
    assert mentor.epoch.weight.grad is None


@pytest.mark.parametrize("name", ["mentornet-pd", "mentornet-dd"])
def test_large_losses_count_less_after_the_burn_in(name, setup):
    torch.manual_seed(0)
    model = nn.Linear(6, 2).double()
    made = setup(model, steps=300)
    step = find(name).begin(made)
    step.prepare()
    batch = made.task.train.inputs, made.task.train.targets
    counts, optimizer = made.task.train.counts(2), made.make_optimizer(model)
    outcomes = [
        step(model, batch, batch, optimizer=optimizer, setting=Setting(counts, torch.Generator(), step=k, steps=300))
        for k in range(300)
    ]
    assert torch.equal(outcomes[59].weights, torch.full((36,), 1 / 36, dtype=torch.float64))
    weights, wrong = outcomes[-1].weights, made.task.train.targets != made.task.clean_targets
    assert weights[wrong].mean() < weights[~wrong].mean()
    other = find(name).begin(made)
    other.load_state_dict(step.state_dict())
    last = Setting(counts, torch.Generator(), step=299, steps=300)
    torch.testing.assert_close(other.trust(outcomes[-1].losses, last), step.trust(outcomes[-1].losses, last))
