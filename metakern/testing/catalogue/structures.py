"""Ways in which models use parameters that a rule per layer does not see: bare, shared, reused, frozen, in place."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from metakern.testing import inputs
from metakern.testing.catalogue.case import Case, Setup, model_case, randomise, token_case


class Vit(nn.Module):
    """Class token, positional embedding, layer scale and a learned temperature, all bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, 8)
        self.token, self.position = nn.Parameter(torch.zeros(1, 1, 8)), nn.Parameter(torch.zeros(1, 6, 8))
        self.scale, self.temperature = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(()))
        self.norm, self.mlp, self.head = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x)], dim=1) + self.position
        x = x + self.scale * torch.tanh(self.mlp(self.norm(x)))
        return self.head(x[:, 0] + x.mean(1)) * self.temperature


class Bare(nn.Module):
    """Weights without a layer: matmul, einsum and a bias added by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.core = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.randn(3, 4, 4))
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(3))])

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.weight + self.biases[0])
        return torch.einsum("ni,cij,nj->nc", hidden, self.core, hidden) + self.biases[1]


class TiedLanguageModel(nn.Module):
    """An embedding whose weight is also the head's."""

    def __init__(self, vocabulary: int, as_module: bool) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(vocabulary, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, vocabulary, bias=False) if as_module else None
        if self.head is not None:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.mix(self.embedding(tokens))).mean(1)
        logits = self.head(hidden) if self.head is not None else F.linear(hidden, self.embedding.weight)
        return logits[:, :3]


class Reused(nn.Module):
    """One module called k times, on its own output."""

    def __init__(self, module: nn.Module, times: int) -> None:
        super().__init__()
        self.module, self.times, self.head = module, times, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.module(x)) + x
        return self.head(x)


class SharedWeights(nn.Module):
    """Two layers of different kinds and shapes that share a weight: a linear layer and its transpose, and their
    biases.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.decode.bias = self.encode.bias

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.encode(x))
        return self.head(torch.tanh(F.linear(hidden, self.encode.weight.t(), self.decode.bias)) + self.decode(hidden))


class LowRank(nn.Module):
    """A frozen linear layer with a trained low-rank addition."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(6, 6), nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        self.base.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


class Conv1D(nn.Module):
    """A linear layer whose weight is stored transposed and applied by addmm, as in GPT-2 of Hugging Face."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, outputs)), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight)
        return rows.view(*x.shape[:-1], -1)


class Containers(nn.Module):
    """Layers and parameters in lists and dictionaries, some of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"first": nn.Linear(4, 6), "norm": nn.LayerNorm(6)})
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(6)) for _ in range(2)])
        self.named = nn.ParameterDict({"shift": nn.Parameter(torch.zeros(6)), "again": self.scales[0]})
        self.heads = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layers["norm"](torch.tanh(self.layers["first"](x)))
        for scale in self.scales:
            hidden = torch.tanh(hidden * scale + self.named["shift"]) * self.named["again"]
        return sum((head(hidden) for head in self.heads), torch.zeros((), dtype=x.dtype))


class Outputs(NamedTuple):
    logits: Tensor
    reconstruction: Tensor


class TwoHeads(nn.Module):
    """Keywords only, and two outputs that the loss adds up."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.back = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 4)

    def forward(self, *, features: Tensor) -> Outputs:
        hidden = torch.tanh(self.body(features))
        return Outputs(self.head(hidden), self.back(hidden))


def _two_heads(n: int, m: int) -> Setup:
    def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        found = model(features=batch[0])
        missed = (found.reconstruction - batch[0]).square().mean(1)
        return F.cross_entropy(found.logits, batch[1], reduction="none") + 0.5 * missed

    torch.manual_seed(0)
    model = TwoHeads()
    randomise(model)
    return Setup(model.double(), *inputs.pair(n, m, 4, classes=3, seed=13), loss_fn=losses)


class OwnLinear(nn.Linear):
    """A subclass that computes the same: must be found by isinstance."""


class ScaledLinear(nn.Linear):
    """A subclass whose forward differs from its parent's: the parent's rule would be wrong."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight * 2.0, self.bias) * input.mean(dim=-1, keepdim=True)


class OwnLayer(nn.Module):
    """A layer nobody registered, nonlinear in its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.angle, self.inner = nn.Parameter(torch.randn(6)), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.angle) + self.inner(x)


class InPlaceResidual(nn.Module):
    """Outputs of layers changed in place afterwards: sum, product, slice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden *= 0.5
        other = self.second(torch.tanh(hidden))
        other += hidden
        other[:, :2] = 0.25
        return self.head(other)


class Checkpointed(nn.Module):
    """The body is recomputed in the backward pass."""

    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.reentrant, self.stem, self.head = reentrant, nn.Linear(4, 6), nn.Linear(6, 3)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(checkpoint(self.body, torch.tanh(self.stem(x)), use_reentrant=self.reentrant)))


class FusedAttention(nn.Module):
    """Attention by scaled_dot_product_attention, causal, with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.head = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head((x + self.out(mixed)).mean(1))


class BatchNormalised(nn.Module):
    """Examples interact through the statistics of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def _frozen(*positions: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    for position in positions:
        model[position].requires_grad_(False)
    return model


def _frozen_weights_only() -> nn.Sequential:
    model = _frozen()
    for name, param in model.named_parameters():
        param.requires_grad_(name in ("0.bias", "2.weight", "3.weight", "5.bias"))
    return model


def _parameterless_branch() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Identity(), nn.Softmax(-1), nn.ModuleList([nn.Linear(6, 3)])[0])


def _interacting(n: int, m: int) -> Setup:
    torch.manual_seed(0)
    model = BatchNormalised()
    randomise(model)
    return Setup(model.double().train(), *inputs.pair(n, m, 2, 5, 5, classes=3, seed=13), interacting=True)


BARE = [
    model_case("bare-vit", Vit, 5, 4),
    model_case("bare-matmul-einsum", Bare, 5),
    model_case("conv1d-transposed-weight", lambda: nn.Sequential(Conv1D(5, 6), nn.Tanh(), Conv1D(6, 3)), 5),
    model_case(
        "conv1d-transposed-weight-positions", lambda: nn.Sequential(Conv1D(5, 6), nn.Flatten(), Conv1D(12, 3)), 2, 5
    ),
    model_case("containers", Containers, 4),
    model_case("unregistered-layer", lambda: nn.Sequential(OwnLayer(), nn.Linear(6, 3)), 6),
]

SHARED = [
    token_case("tied-head", lambda v: TiedLanguageModel(v, as_module=True)),
    token_case("tied-head-functional", lambda v: TiedLanguageModel(v, as_module=False)),
    model_case("reused-twice", lambda: Reused(nn.Linear(6, 6), 2), 6),
    model_case("reused-four-times", lambda: Reused(nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)), 4), 6),
    model_case("reused-unregistered", lambda: Reused(OwnLayer(), 3), 6),
    model_case("shared-weights", SharedWeights, 6),
]

FROZEN = [
    model_case("low-rank", lambda: nn.Sequential(LowRank(), nn.Tanh(), LowRank(), nn.Linear(6, 3)), 6),
    model_case("frozen-first", lambda: _frozen(0, 2), 4),
    model_case("frozen-middle", lambda: _frozen(3), 4),
    model_case("frozen-head", lambda: _frozen(5), 4),
    model_case("frozen-all-but-head", lambda: _frozen(0, 2, 3), 4),
    model_case("frozen-weights-or-biases", _frozen_weights_only, 4),
]

SUBCLASSES = [
    model_case("subclass-same-forward", lambda: nn.Sequential(OwnLinear(4, 6), nn.Tanh(), OwnLinear(6, 3)), 4),
    model_case("subclass-other-forward", lambda: nn.Sequential(ScaledLinear(4, 6), nn.Tanh(), nn.Linear(6, 3)), 4),
    model_case("no-parameters-between", _parameterless_branch, 4),
]

FORWARDS = [
    model_case("in-place-residual", InPlaceResidual, 4),
    model_case("checkpoint", Checkpointed, 4),
    Case("two-outputs-keywords-only", _two_heads),
    model_case("fused-attention", FusedAttention, 5, 8),
]

INTERACTING = [Case("batch-norm-train", _interacting, ghost="refuse", jvp="exact", auto="exact")]

STRUCTURES: list[Case] = [*(*BARE, *SHARED, *FROZEN, *SUBCLASSES, *FORWARDS, *INTERACTING)]
