"""Products with a parameter entry by entry: broadcast in every way, small and as large as an example."""

import torch
from torch import Tensor, nn

from metakern.testing.catalogue.case import Case, layer_case


class Scaled(nn.Module):
    """x * scale."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class OnePlus(Scaled):
    """As in the RMSNorm of Gemma, whose scale is a derived tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.scale) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)


class TimeMajor(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return torch.mul(x.transpose(0, 1), other=self.scale).transpose(0, 1)


class Rows(Scaled):
    """Positions folded into the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(0, 1) * self.scale).view(x.shape)


class Gate(Scaled):
    """The other factor is data without a gradient, of fewer entries than the product."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * (x[..., :1] > 0)


class Tied(Scaled):
    """Used by two products and a sum."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x * self.scale) * self.scale + self.scale


SCALES: list[Case] = [
    layer_case("scale", lambda: Scaled(6), 8, 6),
    layer_case("scale-number", lambda: Scaled(), 8, 6),
    layer_case("scale-channels", lambda: Scaled(3, 1, 1), 3, 4, 5),
    layer_case("scale-middle", lambda: Scaled(1, 8, 1), 3, 8, 5),
    layer_case("scale-positions", lambda: Scaled(8, 1), 8, 6),
    layer_case("scale-large", lambda: Scaled(8, 6), 8, 6),
    layer_case("scale-flat", lambda: Scaled(6), 6),
    layer_case("scale-one-plus", lambda: OnePlus(6), 8, 6),
    layer_case("scale-time-major", lambda: TimeMajor(8, 1, 1), 8, 6),
    layer_case("scale-rows", lambda: Rows(6), 8, 6),
    layer_case("scale-gate", lambda: Gate(6), 8, 6),
    layer_case("scale-tied", lambda: Tied(6), 8, 6),
]
