"""Peak memory of a plain step and of the ghost engine's, foretold from the sizes of what their passes keep.

Whole batches or by parts; forward mode's is in `forward_mode_memory.py`.

A backward pass is followed from use to use: what autograd still keeps, the output gradients and gradients of parameters
that are there already, and what is on its way. Buffers inside kernels and what an allocator wastes are not in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from metakern.planning.kept_pass import KeptPass, Sizes, total


class Memory(NamedTuple):
    """Bytes at the peak, beyond those before the step. The largest of four phases is that of memory="reuse"."""

    plain: int  # a plain step
    train: int  # the train pass back to its first use: what autograd keeps, every A, every B met so far
    meta: int  # every A and B, and a pass of the meta batch
    dots: int  # every A and B, V, and the meta records of the pairs form
    gradient: int  # every A and B not taken yet, and the gradients that are there
    two_pass: int  # the largest phase of memory="two_pass"

    @property
    def reuse(self) -> int:
        return max(self.train, self.meta, self.dots, self.gradient)


def foretold(
    train: KeptPass, meta: KeptPass, without_v: Collection[int], traced: bool, paired: Collection[int]
) -> Memory:
    """The peaks of a step.

    Args:
        without_v: identities of the parameters that V is not formed for: pairs serve them, or no dots run over them.
        traced: whether the pass of the meta batch is traced for pairs, which holds every A of it.
        paired: uses of the meta pass whose A and B stay for the pairs form.
    """
    uses = range(len(train.outputs))
    graph, records = sum(graph_of(train, total(train.inputs)).values()), train.records()
    meta_pass = backward_peak(meta, total(meta.inputs) if traced else {}, paired, without_v)
    v = gradients(meta, 0, without_v) + sum(total(meta.inputs[j] for j in paired).values())
    v += sum(meta.outputs[j] for j in paired)
    plain = backward_peak(train, {}, (), ())
    left = (train.records(k + 1) for k in uses)
    further = ((train.sums[k] - 1) * sum(_waiting(train, k).values()) for k in uses)
    return Memory(
        plain=plain,
        train=_record_peak(train),
        meta=records + meta_pass,
        dots=records + v,
        gradient=max((gradients(train, k, ()) + sum(held) for k, held in enumerate(zip(left, further))), default=0),
        two_pass=max(graph + meta_pass, graph + v + _passing(train), plain),
    )


def foretold_by_parts(
    train: KeptPass, meta: KeptPass, without_v: Collection[int], parts: float, meta_parts: float
) -> Memory:
    """The peaks of a step with `micro_batch`: V first, then the dots of each part beside it, then its gradient.

    Args:
        train, meta: of one part of either batch.
        parts, meta_parts: how many parts there are, or 1.
    """
    v, parameters = gradients(meta, 0, without_v), total(train.parameters)
    meta_pass, gradient = backward_peak(meta, {}, (), without_v), backward_peak(train, {}, (), ())
    meta_two_pass = meta_pass
    if meta_parts > 1:  # beside the sum of the parts before and the last of them; and one for the proof of independence
        meta_two_pass = 2 * v + max(meta_pass, sum(graph_of(meta).values()))
        meta_pass = 2 * v + max(meta_pass, _record_peak(meta))
    if parts > 1:
        summed = sum(parameters.values())
        gradient = summed + max(gradient, summed + max(parameters.values(), default=0))
    in_passing = v + sum(graph_of(train).values()) + _passing(train)
    return Memory(
        plain=backward_peak(_times(parts, train), {}, (), ()),
        train=v + _record_peak(train),
        meta=meta_pass,
        dots=v + train.records(),
        gradient=gradient,
        two_pass=max(meta_two_pass, in_passing, gradient),
    )


def _record_peak(kept: KeptPass) -> int:
    """Of a backward pass to every B."""
    return backward_peak(kept, total(kept.inputs[k] for k in kept.recorded), kept.recorded, None)


def _times(parts: float, kept: KeptPass) -> KeptPass:
    """A pass of so many times as many examples."""

    def grown(found: Sizes) -> Sizes:
        return {key: round(parts * size) for key, size in found.items()}

    return kept._replace(
        saved=[list(map(grown, some)) for some in kept.saved],
        inputs=list(map(grown, kept.inputs)),
        outputs=[round(parts * size) for size in kept.outputs],
        downwards=[round(parts * size) for size in kept.downwards],
        loss=round(parts * kept.loss),
    )


def _passing(kept: KeptPass) -> int:
    """The largest B on its way, with the gradient of A that is made of it."""
    return max((size + max(below, size) for size, below in zip(kept.outputs, kept.downwards)), default=0)


def backward_peak(kept: KeptPass, held: Sizes, outputs: Collection[int], without: Collection[int] | None) -> int:
    """The largest sum of a backward pass, with what is `held` all the while.

    B of the uses `outputs` stays; gradients are formed of all parameters but those `without`, or of none.
    """
    peak = sum(graph_of(kept, held).values()) + kept.loss
    for k in reversed(range(len(kept.outputs))):
        staying = sum(kept.outputs[j] for j in outputs if j > k)
        staying += 0 if without is None else gradients(kept, k, without)
        waiting = {} if without is None else _waiting(kept, k, without)
        second, below = sum(waiting.values()), kept.downwards[k]
        own = kept.outputs[k] if k in outputs else 0
        earlier = total(_flat(kept.saved[:k]), held)
        at = sum(total(kept.saved[k], earlier).values()) + kept.outputs[k] + below + second
        adding = sum(total(_others(kept, k), earlier).values()) + own + below + second + _sums(kept, k, waiting)
        # On the way to the use before, the last operation has its output's gradient and makes its input's, while what
        # it saved, first of all since that use, is still there.
        between = sum(total(kept.saved[k][:1], earlier).values()) + own + (2 * kept.outputs[k - 1] if k else 0)
        peak = max(peak, staying + max(at, adding, between))
    return peak


def _others(kept: KeptPass, k: int) -> Sequence[Sizes]:
    """Saved since the use before, and not by use k itself, which saves its input last."""
    parts = [part for part in kept.saved[k] if part]
    return parts[:-1] if parts and parts[-1].keys() <= kept.inputs[k].keys() else parts


def _waiting(kept: KeptPass, k: int, without: Collection[int] = ()) -> Sizes:
    """Gradients of parameters of use k that later uses gave: there when its own are made, and added to them."""
    later = total(kept.parameters[k + 1 :])
    return {key: size for key, size in kept.parameters[k].items() if key in later and key not in without}


def _sums(kept: KeptPass, k: int, waiting: Sizes) -> int:
    """What sums take beside their terms. Autograd adds to the gradient that waits, unless that is a view: the first one
    of a weight that is transposed.
    """
    later = [(key, kept.views[j]) for j in range(k + 1, len(kept.outputs)) for key in kept.parameters[j]]
    times = Counter(key for key, _ in later)
    return sum(waiting[key] for key, view in later if view and key in waiting and times[key] == 1)


def graph_of(kept: KeptPass, held: Sizes | None = None) -> Sizes:
    """All that autograd keeps of a pass, with what is `held` beside it."""
    return total(_flat(kept.saved), held)


def gradients(kept: KeptPass, k: int, without: Collection[int]) -> int:
    """Gradients of parameters that are there once the backward pass has come down to use k."""
    return sum(size for key, size in total(kept.parameters[k:]).items() if key not in without)


def _flat(saved: Iterable[Iterable[Sizes]]) -> Iterable[Sizes]:
    return (part for parts in saved for part in parts)
