"""The batches of a captured or compiled step: tensors of its own, into which every new batch is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten


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

    def fit(self, *given: Any) -> bool:
        """Have new ones the shapes of the own? ValueError if more differs than shapes and the values of tensors."""
        return self._misfit(given) is None

    def take(self, *given: Any) -> None:
        """Copy new ones in; ValueError, before anything changes, if more differs than the values of tensors."""
        misfit = self._misfit(given)
        if misfit is not None:
            raise ValueError(
                f"{self._names}: the step was made with {misfit[0]}, got {misfit[1]}; make another step for it (of a "
                "DataLoader, drop_last=True leaves out the short batch at the end)"
            )
        with torch.no_grad():  # a new one may have a graph, as what an encoder made of its input has
            for own, new in zip(self.leaves, tree_flatten(list(given))[0], strict=True):
                if isinstance(own, Tensor):
                    own.copy_(new, non_blocking=True)

    def _misfit(self, given: Sequence[Any]) -> tuple[str, str] | None:
        """The first tensor of another shape, an own one and a new one."""
        leaves, spec = tree_flatten(list(given))
        if spec != self._spec:
            raise ValueError(
                f"{self._names} must be built as the captured ones, {_form(self._spec)}; got {_form(spec)}"
            )
        found = None
        for place, (own, new) in enumerate(zip(self.leaves, leaves, strict=True)):
            self._require_alike(own, new, place)
            if isinstance(own, Tensor) and own.shape != new.shape and found is None:
                found = f"{_described(own)} in place {place}", _described(new)
        return found

    def _require_alike(self, own: Any, given: Any, place: int) -> None:
        if isinstance(own, Tensor):
            if not isinstance(given, Tensor) or given.dtype != own.dtype:
                raise ValueError(
                    f"{self._names}: the step was made with {_described(own)} in place {place}, "
                    f"got {_described(given)}; make another step for it"
                )
        elif own != given:
            raise ValueError(f"{self._names}: {own!r} was captured in place {place}, got {given!r}")


def _form(spec: TreeSpec) -> str:
    """Tuples, lists and dicts, with * for what they hold."""
    return str(tree_unflatten(["*"] * spec.num_leaves, spec)).replace("'*'", "*")


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
