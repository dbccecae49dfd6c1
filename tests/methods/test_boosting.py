import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.ensemble import AdaBoostClassifier
from sklearn.tree import DecisionTreeClassifier
from torch import nn

from metakern.data import Examples, Task
from metakern.methods.boosting import Vote, boosted_networks, boosted_stumps, samme_round
from metakern.methods.plain_training import train_plainly
from metakern.methods.self_training import confident, self_trained


def ring(n: int, first: int, seed: int) -> Examples:
    """Three classes by their distance from the origin: no stump and no linear network can do it alone."""
    inputs = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return Examples(inputs, (inputs.norm(dim=1) * 1.2).long().clamp(max=2), torch.arange(first, first + n))


@pytest.fixture
def task() -> Task:
    train, meta, test = ring(300, 0, 0), ring(30, 300, 1), ring(200, 330, 2)
    return Task("rings", train, meta, test, ("a", "b", "c"), train.targets)


def test_samme_by_hand():
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    vote, grown, last = samme_round(weights, torch.tensor([False, True, False, False]), 3)
    assert vote == pytest.approx(math.log(4) + math.log(2))  # err 1/5
    # 0.2 * 8 = 1.6 beside 0.8
    assert grown.tolist() == pytest.approx([0.1 / 2.4, 1.6 / 2.4, 0.3 / 2.4, 0.4 / 2.4])
    assert not last
    assert samme_round(weights, torch.zeros(4, dtype=torch.bool), 3).vote == 1
    assert samme_round(weights, torch.tensor([False, False, True, True]), 3)[::2] == (0.0, True)  # err 0.7 >= 2/3


def test_samme_is_scikit_learns(task):
    x, y = task.train.inputs.numpy(), task.train.targets.numpy()
    theirs = AdaBoostClassifier(DecisionTreeClassifier(max_depth=1), n_estimators=12, random_state=0).fit(x, y)
    weights = torch.full((len(y),), 1 / len(y), dtype=torch.float64)
    for stump, vote, error in zip(theirs.estimators_, theirs.estimator_weights_, theirs.estimator_errors_, strict=True):
        ours = DecisionTreeClassifier(max_depth=1, random_state=stump.random_state).fit(x, y, weights.numpy())
        wrong = torch.from_numpy(ours.predict(x) != y)
        assert float((weights * wrong).sum()) == pytest.approx(error)
        own, weights, _ = samme_round(weights, wrong, 3)
        assert own == pytest.approx(vote)


def test_vote_by_hand():
    class Says(nn.Module):
        def __init__(self, target: int) -> None:
            super().__init__()
            self.target = target

        def forward(self, inputs):
            return nn.functional.one_hot(torch.full((len(inputs),), self.target), 3).float()

    vote = Vote([Says(0), Says(2), Says(2)], [1.5, 1.0, 0.25], 3)
    assert vote(torch.zeros(2, 4)).tolist() == [[1.5, 0.0, 1.25]] * 2


def test_boosting_networks_beats_one(task, setup):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3))
    before = [parameter.clone() for parameter in model.parameters()]
    made = setup(model, task=task, steps=600, batch_size=50, lr=0.2)
    vote = boosted_networks(made)
    assert 1 < len(vote.networks) <= 5
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    accuracy = (vote(task.test.inputs).argmax(1) == task.test.targets).double().mean()
    alone = (vote.networks[0](task.test.inputs).argmax(1) == task.test.targets).double().mean()
    assert accuracy >= alone


def test_boosted_networks_keep_to_the_options_of_the_run(task, setup):
    """Augmentation, the learning-rate schedule, and a loss that must be finite."""
    model = nn.Linear(2, 3)
    seen, rates = [], []

    def augment(inputs, generator):
        seen.append(len(inputs))
        return inputs

    made = setup(model, task=task, steps=20, augment=augment, rate_factor=lambda k, steps: rates.append(k) or 0.0)
    vote = boosted_networks(made)
    rounds = len(vote.networks)
    assert seen == [12] * 4 * rounds
    assert rates == [0, 1, 2, 3] * rounds
    assert all(torch.equal(own.weight, model.weight) for own in vote.networks)  # at rate 0
    with pytest.raises(ValueError, match="step 1 of a plain network: its loss is not finite"):
        boosted_networks(setup(model, task=task, augment=lambda inputs, generator: inputs * math.inf))


def test_weighted_networks_by_hand(task, setup):
    model = nn.Linear(2, 3)
    weights = torch.linspace(0, 2, 300)
    trained = train_plainly(setup(model, task=task, batch_size=300), task.train, steps=1, weights=weights)
    losses = F.cross_entropy(model(task.train.inputs), task.train.targets, reduction="none")
    (gradient,) = torch.autograd.grad((weights * losses).sum() / 300, model.weight)
    torch.testing.assert_close(trained.weight, model.weight - 0.1 * gradient)


def test_stumps(task, setup):
    model = boosted_stumps(setup(nn.Linear(2, 3), task=task), rounds=50)
    logits = model(task.test.inputs)
    np.testing.assert_allclose(logits.exp().sum(1), 1, rtol=1e-5)
    assert (logits.argmax(1) == task.test.targets).double().mean() > 0.6
    tokens = Examples(torch.zeros(3, 2, dtype=torch.int64), torch.tensor([0, 1, 2]), torch.arange(3))
    with pytest.raises(ValueError, match="adaboost needs inputs that are numbers"):
        boosted_stumps(setup(nn.Linear(2, 3), task=Task("t", tokens, tokens, tokens, ("a", "b", "c"), tokens.targets)))


def test_stumps_know_classes_they_have_not_seen(task, setup):
    kept = task.train.take((task.train.targets != 1).nonzero().squeeze(1))
    two = Task("two", kept, task.meta, task.test, task.class_names, kept.targets)
    logits = boosted_stumps(setup(nn.Linear(2, 3), task=two), rounds=5)(task.test.inputs)
    assert logits.shape == (200, 3)
    assert (logits.argmax(1) != 1).all()


def test_confident_by_hand():
    rows, classes = confident(torch.tensor([[0.95, 0.05], [0.6, 0.4], [0.1, 0.9]]), 0.9)
    assert rows.tolist() == [0, 2]
    assert classes.tolist() == [0, 1]


def test_self_training_does_not_look_at_the_labels(setup):
    generator = torch.Generator().manual_seed(0)

    def examples(n: int) -> Examples:
        targets = torch.arange(n) % 2
        return Examples(
            torch.randn(n, 2, generator=generator) + (4 * targets - 2).unsqueeze(1), targets, torch.arange(n)
        )

    train, meta = examples(200), examples(4)
    wrong = Examples(train.inputs, 1 - train.targets, train.ids)
    task = Task("made-up", wrong, meta, train, ("a", "b"), train.targets)
    network = self_trained(setup(nn.Linear(2, 2), task=task, steps=200, lr=0.1))
    assert (network(train.inputs).argmax(1) == train.targets).double().mean() > 0.97
