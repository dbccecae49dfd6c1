"""Where the examples are inside a model: folded, second, shared, reordered, doubled, halved, routed."""

import torch
from torch import Tensor, nn

from metakern.testing import inputs
from metakern.testing.catalogue.case import Case, model_case


class Folded(nn.Module):
    """Positions folded into the batch before the layers: rows n-major or position-major."""

    def __init__(self, position_major: bool) -> None:
        super().__init__()
        self.position_major, self.first, self.second = position_major, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        rows = (x.transpose(0, 1) if self.position_major else x).reshape(n * length, -1)
        rows = self.second(torch.tanh(self.first(rows)))
        split = rows.view(length, n, -1).transpose(0, 1) if self.position_major else rows.view(n, length, -1)
        return split.sum(1)


class TimeMajor(nn.Module):
    """Positions first inside the model, examples second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(x.transpose(0, 1))))).sum(0)


class SharedGrid(nn.Module):
    """A layer applied to the same coordinates for every example: its input has no example dimension at all."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.grid: Tensor
        self.register_buffer("grid", inputs.normal(length, 2, seed=4, dtype=torch.float32))
        self.coordinates, self.layer, self.head = nn.Linear(2, 4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layer(x + torch.tanh(self.coordinates(self.grid))))).sum(1)


class Prompted(nn.Module):
    """The same learned tokens before every example; their numbers, and an order of channels, are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.order = {"default": torch.tensor([2, 0])}, torch.tensor([3, 0, 2, 1])
        self.prompts, self.mix, self.head = nn.Embedding(3, 4), nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        numbers = self.numbers["default"].unsqueeze(0).expand(len(x), -1).to(x.device)
        prompts = self.prompts(numbers)
        return self.head(torch.tanh(torch.cat([prompts, x], 1) @ self.mix[self.order]).sum(1))


class Reordered(nn.Module):
    """Examples change places inside the model, as packing by length does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        return self.second(hidden.flip(0)).flip(0)


class Doubled(nn.Module):
    """Two views of every example stacked along the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = torch.tanh(self.first(torch.cat([x, -0.5 * x]))).chunk(2)
        return self.second(left) + self.second(right)


class Halved(nn.Module):
    """The batch goes through the layer in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        middle = (len(x) + 1) // 2
        hidden = torch.cat([torch.tanh(self.first(x[:middle])), torch.tanh(self.first(x[middle:]))])
        return self.second(hidden)


class Selected(nn.Module):
    """Routing: each layer sees only the examples that a gate sends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.head = nn.ModuleList([nn.Linear(4, 6), nn.Linear(4, 6)]), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 6)
        gate = x[:, 0] > x[:, 1]
        for chosen, expert in zip((gate, ~gate), self.experts, strict=True):
            hidden = hidden.index_put((chosen,), expert(x[chosen]))
        return self.head(torch.tanh(hidden))


LAYOUTS: list[Case] = [
    model_case("folded-positions", lambda: Folded(position_major=False), 5, 4, ghost="either"),
    model_case("folded-position-major", lambda: Folded(position_major=True), 5, 4, ghost="either"),
    model_case("time-major", TimeMajor, 5, 4, ghost="either"),
    model_case("shared-grid", lambda: SharedGrid(6), 6, 4, ghost="either"),
    model_case("prompts", Prompted, 3, 4),
    model_case("reordered-examples", Reordered, 4, ghost="either"),
    model_case("doubled-batch", Doubled, 4, ghost="either"),
    model_case("halved-batch", Halved, 4, ghost="either"),
    model_case("routed-examples", Selected, 4, ghost="either"),
]
