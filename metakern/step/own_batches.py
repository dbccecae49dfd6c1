"""The batches of a captured or compiled step: tensors of its own, into which every new batch is copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class OwnBatches:
    """Copies of a batch and a meta batch, made of tuples, lists, dicts and tensors."""

    def __init__(self, batch: Any, meta_batch: Any) -> None:
        leaves, self._spec = tree_flatten((batch, meta_batch))
        self.leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def built(self, tensors: list[Tensor] | None = None) -> tuple[Any, Any]:
        """Batch and meta batch as they were given, of these tensors or of the own ones."""
        given = iter(self.tensors if tensors is None else tensors)
        return tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves], self._spec)

    def take(self, batch: Any, meta_batch: Any) -> None:
        """Copy new batches in; ValueError, before anything changes, if more differs than the values of tensors."""
        leaves, spec = tree_flatten((batch, meta_batch))
        if spec != self._spec:
            raise ValueError(f"batch and meta_batch must be built as the captured ones, {self._spec}; got {spec}")
        for place, (own, given) in enumerate(zip(self.leaves, leaves, strict=True)):
            _require_alike(own, given, place)
        for own, given in zip(self.leaves, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(given, non_blocking=True)


def _require_alike(own: Any, given: Any, place: int) -> None:
    if isinstance(own, Tensor):
        if not isinstance(given, Tensor) or given.shape != own.shape or given.dtype != own.dtype:
            raise ValueError(
                f"batch and meta_batch: the step was made with {_described(own)} in place {place}, "
                f"got {_described(given)}; make another step for it"
            )
    elif own != given:
        raise ValueError(f"batch and meta_batch: {own!r} was captured in place {place}, got {given!r}")


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
