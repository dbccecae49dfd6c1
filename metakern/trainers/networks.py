"""Networks by name, and one for each kind of data that has none of its own: tables, colour images, texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from metakern.data import NodeTask, Task
from metakern.testing.networks import resnet, wide_resnet
from metakern.trainers.graph_network import GraphConvolution
from metakern.trainers.lenet import LeNet, initialise
from metakern.trainers.pretrained import Encoder, folder_of, with_unused_frozen
from metakern.trainers.transformer import Transformer


def perceptron(features: int, classes: int, *, width: int = 64) -> nn.Module:
    """features[n, d] -> logits[n, C], two hidden layers."""
    return nn.Sequential(
        nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )


def group_norm(channels: int) -> nn.Module:
    """GroupNorm with eight groups."""
    return nn.GroupNorm(8, channels)


def convolutional(
    channels: int, classes: int, *, width: int = 32, norm: Callable[[int], nn.Module] = group_norm
) -> nn.Module:
    """images[n, c, h, w] -> logits[n, C]: three convolutions, by default with GroupNorm: examples do not interact."""
    layers: list[nn.Module] = []
    for k in range(3):
        out = width * 2**k
        layers += [nn.Conv2d(channels, out, 3, padding=1), norm(out), nn.ReLU(), nn.MaxPool2d(2)]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class BagOfTokens(nn.Module):
    """tokens[n, t] int64 -> logits[n, C]: mean embedding of the tokens that are not 0, then a perceptron."""

    def __init__(self, vocabulary: int, classes: int, *, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.head = perceptron(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens != 0).sum(1, keepdim=True).clamp(min=1)
        return self.head(self.embedding(tokens).sum(1) / lengths)


# --model NAME for images; the small one of `convolutional` is what fits where no name is given
IMAGE_MODELS: dict[str, Callable[[int], nn.Module]] = {
    "small-narrow": lambda classes: convolutional(3, classes, width=16),
    "small-batchnorm": lambda classes: convolutional(3, classes, norm=nn.BatchNorm2d),
    "resnet32": lambda classes: resnet(32, classes=classes),
    "resnet32-groupnorm": lambda classes: resnet(32, classes=classes, norm=group_norm),
    "wrn-28-10": lambda classes: wide_resnet(28, 10, classes),
}
MODELS = (*IMAGE_MODELS, "transformer")


def network_for(task: Task, seed: int, name: str | None = None) -> nn.Module:
    """The network called `name`, or the one that fits the task's inputs; its parameters are determined by `seed` alone.

    LeNet for 28 x 28 images, the convolutional network for others, the bag of tokens for int64, otherwise the
    perceptron.
    Raises: ValueError for another name, and for inputs that the network does not accept.
    """
    folder = folder_of(name)
    if name is not None and folder is None and name not in MODELS:
        raise ValueError(f"unknown --model {name!r}; there are: {', '.join(MODELS)}, transformers:DIR")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if folder is not None:
            return with_unused_frozen(Encoder(folder, len(task.class_names)), task.train.inputs[:1])
        if name in IMAGE_MODELS:
            return _image_network(task, name)
        return _fitting(task, seed) if name is None else _text_network(task)


def _image_network(task: Task, name: str) -> nn.Module:
    inputs = task.train.inputs
    if inputs.ndim != 4 or inputs.shape[1] != 3:
        raise ValueError(f"--model {name} takes colour images [n, 3, h, w], got {inputs.dtype} {list(inputs.shape)}")
    return _channels_last(IMAGE_MODELS[name](len(task.class_names)))


def _channels_last(model: nn.Module) -> nn.Module:
    """Convolution and pooling of small images on a CPU are a third faster in this layout; the values are the same."""
    return cast(Any, model).to(memory_format=torch.channels_last)  # which torch's types of `to` leave out


def _fitting(task: Task, seed: int) -> nn.Module:
    inputs, classes = task.train.inputs, len(task.class_names)
    if isinstance(task, NodeTask):
        return GraphConvolution(task.graph, classes)
    if inputs.shape[1:] == (1, 28, 28):
        model = LeNet(classes)
        initialise(model, torch.Generator().manual_seed(seed))
        return _channels_last(model)
    if inputs.ndim == 4:
        return _channels_last(convolutional(inputs.shape[1], classes))
    if inputs.dtype == torch.int64:
        return BagOfTokens(_vocabulary(task), classes)
    if inputs.ndim == 2:
        return perceptron(inputs.shape[1], classes)
    raise ValueError(f"network_for: no network for inputs of shape [n, {', '.join(map(str, inputs.shape[1:]))}]")


def _text_network(task: Task) -> nn.Module:
    inputs = task.train.inputs
    if inputs.dtype != torch.int64 or inputs.ndim != 2:
        raise ValueError(f"--model transformer takes tokens [n, t] int64, got {inputs.dtype} {list(inputs.shape)}")
    return Transformer(_vocabulary(task), inputs.shape[1], len(task.class_names))


def _vocabulary(task: Task) -> int:
    return 1 + max(int(part.inputs.max()) for part in (task.train, task.meta, task.test))
