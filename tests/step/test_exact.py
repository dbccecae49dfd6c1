"""Every layer and structure of the catalogue, by every engine, against the float64 loop over single examples."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map

import metakern
from metakern.testing.catalogue import CASES, Case, Setup
from metakern.testing.catalogue.case import Owes
from metakern.testing.judge import Snapshot, judge_step

pytestmark = [
    # torch itself says this of convolutions that need one column more on one side.
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
    pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True"),
]

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def hold(setup: Setup, owes: Owes, **keywords: Any) -> str | None:
    """Exact, or refused with nothing changed, as `owes` allows; returns the engine that served."""
    before = Snapshot.of(setup.model)
    try:
        judgement = judge_step(metakern.l2rw_step, setup, **keywords)
    except NotImplementedError as error:
        refusal = str(error)
    else:
        assert owes != "refuse", "served what it must refuse"
        return judgement.result.engine
    assert owes != "exact", f"refused: {refusal}"
    before.assert_unchanged(setup.model)
    assert len(refusal) > 40, "a refusal must say what to do"
    return None


@every_case
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_ghost(case: Case, memory: str) -> None:
    hold(case.make(6, 3), case.ghost, engine="ghost", memory=memory)


@every_case
def test_jvp(case: Case) -> None:
    hold(case.make(6, 3), case.jvp, engine="jvp")


@every_case
def test_double_backward(case: Case) -> None:
    hold(case.make(6, 3), "either", engine="double_backward")


@every_case
def test_auto(case: Case) -> None:
    engine = hold(case.make(6, 3), case.auto, engine="auto")
    assert case.ghost != "exact" or engine == "ghost", "auto took a dearer engine than it needed"


@every_case
@pytest.mark.parametrize(("n", "m"), [(1, 1), (1, 4), (4, 1), (5, 7), (3, 3)])
def test_sizes(case: Case, n: int, m: int) -> None:
    """One example, one meta example, odd sizes, and n equal to a number of positions or channels."""
    if n == 1 and case.auto == "exact" and case.name == "routed-examples":
        pytest.skip("one of the experts gets no example")
    hold(case.make(n, m), case.auto, engine="auto")


@every_case
def test_one_model_many_batches(case: Case) -> None:
    """What is learnt about a model in one step must still hold in the next, whatever the size of the batch."""
    first = case.make(6, 3)
    hold(first, case.auto, engine="auto")
    for n, m in ((4, 2), (6, 3), (2, 5)):
        setup = case.make(n, m)
        setup.model = first.model
        first.model.zero_grad()
        hold(setup, case.auto, engine="auto")


@every_case
def test_float32(case: Case) -> None:
    setup = case.make(6, 3)
    truth = setup.oracle()
    setup.model.float()
    setup.batch, setup.meta_batch = (
        tuple(part.float() if part.is_floating_point() else part for part in batch)
        for batch in (setup.batch, setup.meta_batch)
    )
    plain = setup.oracle(dtype=torch.float32)
    try:
        judge_step(metakern.l2rw_step, setup, truth=setup.oracle(), plain=plain)
    except NotImplementedError:
        assert case.auto != "exact"
    assert truth.dots.shape == (6,)


def on_a_gpu(setup: Setup, dtype: torch.dtype) -> Setup:
    """The same model and batches there."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to("cuda", dtype) if leaf.is_floating_point() else leaf.cuda()

    batch, meta_batch = tree_map(moved, (setup.batch, setup.meta_batch))
    return replace(setup, model=setup.model.to("cuda", dtype), batch=batch, meta_batch=meta_batch)


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_cudnn")
@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_auto_on_a_gpu(case: Case, dtype: torch.dtype) -> None:
    """In float64 by the library's products, in float32 by the kernels of the tensor cores."""
    setup = on_a_gpu(case.make(6, 3), dtype)
    if dtype == torch.float64:
        hold(setup, case.auto)
    else:
        hold(setup, case.auto, truth=setup.oracle(), plain=setup.oracle(dtype=dtype))
