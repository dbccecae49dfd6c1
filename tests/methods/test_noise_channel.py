import math

import pytest
import torch
import torch.nn.functional as F

from metakern.methods.noise_channel import (
    channel_logits,
    channel_logits_from_confusion,
    forward_corrected_loss,
    glc_channel,
    glc_loss,
    s_model_loss,
)

LOGITS = torch.tensor([[math.log(2), 0.0, 0.0]], dtype=torch.float64)  # softmax 1/2, 1/4, 1/4
CHANNEL = torch.tensor([[0.8, 0.2, 0.0], [0.1, 0.6, 0.3], [0.0, 0.0, 1.0]])


def test_forward_correction_by_hand():
    # p(label 1) = 1/2 * 0.2 + 1/4 * 0.6 + 1/4 * 0 = 1/4
    loss = forward_corrected_loss(LOGITS, torch.tensor([1]), CHANNEL)
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)


def test_identity_channel_is_cross_entropy():
    logits, targets = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 1, 2, 1, 0])
    loss = forward_corrected_loss(logits, targets, torch.eye(3))
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction="none"))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.isfinite(gradient).all()


def test_forward_correction_keeps_small_probabilities():
    logits = torch.tensor([[200.0, 0.0, 0.0]])
    assert forward_corrected_loss(logits, torch.tensor([2]), torch.eye(3)).item() == pytest.approx(200)


def test_wrong_channel_shape():
    with pytest.raises(ValueError, match=r"channel must be \[3, 3\], got \[2, 2\]"):
        forward_corrected_loss(LOGITS, torch.tensor([0]), torch.eye(2))


def test_s_model_starts_at_the_noise_share():
    channel = channel_logits(3, 0.4).softmax(1)
    torch.testing.assert_close(channel, torch.full((3, 3), 0.2).fill_diagonal_(0.6))
    with pytest.raises(ValueError, match="noise must be between 0 and 1"):
        channel_logits(3, 0)


def test_s_model_learns_its_channel():
    logits, channel = LOGITS.clone(), channel_logits(3, 0.4).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda c: s_model_loss(logits, torch.tensor([1]), c), channel)
    expected = forward_corrected_loss(logits, torch.tensor([1]), channel.softmax(1))
    torch.testing.assert_close(s_model_loss(logits, torch.tensor([1]), channel), expected)


def test_confusion_start():
    predicted, labels = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    channel = channel_logits_from_confusion(predicted, labels, 2).softmax(1)
    torch.testing.assert_close(channel, torch.tensor([[0.75, 0.25], [0.0, 1.0]]), atol=2e-4, rtol=0)


def test_glc_by_hand():
    probabilities = torch.tensor([[0.9, 0.1, 0.0], [0.7, 0.3, 0.0], [0.2, 0.8, 0.0]])
    channel = glc_channel(probabilities, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(channel, torch.tensor([[0.8, 0.2, 0.0], [0.2, 0.8, 0.0], [0.0, 0.0, 1.0]]))


def test_glc_loss_takes_each_part_where_it_belongs():
    logits, targets = LOGITS.repeat(2, 1), torch.tensor([1, 1])
    losses = glc_loss(logits, targets, torch.tensor([True, False]), CHANNEL)
    corrected = forward_corrected_loss(logits, targets, CHANNEL)
    assert losses.tolist() == pytest.approx([math.log(4), corrected[1].item()])
