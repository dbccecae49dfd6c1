"""A module as one call, with its parameters among the arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PARAMETER = "parameter:"
"""Prefix of the keywords under which a module call carries its own parameters."""


class ModuleCall:
    """A module as a function of its inputs and of its parameters, given as keywords `parameter:NAME`.

    Every call works on fresh copies of the buffers as they are now: a replay sees what the first call saw, and leaves
    no trace.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.__name__ = type(module).__name__
        self._buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        parameters = {k.removeprefix(PARAMETER): v for k, v in kwargs.items() if k.startswith(PARAMETER)}
        rest = {k: v for k, v in kwargs.items() if not k.startswith(PARAMETER)}
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        return torch.func.functional_call(self.module, {**buffers, **parameters}, args, rest)
