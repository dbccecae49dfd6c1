"""The batches of a captured or compiled step: tensors of its own, into which every new batch is copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten


class OwnBatches:
    """Copies of what a step is given, made of tuples, lists, dicts and tensors."""

    def __init__(self, **given: Any) -> None:
        leaves, self._spec = tree_flatten(list(given.values()))
        self.leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._names = " and ".join(given)

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def built(self, tensors: list[Tensor] | None = None) -> list[Any]:
        """What was given, in order, of these tensors or of the own ones."""
        given = iter(self.tensors if tensors is None else tensors)
        return tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves], self._spec)

    def take(self, *given: Any) -> None:
        """Copy new ones in; ValueError, before anything changes, if more differs than the values of tensors."""
        leaves, spec = tree_flatten(list(given))
        if spec != self._spec:
            raise ValueError(f"{self._names} must be built as the captured ones, {self._spec}; got {spec}")
        for place, (own, new) in enumerate(zip(self.leaves, leaves, strict=True)):
            self._require_alike(own, new, place)
        for own, new in zip(self.leaves, leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(new, non_blocking=True)

    def _require_alike(self, own: Any, given: Any, place: int) -> None:
        if isinstance(own, Tensor):
            if not isinstance(given, Tensor) or given.shape != own.shape or given.dtype != own.dtype:
                raise ValueError(
                    f"{self._names}: the step was made with {_described(own)} in place {place}, "
                    f"got {_described(given)}; make another step for it"
                )
        elif own != given:
            raise ValueError(f"{self._names}: {own!r} was captured in place {place}, got {given!r}")


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
