"""`metakern check module:function`: the check of one's own model, with an exit status for continuous integration."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from metakern.check import check
from metakern.planning import explain


def check_target(target: str, *, examples: int = 8, explained: bool = False, allow_unused: bool = False) -> int:
    """Print the report of `check` on what `target` returns; 0 if exact, 1 if not or if no engine serves.

    `target` is "module:function" or "FILE.py:function".
    Raises: ValueError if the target cannot be imported or does not return (model, batch, meta_batch[, loss_fn]).
    """
    model, batch, meta_batch, loss_fn = _made(target)
    try:
        if explained:
            print(explain(model, batch, meta_batch, loss_fn=loss_fn, allow_unused=allow_unused), end="\n\n")
        report = check(model, batch, meta_batch, loss_fn=loss_fn, examples=examples, allow_unused=allow_unused)
    except NotImplementedError as refusal:
        print(f"rejected: {refusal}")
        return 1
    print(report)
    return 0 if report.ok else 1


def _made(target: str) -> tuple[nn.Module, Any, Any, Any]:
    module, _, name = target.rpartition(":")
    if not (module and name):
        raise ValueError(
            f"check wants module:function or FILE.py:function, as in models/mine.py:example; got {target!r}"
        )
    try:
        function = getattr(_imported(module), name)
    except (ModuleNotFoundError, FileNotFoundError, AttributeError) as error:
        raise ValueError(f"check cannot find {target!r}: {error}") from error
    made = function()
    if not isinstance(made, tuple) or len(made) not in (3, 4) or not isinstance(made[0], nn.Module):
        got = tuple(type(part).__name__ for part in made) if isinstance(made, tuple) else type(made).__name__
        raise ValueError(
            f"{target} must return (model, batch, meta_batch) or (model, batch, meta_batch, loss_fn): {got}"
        )
    return (*made, None) if len(made) == 3 else made


def _imported(module: str) -> ModuleType:
    """The module of that name, or in the file of that name; what lies beside it can be imported, as in a script."""
    path = Path(module)
    beside = str(path.parent.absolute() if path.suffix == ".py" else Path.cwd())
    if beside not in sys.path:
        sys.path.insert(0, beside)
    if path.suffix != ".py":
        return importlib.import_module(module)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    made = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
    spec.loader.exec_module(made)
    return made
