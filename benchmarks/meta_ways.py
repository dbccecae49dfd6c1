"""One meta-step at the sizes of one case, by all ways: check, count, time; rows come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.cases import Case, Problem, problem_of
from benchmarks.meta_gate import MetaGate
from benchmarks.meta_peers import META_PEERS
from benchmarks.meta_steps import MetaStep, Run, Way, published
from benchmarks.providers import Outcome, Step
from benchmarks.rows import Row
from benchmarks.ways import Subject, measured


@dataclass(frozen=True)
class MetaCase:
    """A step at the sizes of a case."""

    step: MetaStep
    case: Case

    @property
    def name(self) -> str:
        return f"{self.step.name} {self.case.name}"

    @property
    def subject(self) -> Subject:
        return Subject(self.name, self.case.shapes, self.case.dtype)

    def network(self, device: str = "cpu") -> nn.Module | None:
        """The second network, where there is one, always with the same weights."""
        torch.manual_seed(1)
        return self.step.network(self.case.classes).to(device, self.case.dtype) if self.step.network else None


def compare_meta(
    meta: MetaCase,
    *,
    device: str = "cpu",
    seconds: float = 5.0,
    only: list[str] | None = None,
    also: Sequence[str] = (),
) -> list[Row]:
    """Rows in plain steps: by everybody and those that are asked for, or by some only."""
    problem, network = problem_of(meta.case, device), meta.network(device)
    usual = ways(meta.step)
    asked = ("plain", *only) if only else (*usual, *also)
    chosen = {name: way for name, way in (usual | meta.step.compiled).items() if name in asked}
    prepared = {name: lambda way=way: step_of(way, problem, network) for name, way in chosen.items()}
    gate = MetaGate(meta.step, problem, network)
    return measured(meta.subject, prepared, gate.judge, unit="plain", device=device, seconds=seconds)


def ways(step: MetaStep) -> dict[str, Way]:
    """The plain step, the published sequence, metakern's ways, and other libraries'."""
    peers = {name: partial(peer, step) for name, peer in META_PEERS.items()}
    return {"plain": _plain, "double_backward (published)": partial(_published, step), **step.ours, **peers}


def step_of(way: Way, problem: Problem, network: nn.Module | None) -> Step:
    """A way made ready; each of its steps finds no gradient in the way."""
    run = way(problem, network)

    def step() -> Outcome:
        for module in (problem.model, network):
            if module is not None:
                module.zero_grad(set_to_none=True)
        return Outcome(engine=run())

    return step


def _plain(problem: Problem, network: Any) -> Run:
    def run() -> str:
        problem.losses(problem.batch).mean().backward()
        return ""

    return run


def _published(step: MetaStep, problem: Problem, network: Any) -> Run:
    def run() -> str:
        published(step, problem.model, network, problem.batch, problem.meta_batch)
        return "double_backward"

    return run
