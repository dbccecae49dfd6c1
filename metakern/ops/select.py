"""Which implementation of an operator runs: the first in its table that supports the case, or the one requested.

An operator is declared once, here: its schema, its fake (shapes without data), its FLOPs and its table go to
`torch.library` together, so that the eager call, `torch.compile`, `opcheck` and the FLOP counter see one operator.
The choice is made inside the device kernel, because registering a second kernel for one device is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("metakern", "FRAGMENT")

OPERATORS: dict[str, Operator] = {}
"""Every registered operator by name; the report and the tests iterate over it, so none is forgotten."""


class Implementation(NamedTuple):
    """One way to compute an operator. `supports` takes the operator's arguments; it returns None, or why not."""

    name: str
    run: Callable[..., Any]
    supports: Callable[..., str | None]


def always(*_: Any) -> None:
    """`supports` of an implementation that handles every case."""


class Operator:
    """An operator of the library `metakern`, with its implementations in order of preference."""

    def __init__(self, contract: Any, table: tuple[Implementation, ...]) -> None:
        """`contract` is the operator's module of that name: SCHEMA, check, fake, flops, example."""
        self.name = contract.SCHEMA.split("(", 1)[0]
        self.contract = contract
        self.check = contract.check
        self.table = table
        LIBRARY.define(contract.SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(self.name, self.run, device)
        # nothing to differentiate: without this autograd wraps every output and warns in the backward pass
        LIBRARY.impl(self.name, torch.library.fallthrough_kernel, "Autograd")

        def checked_fake(*arguments: Any, impl: str | None = None) -> Any:
            contract.check(*arguments)
            return contract.fake(*arguments)

        torch.library.register_fake(f"metakern::{self.name}", checked_fake, lib=LIBRARY)
        packet = getattr(torch.ops.metakern, self.name)
        register_flop_formula(packet, get_raw=True)(
            lambda *arguments, out_val=None, impl=None: contract.flops(*arguments)
        )
        self.overload = packet.default
        OPERATORS[self.name] = self

    def __call__(self, *arguments: Any, impl: str | None = None) -> Any:
        """Call through the dispatcher; reject inputs that autograd would have to track."""
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            raise ValueError(
                f"{self.name} has no derivative, and an input requires grad: call it under torch.no_grad() "
                "or pass detached tensors"
            )
        return self.overload(*arguments) if impl is None else self.overload(*arguments, impl=impl)

    def run(self, *arguments: Any, impl: str | None = None) -> Any:
        """The device kernel: check, choose, compute. Autograd never looks inside."""
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            with torch.no_grad():
                return self.run(*arguments, impl=impl)
        self.check(*arguments)
        chosen, first = self.choose(*arguments, impl=impl), arguments[0]
        if not first.is_cuda:
            return chosen.run(*arguments)
        with torch.cuda.device(first.device):  # kernels go to the current device, wherever the tensors are
            return chosen.run(*arguments)

    def choose(self, *arguments: Any, impl: str | None = None) -> Implementation:
        """The implementation that would run.

        Raises: ValueError for an unknown `impl`; RuntimeError if the requested one, or every one, rejects the case.
        """
        if impl is None:
            for candidate in self.table:
                if candidate.supports(*arguments) is None:
                    return candidate
        refusals: list[str] = []
        for candidate in self.table:
            if impl is not None and candidate.name != impl:
                continue
            reason = candidate.supports(*arguments)
            if reason is None:
                return candidate
            refusals.append(f"{candidate.name}: {reason}")
        if not refusals:
            names = ", ".join(repr(candidate.name) for candidate in self.table)
            raise ValueError(f"{self.name}(impl=...) must be None or one of {names}; got {impl!r}")
        raise RuntimeError(f"{self.name} cannot run here: " + "; ".join(refusals))

    def reasons(self, *arguments: Any) -> dict[str, str | None]:
        """For each implementation, None if it runs on these arguments, else why not."""
        return {candidate.name: candidate.supports(*arguments) for candidate in self.table}
