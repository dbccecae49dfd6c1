import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from metakern.methods import Setting, find
from metakern.methods.class_difficulty import difficulty_weights, dynamic_tau
from metakern.methods.class_weights import by_class, effective_number, inverse_frequency
from metakern.methods.ldam import deferred
from metakern.methods.self_paced import hard_weights, linear_weights, threshold

COUNTS = torch.tensor([1, 10, 100])


def test_inverse_frequency_is_scikit_learns():
    labels = torch.repeat_interleave(torch.arange(3), COUNTS).numpy()
    theirs = torch.from_numpy(compute_class_weight("balanced", classes=np.arange(3), y=labels))
    torch.testing.assert_close(inverse_frequency(COUNTS).double(), theirs * 3 / theirs.sum(), rtol=1e-6, atol=0)


def test_inverse_square_root_by_hand():
    raw = [1, 1 / math.sqrt(10), 0.1]
    assert inverse_frequency(COUNTS, power=0.5).tolist() == pytest.approx([3 * w / sum(raw) for w in raw])


@pytest.mark.parametrize("beta", [0.9, 0.999])
def test_effective_number_by_hand(beta):
    raw = [(1 - beta) / (1 - beta**n) for n in COUNTS.tolist()]
    assert effective_number(COUNTS, beta=beta).tolist() == pytest.approx([3 * w / sum(raw) for w in raw], rel=1e-6)


def test_effective_number_at_its_ends():
    assert effective_number(COUNTS, beta=0).tolist() == [1, 1, 1]
    near_one = effective_number(COUNTS, beta=1 - 1e-12)
    torch.testing.assert_close(near_one, inverse_frequency(COUNTS), rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"beta must be in \[0, 1\), got 1"):
        effective_number(COUNTS, beta=1)


@pytest.mark.parametrize("weights", [inverse_frequency, effective_number])
def test_absent_class_has_no_weight(weights):
    assert weights(torch.tensor([4, 0, 4])).tolist() == [1, 0, 1]


def test_batch_normalisation_is_cross_entropys():
    logits, targets, weights = torch.randn(7, 3), torch.tensor([0, 1, 2, 1, 1, 0, 2]), torch.tensor([0.2, 1.0, 3.0])
    losses = F.cross_entropy(logits, targets, reduction="none")
    expected = F.cross_entropy(logits, targets, weight=weights)
    torch.testing.assert_close((by_class(weights, targets) * losses).sum(), expected)


def test_difficulty_by_hand():
    accuracies = torch.tensor([0.9, 0.6])
    assert difficulty_weights(accuracies, 1.0).tolist() == pytest.approx([0.4, 1.6])
    assert difficulty_weights(accuracies, 2.0).tolist() == pytest.approx([2 / 17, 32 / 17], rel=1e-5)
    assert difficulty_weights(torch.ones(2), 1.5).tolist() == [1, 1]


def test_dynamic_tau_both_rules():
    accuracies = torch.tensor([0.9, 0.6])
    bias = 0.9 / 0.61
    assert dynamic_tau(accuracies).item() == pytest.approx(2 / (1 + math.exp(1 - bias)))
    assert dynamic_tau(accuracies, "cifar").item() == pytest.approx(1 / (1 + math.exp(-bias)))
    with pytest.raises(ValueError, match="imagenet, cifar, got 'mean'"):
        dynamic_tau(accuracies, "mean")


def test_cdb_weights_the_class_the_model_fails_on(setup):
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.zeros_(model.weight)  # every prediction is class 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batch = torch.randn(4, 2), torch.tensor([0, 0, 0, 1])
    meta = torch.randn(4, 2), torch.tensor([0, 0, 1, 1])
    setting = Setting(torch.tensor([3, 1]), torch.Generator())
    outcome = find("cdb").begin(setup(model))(model, batch, meta, optimizer=optimizer, setting=setting)
    assert outcome.weights.tolist() == [0, 0, 0, 1]


def test_deferred_reweighting_begins_at_four_fifths():
    losses, targets = torch.ones(4), torch.tensor([0, 1, 1, 1])
    early, late = (
        deferred(losses, targets, Setting(torch.tensor([10, 1000]), torch.Generator(), step=step, steps=100))
        for step in (79, 80)
    )
    assert early.tolist() == [0.25] * 4
    assert late[0] > 0.9


def test_deferred_reweighting_of_plain_training_and_margins_without_it(setup):
    """ce-drw has the weights of ldam-drw with the loss of uniform, ldam the losses of ldam-drw with equal weights."""
    batch = torch.randn(4, 2), torch.tensor([0, 1, 1, 1])
    found = {}
    for name in ("uniform", "ldam", "ldam-drw", "ce-drw"):
        torch.manual_seed(0)
        model = torch.nn.Linear(2, 2)
        setting = Setting(torch.tensor([10, 1000]), torch.Generator(), step=80, steps=100)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        found[name] = find(name).begin(setup(model))(model, batch, batch, optimizer=optimizer, setting=setting)
    assert torch.equal(found["ce-drw"].weights, found["ldam-drw"].weights)
    assert torch.equal(found["ce-drw"].losses, found["uniform"].losses)
    assert found["ldam"].weights.tolist() == [0.25] * 4
    assert torch.equal(found["ldam"].losses, found["ldam-drw"].losses)


def test_self_paced_by_hand():
    losses = torch.tensor([0.0, 1.0, 2.0, 4.0])
    assert hard_weights(losses, 2.0).tolist() == [1, 1, 0, 0]
    assert linear_weights(losses, 2.0).tolist() == [1, 0.5, 0, 0]


def test_self_paced_keeps_examples_without_any_loss():
    losses = torch.tensor([0.0] * 6 + [1.0] * 4)
    limit = threshold(losses, 0.0)
    assert hard_weights(losses, limit).tolist() == linear_weights(losses, limit).tolist() == [1.0] * 6 + [0.0] * 4


def test_self_paced_threshold_grows_to_all():
    losses = torch.arange(1.0, 102)
    kept = [int(hard_weights(losses, threshold(losses, progress)).sum()) for progress in (0.0, 0.5, 1.0)]
    assert kept == [51, 76, 101]
