"""What a user would write in torch instead of an operator, as quickly as that goes; for the CPU and a GPU alike.

What has a bias or a gradient beside it on one of them only is in `operators` and `gpu_ops`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def affine(X: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    return (F.layer_norm(X, X.shape[-1:]) * B).sum(1), B.sum(1)


def direction(A: Tensor, V: Tensor, B: Tensor) -> Tensor:
    return ((A @ V.T) * B).sum((1, 2))


def embedding(indices: Tensor, V: Tensor, B: Tensor) -> Tensor:
    return (F.embedding(indices, V) * B).sum((1, 2))


def kernel_gradients(A: Tensor, B: Tensor, kernel: Tensor, *settings: list[int]) -> Tensor:
    def of_one(a: Tensor, b: Tensor) -> Tensor:
        return torch.nn.grad.conv2d_weight(a.unsqueeze(0), kernel.shape, b.unsqueeze(0), *settings)

    return torch.func.vmap(of_one)(A, B)


def pairs(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> Tensor:
    return ((A @ A_meta.T) * (B @ B_meta.T)).sum((1, 2))


def pairs_of_each(A: Tensor, B: Tensor, A_meta: Tensor, B_meta: Tensor) -> Tensor:
    """By meta example."""
    products = (A.flatten(0, 1) @ A_meta.flatten(0, 1).T) * (B.flatten(0, 1) @ B_meta.flatten(0, 1).T)
    return products.view(*A.shape[:2], *A_meta.shape[:2]).sum((1, 3))
