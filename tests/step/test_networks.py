"""Whole networks of the catalogue: residual with either normalisation, ConvNeXt-like, transformer, over one graph."""

import pytest

import metakern
from metakern.testing.catalogue import NETWORKS, Case
from metakern.testing.judge import Snapshot, judge_step

every_network = pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.name)


@every_network
@pytest.mark.parametrize("memory", ["reuse", "two_pass"])
def test_auto(case: Case, memory: str) -> None:
    judgement = judge_step(metakern.l2rw_step, case.make(4, 2), memory=memory)
    assert judgement.result.engine == ("ghost" if case.ghost == "exact" else "jvp")


@every_network
def test_ghost_refuses_what_it_cannot_do(case: Case) -> None:
    if case.ghost == "exact":
        pytest.skip("ghost serves it")
    setup = case.make(4, 2)
    before = Snapshot.of(setup.model)
    with pytest.raises(NotImplementedError, match="interact"):
        metakern.l2rw_step(setup.model, setup.batch, setup.meta_batch, loss_fn=setup.loss_fn, engine="ghost")
    before.assert_unchanged(setup.model)
