"""`metakern check module:function`: the check of one's own model, with an exit status for continuous integration."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from metakern.check import check
from metakern.planning import explain


def check_target(target: str, *, examples: int = 8, explained: bool = False, allow_unused: bool = False) -> int:
    """Print the report of `check` on what `module:function` returns; 0 if exact, 1 if not or if no engine serves.

    Raises: ValueError if the target cannot be imported or does not return (model, batch, meta_batch[, loss_fn]).
    """
    model, batch, meta_batch, loss_fn = _made(target)
    try:
        if explained:
            print(explain(model, batch, meta_batch, loss_fn=loss_fn, allow_unused=allow_unused), end="\n\n")
        report = check(model, batch, meta_batch, loss_fn=loss_fn, examples=examples, allow_unused=allow_unused)
    except NotImplementedError as refusal:
        print(f"refused: {refusal}")
        return 1
    print(report)
    return 0 if report.ok else 1


def _made(target: str) -> tuple[nn.Module, Any, Any, Any]:
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise ValueError(f"check wants module:function, as in mypackage.models:example; got {target!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as python -m does
    try:
        function = getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"check cannot find {target!r}: {error}") from error
    made = function()
    if not isinstance(made, tuple) or len(made) not in (3, 4) or not isinstance(made[0], nn.Module):
        got = tuple(type(part).__name__ for part in made) if isinstance(made, tuple) else type(made).__name__
        raise ValueError(
            f"{target} must return (model, batch, meta_batch) or (model, batch, meta_batch, loss_fn): {got}"
        )
    return (*made, None) if len(made) == 3 else made
