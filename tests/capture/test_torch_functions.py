"""Differentiable functions of torch's own database, on samples of its own: exact, or refused and nothing changed.

A sample's first tensor of two rows and more is the batch; the others are data, and in a second case parameters.
"""

import random
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

import metakern
from metakern.capture.refusal import EngineUnavailable
from metakern.testing.catalogue.case import Setup
from metakern.testing.judge import Snapshot, judge_step

pytest.importorskip("expecttest", reason="torch's database of functions needs it")

_switches = torch.backends.flags_frozen.__globals__
_before = dict(_switches)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.opinfo.core import OpInfo
_switches.update(_before)  # the import forbids the process to set flags of backends, as torch's own tests want it

SETUPS = 4
LEFT_OUT = {
    **dict.fromkeys("bfloat16 half float cfloat chalf".split(), "its numbers are rounded, in a backward pass as well"),
    **dict.fromkeys(("sparse.mm", "sparse.sampled_addmm"), "sparse inputs have no rows"),
    **dict.fromkeys(("sort", "msort", "mode", "grid_sampler_3d"), "a sample takes longer than all others together"),
    "matrix_exp": "torch's backward pass is a series that is cut off by the size of the gradient",
    "nn.functional.multi_head_attention_forward": "softmax of thousands, at which fused and plain attention differ",
}
FUNCTIONS = [op for op in op_db if op.supports_autograd and op.name not in LEFT_OUT]


class Applied(nn.Module):
    """Rows x * a + b through the function, in the place `at` of its arguments; some of the others are parameters."""

    def __init__(self, op: OpInfo, leaves: Sequence[Any], form: TreeSpec, at: int, trained: Sequence[int]) -> None:
        super().__init__()
        self.op, self.leaves, self.form, self.at = op.op, [_plain(leaf) for leaf in leaves], form, at
        self.scale = nn.Parameter(torch.ones(leaves[at].shape[1:], dtype=torch.float64))
        self.shift = nn.Parameter(torch.zeros(leaves[at].shape[1:], dtype=torch.float64))
        self.trained = nn.ParameterDict({str(i): nn.Parameter(_plain(leaves[i]).clone()) for i in trained})

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        hidden, leaves = x * self.scale + self.shift, list(self.leaves)
        for place, parameter in self.trained.items():
            leaves[int(place)] = parameter
        leaves[self.at] = hidden
        first, args, kwargs = tree_unflatten(leaves, self.form)
        outputs = [t for t in tree_leaves(self.op(first, *args, **kwargs)) if isinstance(t, Tensor) and t.numel()]
        outputs = [torch.view_as_real(t) if t.is_complex() else t for t in outputs]
        return hidden, [t for t in outputs if t.is_floating_point()]


def _plain(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def losses(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    """Of what has the rows of the batch, an uneven sum in every row; of anything else, times what the row holds."""
    hidden, outputs = model(*batch)
    own = hidden.flatten(1).mean(1) if hidden.dim() > 1 else hidden
    total = 0.3 * own
    for output in outputs:
        rows = output.shape[0] if output.dim() else 0
        flat = output.reshape(rows, -1) if rows == len(hidden) else output.reshape(1, -1)
        uneven = torch.linspace(0.5, 1.5, flat.shape[1], dtype=flat.dtype)
        sums = (flat * uneven + 0.1 * flat.square()).mean(1)
        total = total + (sums if rows == len(hidden) else sums * own)
    return total


def setups(op: OpInfo) -> Iterator[Setup]:
    """Of samples in a random order that have rows."""
    samples = list(islice(op.sample_inputs("cpu", torch.float64, requires_grad=False), 100))
    for sample in random.Random(op.name).sample(samples, len(samples)):
        leaves, form = tree_flatten((sample.input, tuple(sample.args), dict(sample.kwargs)))
        real = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.dtype == torch.float64 and t.numel()]
        at = next((i for i in real if leaves[i].dim() and len(leaves[i]) > 1), None)
        if at is None:
            continue
        others = [i for i in real if i != at]
        for trained in ([], others) if others else ([],):
            rows = leaves[at].detach()
            model = Applied(op, leaves, form, at, trained)
            yield Setup(model, (rows.clone(),), (rows.roll(1, 0),), losses, interacting=True)


def usable(setup: Setup) -> bool:
    """Is there a truth to hold a step against: finite losses, the same at each call, with gradients? What gets none is
    frozen.
    """
    try:
        first, again = (losses(setup.model, setup.batch) for _ in range(2))
        for parameter in setup.model.parameters():
            parameter.requires_grad_(_has_gradient(first, parameter))
        truth = setup.oracle()
    except (RuntimeError, NotImplementedError, ValueError, IndexError, TypeError):
        return False  # not differentiable so, or not of these values
    return torch.equal(first, again) and all(t.isfinite().all() for t in (first, truth.dots, truth.example_norms))


def _has_gradient(values: Tensor, parameter: Tensor) -> bool:
    ones = torch.ones_like(values)
    return torch.autograd.grad(values, parameter, ones, retain_graph=True, allow_unused=True)[0] is not None


@pytest.mark.parametrize("op", FUNCTIONS, ids=lambda op: op.formatted_name)
@pytest.mark.filterwarnings("ignore")
def test_exact_or_refused(op: OpInfo) -> None:
    torch.manual_seed(0)
    found = list(islice(filter(usable, setups(op)), SETUPS))
    if not found:
        pytest.skip("no sample has rows and a derivative")
    for setup in found:
        for keywords in ({}, {"memory": "two_pass"}, {"engine": "jvp"}):
            before = Snapshot.of(setup.model)
            try:
                judge_step(metakern.l2rw_step, setup, **keywords)
            except (EngineUnavailable, NotImplementedError, ValueError):
                before.assert_unchanged(setup.model)
            setup.model.zero_grad()
