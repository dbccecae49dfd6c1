"""Where only dots are wanted, an unused parameter is an error all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

import metakern
from metakern.testing import inputs

BATCH, META_BATCH = inputs.pair(8, 4, 5, classes=3)


class Unused(nn.Module):
    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5) if norm else nn.Identity()
        self.layer, self.unused = nn.Linear(5, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x))


def tangents(model: nn.Module, batch: Any, meta_batch: Any, **options: Any) -> Any:
    return metakern.logit_tangents(model, batch, meta_batch, allow_unused=options.get("allow_unused", False))


@pytest.mark.parametrize("function", [metakern.grad_dots, tangents])
@pytest.mark.parametrize("engine", ["auto", "jvp", "double_backward"])
@pytest.mark.parametrize("pairwise", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_it_is_named(function: Callable[..., Any], engine: str, pairwise: bool, norm: bool) -> None:
    model, options = Unused(norm=norm).double(), {"engine": engine, "pairwise": pairwise}
    for _ in range(2):  # the first one is looked at more closely
        with pytest.raises(ValueError, match=r"'unused\.weight'"):
            function(model, BATCH, META_BATCH, **options)
    function(model, BATCH, META_BATCH, allow_unused=True, **options)
