"""Nodes of a graph as examples: the inputs are node numbers, and the graph stays whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from metakern.data.examples import Examples, Source, Task
from metakern.data.long_tail import SHAPES
from metakern.data.planetoid import Graph, load_graph


@dataclass(frozen=True, kw_only=True)
class GraphSource(Source):
    """A source whose inputs[n] int64 are nodes of `graph`; the ids are the same numbers."""

    graph: Graph


@dataclass(frozen=True, kw_only=True)
class NodeTask(Task):
    """A task whose inputs[n] int64 are nodes of `graph`, all of which the model sees."""

    graph: Graph


def _nodes(graph: Graph, nodes: torch.Tensor) -> Examples:
    return Examples(nodes, graph.targets[nodes], nodes)


def graph_source(name: str, root: Path | None) -> GraphSource:
    """The graph called `name`, with the training and test nodes of the public split.

    Raises: as `load_graph`.
    """
    graph = load_graph(name, root)
    class_names = tuple(map(str, range(int(graph.targets.max()) + 1)))
    return GraphSource(name, _nodes(graph, graph.train), _nodes(graph, graph.test), class_names, graph=graph)


def node_task(
    source: GraphSource, *, factor: float = 1.0, shape: str = "step", meta_per_class: int = 10, seed: int = 0
) -> NodeTask:
    """Training nodes with class imbalance `factor`; the meta set is `meta_per_class` validation nodes of each class.

    Training, validation and test nodes are those of the public split, which do not overlap.
    Raises: ValueError if a class has fewer validation nodes, or shape is not one of SHAPES; as those.
    """
    if shape not in SHAPES:
        raise ValueError(f"node_task: shape must be one of {', '.join(SHAPES)}, got {shape!r}")
    graph, classes = source.graph, len(source.class_names)
    generator = torch.Generator().manual_seed(seed)
    validation = _nodes(graph, graph.validation)
    available = validation.counts(classes)
    if not 1 <= meta_per_class <= int(available.min()):
        raise ValueError(
            f"node_task: meta_per_class must be 1 to {int(available.min())}, the validation nodes of the smallest "
            f"class, got {meta_per_class}"
        )
    train_counts = source.train.counts(classes)
    counts = SHAPES[shape](train_counts, factor) if factor != 1 else train_counts

    def drawn(examples: Examples, counts: list[int]) -> Examples:
        parts = []
        for target, count in enumerate(counts):
            rows = (examples.targets == target).nonzero().squeeze(1)
            parts.append(rows[torch.randperm(len(rows), generator=generator)][:count])
        return examples.take(torch.cat(parts))

    train, meta = drawn(source.train, counts.tolist()), drawn(validation, [meta_per_class] * classes)
    name = source.name + f", imbalance {factor:g}" * (factor != 1)
    return NodeTask(name, train, meta, source.test, source.class_names, train.targets.clone(), graph=graph)
