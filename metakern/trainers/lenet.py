"""The network of L2RW's class-imbalance experiment."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """images[n, 1, 28, 28] -> logits[n, C]: 5x5 convolutions of 16, 32 and 64, 3x3 pools of stride 2, 100 hidden units.

    With two classes there is one output, and the first class's logit is fixed at 0: the cross entropy is then the
    sigmoid cross entropy of that output, as in the paper's code. Pooling comes before the ReLUs, which gives the same
    values at a quarter of the work; its padding is that of TensorFlow's SAME (28 -> 14 -> 7 -> 4).
    Source: the code published with Ren et al., ICML 2018.
    """

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding="same"),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, padding="same"),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            nn.ReLU(),
            nn.Conv2d(32, 64, 5, padding="same"),
            nn.MaxPool2d(3, 2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.head = nn.Sequential(nn.Linear(1024, 100), nn.ReLU(), nn.Linear(100, 1 if classes == 2 else classes))

    def forward(self, images: Tensor) -> Tensor:
        outputs = self.head(self.features(images))
        return F.pad(outputs, (1, 0)) if outputs.shape[1] == 1 else outputs


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Weights from a normal distribution of deviation 0.1, truncated at two deviations; biases 0; as in the code."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.trunc_normal_(parameter, std=0.1, a=-0.2, b=0.2, generator=generator)
