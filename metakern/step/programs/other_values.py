"""Whether a program also does what its step does if the tensors of the batches have other values.

Numbers that C++ or Python take from a tensor out of sight (`torch.Tensor([x.max()])`, ctypes) stay in a program as they
were in the traced batch, so that for this batch it gives the right values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metakern.capture.refusal import EngineUnavailable
from metakern.capture.state.buffers import unchanged_buffers
from metakern.capture.state.function_state import FunctionState
from metakern.capture.state.random_state import restore_random_state
from metakern.step.programs.compilable import ObservedStep, alike, results_of
from metakern.step.programs.program import Program


class OtherValues:
    """What a step returns for other values of the tensors in its batches, if it can be run on them."""

    def __init__(self, seen: ObservedStep) -> None:
        self._seen = seen
        self._tensors: list[Tensor] = []
        self._values: list[Tensor] = []

    def observe(
        self,
        model: nn.Module,
        functions: Sequence[Any],
        tensors: Sequence[Tensor],
        step: Callable[[list[Tensor]], Sequence[Tensor]],
    ) -> None:
        """Run the step on other values of `tensors`, and undo its effects; `functions` are what it calls besides the
        model.
        """
        state = FunctionState(model, *functions)
        try:
            self._tensors = [_other(tensor) for tensor in tensors]
            with unchanged_buffers(model):
                self._values = list(step(self._tensors))
        except Exception:  # some models take few values: probabilities that sum to one, the nodes of one graph
            self._values = []
        finally:
            restore_random_state(self._seen.start)
            state.restore()

    def require_same(self, program: Program, numbers: Sequence[Tensor]) -> None:
        """Raise unless the program returns what that step did; not checked if these values take another branch, or
        leave other parameters unused.
        """
        if len(self._values) != len(self._seen.values):
            return
        restore_random_state(self._seen.start)
        found = results_of(program, [*self._tensors, *numbers, *self._seen.buffers])
        if found is not None and not all(map(alike, found, self._values)):  # after the values come buffers
            raise EngineUnavailable(
                "the traced step gives other values than the step where the tensors of the batches have other values, "
                "so the pass takes numbers out of tensors unseen (torch.Tensor([x.max()]), ctypes); use torch.stack, "
                "or run the step uncompiled"
            )


def _other(tensor: Tensor) -> Tensor:
    """Every second row repeats the one before it, since any row may come twice; real numbers become smaller, each by
    another factor, so that probabilities stay between 0 and 1.
    """
    if tensor.is_floating_point() or tensor.is_complex():
        factors = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0), device="cpu") / 2 + 0.5
        return tensor * factors.to(tensor.device, tensor.real.dtype)
    if tensor.dim() == 0 or not tensor.is_cpu:  # on a GPU, an index out of range would end the process's use of it
        return tensor
    return tensor[torch.arange(len(tensor), device="cpu") // 2 * 2]
