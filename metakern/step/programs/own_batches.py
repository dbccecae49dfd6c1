"""The batches of a captured or compiled step: its own tensors, into which every new batch is copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
"""What cannot be written into, so that it is known whether a later batch has the same."""


class OwnBatches:
    """Copies of what a step is given: tuples, lists, dicts and tensors."""

    def __init__(self, **given: Any) -> None:
        leaves, self._spec = tree_flatten(list(given.values()))
        self.leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._names = " and ".join(given)
        for place, leaf in enumerate(leaves):
            if not isinstance(leaf, (Tensor, *_PLAIN)):
                raise TypeError(
                    f"{self._names}: a {type(leaf).__name__} at position {place}; captured and compiled steps take "
                    "tensors, numbers and strings, in tuples, lists and dicts"
                )

    @property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    def built(self, tensors: list[Tensor] | None = None) -> list[Any]:
        """The given values, in order, rebuilt from these tensors or from its own."""
        given = iter(self.tensors if tensors is None else tensors)
        return tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves], self._spec)

    def fit(self, *given: Any) -> bool:
        """Whether new ones have the same shapes. ValueError if more differs than shapes and tensor values."""
        return self._misfit(given) is None

    def take(self, *given: Any) -> None:
        """Copy new ones in. ValueError, before anything changes, if more differs than tensor values."""
        misfit = self._misfit(given)
        if misfit is not None:
            raise ValueError(
                f"{self._names}: the step was made with {misfit[0]}, got {misfit[1]}; make another step for it (a "
                "DataLoader with drop_last=True leaves out the short batch at the end)"
            )
        with torch.no_grad():  # a new one may have a graph, like the output of an encoder
            for own, new in zip(self.leaves, tree_flatten(list(given))[0], strict=True):
                if isinstance(own, Tensor):
                    own.copy_(new, non_blocking=True)

    def _misfit(self, given: Sequence[Any]) -> tuple[str, str] | None:
        """The first tensor whose shape differs, described: its own and the new one."""
        leaves, spec = tree_flatten(list(given))
        if spec != self._spec:
            raise ValueError(
                f"{self._names} must be nested like the captured ones, {_form(self._spec)}; got {_form(spec)}"
            )
        found = None
        for place, (own, new) in enumerate(zip(self.leaves, leaves, strict=True)):
            self._require_alike(own, new, place)
            if isinstance(own, Tensor) and own.shape != new.shape and found is None:
                found = f"{_described(own)} at position {place}", _described(new)
        return found

    def _require_alike(self, own: Any, given: Any, place: int) -> None:
        if isinstance(own, Tensor):
            if not isinstance(given, Tensor) or given.dtype != own.dtype:
                raise ValueError(
                    f"{self._names}: the step was made with {_described(own)} at position {place}, "
                    f"got {_described(given)}; make another step for it"
                )
        elif type(own) is not type(given) or own != given:
            raise ValueError(f"{self._names}: {own!r} was captured at position {place}, got {given!r}")


def _form(spec: TreeSpec) -> str:
    """Tuples, lists and dicts, with * for their contents."""
    return str(tree_unflatten(["*"] * spec.num_leaves, spec)).replace("'*'", "*")


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
