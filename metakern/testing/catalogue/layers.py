"""One entry per layer and per setting of a layer that changes its arithmetic."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from metakern.testing.catalogue.case import Case, layer_case, model_case, token_case


class Tokens(nn.Module):
    """An embedding layer under a head."""

    def __init__(self, embedding: nn.Module, width: int) -> None:
        super().__init__()
        self.embedding, self.head = embedding, nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        features = self.embedding(tokens)
        return self.head(torch.tanh(features.flatten(1) if features.dim() == 2 else features.sum(1)))


class Ragged(nn.Module):
    """Bags of different sizes, some empty, given by offsets: example n has the tokens above its first one."""

    def __init__(self, bag: nn.EmbeddingBag) -> None:
        super().__init__()
        self.bag = bag

    def forward(self, tokens: Tensor) -> Tensor:
        held = tokens > tokens[:, :1]
        sizes = held.sum(1)
        return self.bag(tokens[held], sizes.cumsum(0) - sizes)


class Weighted(nn.Module):
    """A bag with a weight for every token, fixed or trained."""

    def __init__(self, bag: nn.EmbeddingBag, trained: int = 0) -> None:
        super().__init__()
        self.bag, self.scale = bag, nn.Parameter(torch.ones(trained)) if trained else None

    def forward(self, tokens: Tensor) -> Tensor:
        table = self.bag.weight
        fixed = 1 / (1.0 + torch.arange(tokens.shape[1], dtype=table.dtype, device=table.device))
        scale = fixed if self.scale is None else self.scale
        return self.bag(tokens, per_sample_weights=scale.expand(len(tokens), -1).contiguous())


class SelfAttention(nn.Module):
    """nn.MultiheadAttention with query, key and value from one input."""

    def __init__(self, *, need_weights: bool = False, batch_first: bool = True, **keywords: int | bool) -> None:
        super().__init__()
        self.need_weights, self.batch_first = need_weights, batch_first
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **keywords)  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        mixed = self.attention(x, x, x, need_weights=self.need_weights)[0]
        return mixed if self.batch_first else mixed.transpose(0, 1)


class CrossAttention(nn.Module):
    """nn.MultiheadAttention whose keys and values have other widths than its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(8, 6), nn.Linear(8, 10)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=6, vdim=10, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, self.key(x), self.value(x), need_weights=False)[0]


class Decoder(nn.Module):
    """A decoder layer that attends to its own input as memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


class MaskedEncoder(nn.Module):
    """Two encoder layers over sequences whose ends are padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        lengths = 2 + (x[:, 0, :2] > 0).sum(1, keepdim=True)
        padding = torch.arange(x.shape[1], device=x.device) >= lengths
        return self.layers(x, src_key_padding_mask=padding).masked_fill(padding.unsqueeze(-1), 0.0)


class Pair(nn.Module):
    """nn.Bilinear of two halves of the features."""

    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(4, 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x[..., :4], x[..., 4:])


LINEAR = [
    layer_case("linear", lambda: nn.Linear(5, 4), 5),
    layer_case("linear-no-bias", lambda: nn.Linear(5, 4, bias=False), 5),
    layer_case("linear-positions", lambda: nn.Linear(5, 4), 7, 5),
    layer_case("linear-four-dimensions", lambda: nn.Linear(5, 4), 2, 3, 5),
    layer_case("linear-one-to-one", lambda: nn.Linear(1, 1), 1),
    layer_case("linear-wide", lambda: nn.Linear(33, 65), 3, 33),
    layer_case("linear-many-positions", lambda: nn.Linear(3, 2), 50, 3),
    layer_case("bilinear", Pair, 7),
    layer_case("bilinear-positions", Pair, 3, 7),
]

CONVOLUTIONS = [
    layer_case("conv1d", lambda: nn.Conv1d(3, 4, 3), 3, 9),
    layer_case("conv1d-same-even-kernel", lambda: nn.Conv1d(3, 4, 4, padding="same"), 3, 9),
    layer_case("conv1d-stride-dilation", lambda: nn.Conv1d(3, 4, 3, stride=2, dilation=2, padding=1), 3, 11),
    layer_case("conv1d-reflect", lambda: nn.Conv1d(3, 4, 3, padding=2, padding_mode="reflect"), 3, 9),
    layer_case("conv2d", lambda: nn.Conv2d(2, 3, 3), 2, 6, 7),
    layer_case("conv2d-no-bias", lambda: nn.Conv2d(2, 3, 3, bias=False), 2, 6, 7),
    layer_case("conv2d-pointwise", lambda: nn.Conv2d(2, 5, 1), 2, 4, 5),
    layer_case("conv2d-stride-leftover", lambda: nn.Conv2d(2, 3, 3, stride=(2, 3), padding=(1, 0)), 2, 8, 9),
    layer_case("conv2d-same-dilation", lambda: nn.Conv2d(2, 3, (3, 2), padding="same", dilation=(1, 2)), 2, 6, 7),
    layer_case("conv2d-valid", lambda: nn.Conv2d(2, 3, 3, padding="valid"), 2, 6, 7),
    layer_case("conv2d-circular", lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), 2, 6, 7),
    layer_case("conv2d-replicate", lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="replicate"), 2, 6, 7),
    layer_case("conv2d-groups", lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), 4, 5, 5),
    layer_case("conv2d-depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4, stride=2), 4, 7, 7),
    layer_case("conv2d-kernel-is-image", lambda: nn.Conv2d(2, 3, (4, 5)), 2, 4, 5),
    layer_case("conv3d", lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=(0, 1, 0)), 2, 3, 4, 5),
    layer_case("conv3d-groups-dilation", lambda: nn.Conv3d(2, 4, 2, groups=2, dilation=(1, 1, 2)), 2, 3, 3, 4),
    layer_case("conv-transpose1d", lambda: nn.ConvTranspose1d(3, 4, 3, stride=2, output_padding=1), 3, 5),
    layer_case("conv-transpose2d", lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), 4, 3, 4),
    layer_case("conv-transpose2d-dilation", lambda: nn.ConvTranspose2d(2, 3, 2, dilation=2, bias=False), 2, 3, 4),
    layer_case("conv-transpose3d", lambda: nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 1)), 2, 2, 3, 2),
]

EMBEDDINGS = [
    token_case("embedding", lambda v: Tokens(nn.Embedding(v, 4), 4)),
    token_case("embedding-padding", lambda v: Tokens(nn.Embedding(v, 4, padding_idx=2), 4)),
    token_case("embedding-repeated-tokens", lambda v: Tokens(nn.Embedding(v, 4), 4), 20, 3),
    token_case("embedding-large-vocabulary", lambda v: Tokens(nn.Embedding(v, 4), 4), 5, 500),
    token_case("embedding-bag-mean", lambda v: Tokens(nn.EmbeddingBag(v, 4, mode="mean"), 4)),
    token_case("embedding-bag-sum", lambda v: Tokens(nn.EmbeddingBag(v, 4, mode="sum", padding_idx=1), 4)),
    token_case("embedding-bag-max", lambda v: Tokens(nn.EmbeddingBag(v, 4, mode="max"), 4)),
    token_case(
        "embedding-bag-max-padding", lambda v: Tokens(nn.EmbeddingBag(v, 4, mode="max", padding_idx=-2), 4), 2, 3
    ),
    token_case("embedding-bag-offsets-max", lambda v: Tokens(Ragged(nn.EmbeddingBag(v, 4, mode="max")), 4)),
    token_case("embedding-bag-offsets-mean", lambda v: Tokens(Ragged(nn.EmbeddingBag(v, 4, mode="mean")), 4)),
    token_case("embedding-bag-weights", lambda v: Tokens(Weighted(nn.EmbeddingBag(v, 4, mode="sum")), 4)),
    token_case(
        "embedding-bag-trained-weights",
        lambda v: Tokens(Weighted(nn.EmbeddingBag(v, 4, mode="sum"), 5), 4),
    ),
    token_case(
        # Its gradient is divided by how often a token occurs in the whole batch: no longer the gradient of any loss.
        "embedding-scaled-by-frequency",
        lambda v: Tokens(nn.Embedding(v, 4, scale_grad_by_freq=True), 4),
        ghost="either",
        auto="either",
    ),
]

NORMS = [
    layer_case("layer-norm", lambda: nn.LayerNorm(5), 3, 5),
    layer_case("layer-norm-two-dimensions", lambda: nn.LayerNorm([3, 5]), 2, 3, 5),
    layer_case("layer-norm-no-bias", lambda: nn.LayerNorm(5, bias=False), 5),
    layer_case("layer-norm-no-affine", lambda: nn.LayerNorm(5, elementwise_affine=False), 5),
    layer_case("group-norm", lambda: nn.GroupNorm(2, 6), 6, 3, 4),
    layer_case("group-norm-flat", lambda: nn.GroupNorm(3, 6), 6),
    layer_case("rms-norm", lambda: nn.RMSNorm(5, eps=1e-5), 4, 5),
    layer_case("rms-norm-two-dimensions", lambda: nn.RMSNorm([4, 5]), 4, 5),
    layer_case("instance-norm1d", lambda: nn.InstanceNorm1d(3, affine=True), 3, 7),
    layer_case("instance-norm2d", lambda: nn.InstanceNorm2d(3, affine=True), 3, 4, 5),
    layer_case("instance-norm3d", lambda: nn.InstanceNorm3d(2, affine=True), 2, 2, 3, 3),
    layer_case(
        "instance-norm2d-eval-statistics",
        lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        *(3, 4, 5),
        train=False,
    ),
    layer_case("local-response-norm", lambda: nn.LocalResponseNorm(3), 4, 5, 5),
    layer_case("batch-norm1d-eval", lambda: nn.BatchNorm1d(5), 5, train=False),
    layer_case("batch-norm1d-eval-positions", lambda: nn.BatchNorm1d(3), 3, 7, train=False),
    layer_case("batch-norm2d-eval", lambda: nn.BatchNorm2d(3), 3, 4, 5, train=False),
    layer_case("batch-norm3d-eval", lambda: nn.BatchNorm3d(2), 2, 2, 3, 3, train=False),
    layer_case("prelu", lambda: nn.PReLU(), 4, 5),
    layer_case("prelu-channels", lambda: nn.PReLU(4), 4, 3, 3),
]

ATTENTION = [
    layer_case("attention", SelfAttention, 4, 8),
    layer_case("attention-weights", lambda: SelfAttention(need_weights=True), 4, 8),
    layer_case("attention-time-major", lambda: SelfAttention(batch_first=False), 4, 8),
    layer_case("attention-no-bias", lambda: SelfAttention(bias=False), 4, 8),
    layer_case("attention-other-widths", CrossAttention, 4, 8),
    layer_case("encoder-layer", lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True), 4, 8),
    layer_case(
        "encoder-layer-eval",
        lambda: nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, batch_first=True, norm_first=True),
        *(4, 8),
        train=False,
    ),
    layer_case("decoder-layer", Decoder, 4, 8),
    layer_case("encoder-padding-mask", MaskedEncoder, 4, 8),
    layer_case("attention-bias-and-zero", lambda: SelfAttention(add_bias_kv=True, add_zero_attn=True), 4, 8),
]

PARAMETRIZED = [
    layer_case("weight-norm", lambda: parametrizations.weight_norm(nn.Linear(5, 4)), 5),
    layer_case("weight-norm-conv", lambda: parametrizations.weight_norm(nn.Conv2d(2, 3, 3), dim=-1), 2, 5, 5),
    layer_case("spectral-norm-eval", lambda: parametrizations.spectral_norm(nn.Linear(5, 4)), 5, train=False),
    layer_case("orthogonal", lambda: parametrizations.orthogonal(nn.Linear(5, 4)), 5, ghost="either", auto="either"),
]

ACTIVATIONS = [
    model_case("relu-in-place", lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)), 5),
    # The output of a linear layer with positions is a view of a matrix: changing it in place rewrites the graph.
    model_case(
        "positions-relu-in-place",
        lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(24, 3)),
        *(4, 5),
    ),
    model_case(
        "norm-then-hardtanh-in-place",
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Hardtanh(-0.9, 0.7, inplace=True), nn.Linear(6, 3)),
        5,
    ),
    model_case(
        "conv-leaky-in-place",
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 3, 3, padding=1), nn.GroupNorm(3, 3), nn.LeakyReLU(0.1, inplace=True)),
            *(nn.Conv2d(3, 2, 3), nn.ELU(inplace=True), nn.Flatten(), nn.Linear(24, 3)),
        ),
        *(2, 5, 6),
    ),
]

LAYERS: list[Case] = [
    *(*LINEAR, *CONVOLUTIONS, *EMBEDDINGS, *NORMS, *ATTENTION, *PARAMETRIZED, *ACTIVATIONS),
]
