import math

import pytest
import torch

from metakern.methods.noise_channel import (
    anchor_channel,
    confusion_channel,
    forward_corrected_loss,
    reverse_channel,
    top_down_loss,
)
from metakern.methods.noise_layer import (
    ComplexNoise,
    StochasticMatrix,
    complex_noise_loss,
    onto_simplex,
    stochastic_loss,
)

CHANNEL = torch.tensor([[0.8, 0.2], [0.3, 0.7]])


def test_projection_by_hand():
    # (1, 1): both lose 1/2; (2, 0): only the first is left; a distribution stays.
    rows = torch.tensor([[1.0, 1.0], [2.0, 0.0], [0.25, 0.75]])
    torch.testing.assert_close(onto_simplex(rows), torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]]))


def test_projection_of_large_entries():
    rows = torch.tensor([[1e9, 1.0, -3e9], [-1e12, -1e12, -1e12]])
    torch.testing.assert_close(onto_simplex(rows), torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]))


def test_a_label_that_the_network_rules_out_leaves_a_finite_gradient():
    logits, channel = torch.tensor([[90.0, -90.0]]), torch.eye(2, requires_grad=True)
    stochastic_loss(logits, torch.tensor([1]), channel).sum().backward()
    assert channel.grad.abs().max() <= 1e4 + 1


def test_projection_is_the_nearest_distribution():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    nearest = onto_simplex(rows)
    assert (nearest >= 0).all()
    torch.testing.assert_close(nearest.sum(1), torch.ones(20, dtype=torch.float64))
    others = torch.distributions.Dirichlet(torch.ones(5, dtype=torch.float64)).sample((200,))
    distances = (rows.unsqueeze(1) - others).norm(dim=2).min(1).values
    assert ((rows - nearest).norm(dim=1) <= distances).all()


def test_stochastic_matrix_stays_one():
    layer = StochasticMatrix(3)
    torch.testing.assert_close(layer(), torch.eye(3))
    with torch.no_grad():
        layer.channel.add_(torch.randn(3, 3))
    layer.project()
    torch.testing.assert_close(layer().sum(1), torch.ones(3))
    assert (layer() >= 0).all()


def test_complex_noise_starts_as_the_simple_one():
    layer = ComplexNoise(4, CHANNEL.log())
    logits, features, targets = torch.randn(6, 2), torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 0])
    torch.testing.assert_close(
        complex_noise_loss(logits, targets, layer(features)), forward_corrected_loss(logits, targets, CHANNEL)
    )


def test_complex_noise_by_hand():
    layer = ComplexNoise(1, torch.zeros(2, 2))
    with torch.no_grad():
        layer.layer.weight[1, 0] = 1.0  # true class 0 is labelled 1 with weight e^h
    loss = complex_noise_loss(torch.zeros(1, 2), torch.tensor([1]), layer(torch.tensor([[math.log(3)]])))
    # 1/2 * 3/4 + 1/2 * 1/2
    assert loss.item() == pytest.approx(-math.log(0.625))


def test_confusion_channel_by_hand():
    predicted, truth = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])
    channel = confusion_channel(predicted, truth, 3, smoothing=0.03)
    expected = 0.97 * torch.tensor([[2 / 3, 1 / 3, 0], [0, 1, 0], [0, 0, 1]]) + 0.01
    torch.testing.assert_close(channel, expected)


def test_anchor_channel_takes_the_surest():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    torch.testing.assert_close(anchor_channel(probabilities, quantile=1.0), probabilities[[0, 2]])
    torch.testing.assert_close(anchor_channel(probabilities, quantile=0.5), probabilities[[1, 1]])


def test_reverse_channel_is_bayes_rule():
    truth = torch.tensor([0.25, 0.75])
    labels = truth @ CHANNEL
    joint = truth.unsqueeze(1) * CHANNEL
    torch.testing.assert_close(reverse_channel(CHANNEL, labels), (joint / joint.sum(0)).T)


def test_top_down_by_hand():
    reverse = torch.tensor([[0.9, 0.1], [0.4, 0.6]])
    logits = torch.tensor([[math.log(3), 0.0]])  # 3/4 and 1/4
    loss = top_down_loss(logits, torch.tensor([1]), reverse)
    assert loss.item() == pytest.approx(-0.4 * math.log(0.75) - 0.6 * math.log(0.25))
