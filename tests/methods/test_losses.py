"""Each loss against a value worked out by hand from its formula, or against the library function it must equal."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metakern.data import Examples, Task
from metakern.methods import find
from metakern.methods.bootstrapping import hard_bootstrap_loss, soft_bootstrap_loss
from metakern.methods.focal import focal_loss, sigmoid_focal_loss
from metakern.methods.label_smoothing import label_smoothing_loss, smoothing_by_count
from metakern.methods.ldam import ldam_loss, ldam_margins
from metakern.methods.logit_adjustment import arb_loss, logit_adjusted_loss

# softmax of these logits is exactly 1/2, 1/4, 1/4
LOGITS = torch.tensor([[math.log(2), 0.0, 0.0]], dtype=torch.float64)
FIRST, SECOND = torch.tensor([0]), torch.tensor([1])


def some(n: int = 6, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64, requires_grad=True)
    return logits, torch.randint(classes, (n,), generator=generator)


def plain(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none")


def test_focal_by_hand():
    assert focal_loss(LOGITS, FIRST).item() == pytest.approx(0.25 * math.log(2))
    assert focal_loss(LOGITS, SECOND, gamma=1).item() == pytest.approx(0.75 * math.log(4))


def test_focal_without_gamma_is_cross_entropy():
    torch.testing.assert_close(focal_loss(*some(), gamma=0), plain(*some()))


def test_focal_detached_has_the_other_gradient():
    logits, targets = some()
    (whole,) = torch.autograd.grad(focal_loss(logits, targets).sum(), logits)
    (detached,) = torch.autograd.grad(focal_loss(logits, targets, detach=True).sum(), logits)
    p = logits.softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1).detach()
    (weighted,) = torch.autograd.grad(((1 - p) ** 2 * plain(logits, targets)).sum(), logits)
    torch.testing.assert_close(detached, weighted)
    assert not torch.allclose(whole, detached)
    assert torch.autograd.gradcheck(lambda z: focal_loss(z, targets), logits)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("loss", [focal_loss, sigmoid_focal_loss])
def test_focal_is_finite_for_certain_examples(loss, gamma):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    losses = loss(logits, torch.tensor([0, 0]), gamma=gamma)
    losses.sum().backward()
    assert losses.tolist() == [0, 400]
    assert torch.isfinite(logits.grad).all()


def test_sigmoid_focal_by_hand():
    logits = torch.tensor([[0.0, math.log(3)]])  # sigmoids 1/2 and 3/4; the target is class 0
    expected = 0.25 * math.log(2) + 0.75**2 * math.log(4)
    assert sigmoid_focal_loss(logits, FIRST).item() == pytest.approx(expected)
    logits, targets = some()
    binary = F.binary_cross_entropy_with_logits(logits, F.one_hot(targets, 4).double(), reduction="none").sum(1)
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets, gamma=0), binary)


def test_sigmoids_begin_near_one_over_the_number_of_classes(setup):
    examples = Examples(torch.randn(8, 3), torch.arange(8) % 4, torch.arange(8))
    task = Task("four", examples, examples, examples, tuple("abcd"), examples.targets)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4))
    nn.init.zeros_(model[1].weight)
    find("focal").begin(setup(model, task=task))
    assert (model[1].bias != -math.log(3)).all()
    first = model[0].bias.clone()
    find("focal-sigmoid", "gamma=1").begin(setup(model, task=task))
    torch.testing.assert_close(model(examples.inputs).sigmoid(), torch.full((8, 4), 0.25))
    assert torch.equal(model[0].bias, first)


def test_label_smoothing_is_torchs():
    expected = F.cross_entropy(*some(), reduction="none", label_smoothing=0.3)
    torch.testing.assert_close(label_smoothing_loss(*some(), 0.3), expected)


def test_label_smoothing_by_class():
    logits, targets = some()
    strengths = torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64)
    each = [
        F.cross_entropy(logits[k : k + 1], targets[k : k + 1], label_smoothing=float(strengths[targets[k]]))
        for k in range(len(targets))
    ]
    torch.testing.assert_close(label_smoothing_loss(logits, targets, strengths), torch.stack(each))
    assert smoothing_by_count(torch.tensor([10, 40])).tolist() == pytest.approx([0.1, 0.025])


def test_ldam_by_hand():
    margins = ldam_margins(torch.tensor([16, 1, 81]))
    assert margins.tolist() == pytest.approx([0.25, 0.5, 0.5 / 3])
    # Class 1 loses its margin of 1/2: e^-1/2 against 2 and 1.
    expected = -math.log(math.exp(-0.5) / (2 + math.exp(-0.5) + 1))
    assert ldam_loss(LOGITS, SECOND, margins).item() == pytest.approx(expected)
    scaled = -math.log(math.exp(-1) / (4 + math.exp(-1) + 1))
    assert ldam_loss(LOGITS, SECOND, margins, scale=2).item() == pytest.approx(scaled)
    torch.testing.assert_close(ldam_loss(*some(), torch.zeros(4)), plain(*some()))


def test_logit_adjustment_by_hand():
    # e^z * n = 2 * 1, 1 * 3, 1 * 5: class 1 has 3 of 10.
    counts = torch.tensor([1, 3, 5])
    assert logit_adjusted_loss(LOGITS, SECOND, counts).item() == pytest.approx(math.log(10 / 3))
    assert logit_adjusted_loss(LOGITS, SECOND, torch.tensor([1, 3, 0])).item() == pytest.approx(math.log(5 / 3))
    torch.testing.assert_close(
        logit_adjusted_loss(*some(), torch.tensor([0, 1, 2, 3]).clamp(min=1), tau=0), plain(*some())
    )


def test_arb_by_hand():
    logits, targets = some(5, 3)
    targets = torch.tensor([0, 0, 1, 0, 1])  # class 2 is not in the batch
    counts = [3, 2, 0]
    for row, target, loss in zip(logits, targets, arb_loss(logits, targets), strict=True):
        own = row[target].exp()
        expected = -torch.log(own / sum(counts[j] / counts[int(target)] * row[j].exp() for j in range(3)))
        torch.testing.assert_close(loss, expected)


def test_reed_by_hand():
    # q = 1/2, 1/4, 1/4 and the label is class 1.
    entropy = 0.5 * math.log(2) + 0.5 * math.log(4)
    assert soft_bootstrap_loss(LOGITS, SECOND, beta=0.9).item() == pytest.approx(0.9 * math.log(4) + 0.1 * entropy)
    assert hard_bootstrap_loss(LOGITS, SECOND).item() == pytest.approx(0.8 * math.log(4) + 0.2 * math.log(2))
    torch.testing.assert_close(soft_bootstrap_loss(*some(), beta=1), plain(*some()))
    torch.testing.assert_close(hard_bootstrap_loss(*some(), beta=1), plain(*some()))


def test_reed_detached_is_soft_target_cross_entropy():
    logits, targets = some()
    mixed = 0.95 * F.one_hot(targets, 4) + 0.05 * logits.softmax(1).detach()
    ours, theirs = (
        soft_bootstrap_loss(logits, targets, detach_target=True),
        F.cross_entropy(logits, mixed, reduction="none"),
    )
    torch.testing.assert_close(ours, theirs)
    (detached,) = torch.autograd.grad(ours.sum(), logits)
    (expected,) = torch.autograd.grad(theirs.sum(), logits)
    torch.testing.assert_close(detached, expected)
    (whole,) = torch.autograd.grad(soft_bootstrap_loss(logits, targets).sum(), logits)
    assert not torch.allclose(whole, detached)
