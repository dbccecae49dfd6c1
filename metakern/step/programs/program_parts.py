"""Split a graph into parts that run one after the other, each passing on what later ones need."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

from torch import Tensor, fx


class GraphPart(NamedTuple):
    """A graph that returns its results, whether the program is valid for this run, and values that later parts need."""

    graph: fx.GraphModule
    given: list[str]  # names of the inputs and kept values that it takes
    results: int
    kept: list[str]
    needed: frozenset[str]  # by later parts

    def keep(self, values: MutableMapping[str, Tensor], found: Sequence[Tensor]) -> None:
        """Add the values that it has computed, and free those that no later part needs."""
        values.update(zip(self.kept, found[self.results + 1 :], strict=True))
        for name in values.keys() - self.needed:
            del values[name]


def cut(graph: fx.GraphModule, sizes: Sequence[int]) -> list[GraphPart]:
    """Parts of a graph whose outputs are `sizes` results of each part, in order, with one more value after each.

    A part ends where that value is computed. Operations keep their order, so that in-place writes act as before.
    """
    (output,) = graph.graph.find_nodes(op="output")
    (outputs,) = output.args
    nodes = [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]
    ends = [sum(sizes[: k + 1]) + k for k in range(len(sizes))]  # where in the outputs each part's own value stands
    lasts = [nodes.index(outputs[end]) + 1 for end in ends[:-1]] + [len(nodes)]
    chunks = [nodes[start:end] for start, end in zip([0, *lasts], lasts)]
    results = [list(outputs[end - size : end + 1]) for size, end in zip(sizes, ends)]
    parts: list[GraphPart] = []
    needed: frozenset[str] = frozenset()
    for chunk, found in zip(reversed(chunks), reversed(results)):
        own = {node.name for node in chunk}
        used = {source.name: source for node in chunk for source in node.all_input_nodes if source.name not in own}
        used |= {node.name: node for node in found if node.name not in own}
        kept = [node for node in chunk if node.name in needed]
        part = _part(graph, chunk, list(used.values()), [*found, *kept])
        parts.append(GraphPart(part, list(used), len(found) - 1, [node.name for node in kept], needed))
        needed = (needed - own) | used.keys()
    return parts[::-1]


def _part(
    graph: fx.GraphModule, nodes: Sequence[fx.Node], given: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in given:
        copies[node] = part.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = part.node_copy(node, lambda source: copies[source])
    part.output([copies[node] for node in outputs])
    return fx.GraphModule(graph, part)
