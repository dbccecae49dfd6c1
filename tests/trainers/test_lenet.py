import torch
import torch.nn.functional as F

from metakern.trainers.lenet import LeNet, initialise


def test_shapes_of_the_papers_code():
    model = LeNet()
    sizes = [tuple(parameter.shape) for name, parameter in model.named_parameters() if name.endswith("weight")]
    assert sizes == [(16, 1, 5, 5), (32, 16, 5, 5), (64, 32, 5, 5), (100, 1024), (1, 100)]
    assert LeNet(10)(torch.zeros(3, 1, 28, 28)).shape == (3, 10)


def test_two_classes_are_one_sigmoid():
    torch.manual_seed(0)
    model, images, targets = LeNet().double(), torch.rand(4, 1, 28, 28, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    logits = model(images)
    assert logits.shape == (4, 2)
    assert (logits[:, 0] == 0).all()
    sigmoid = F.binary_cross_entropy_with_logits(logits[:, 1], targets.double(), reduction="none")
    torch.testing.assert_close(F.cross_entropy(logits, targets, reduction="none"), sigmoid)


def test_initialise():
    model = LeNet()
    initialise(model, torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        else:
            assert float(parameter.detach().abs().max()) <= 0.2
    # A normal cut off at two deviations keeps 0.88 of its deviation.
    assert abs(float(model.head[0].weight.detach().std()) - 0.088) < 0.002
