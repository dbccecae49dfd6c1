"""Stage 4: sum_n w_n g_n from what capture kept, without a second forward or backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from metakern.capture.host import may_look_at_values
from metakern.capture.record import Call, Record
from metakern.layers.rule import Weights
from metakern.layers.table import rule_for
from metakern.layers.total import Total
from metakern.layers.total import added as added


def weighted_gradients(
    records: Iterable[Record], derivations: Sequence[Call], weights: Tensor, trainable: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """sum_n w_n dl_n/dtheta for every trainable parameter, by name; rows of weight zero are not multiplied.

    Shapes and dtypes are those of the parameters. Records are consumed one at a time and not kept. A table that is used
    only by look-ups with sparse=True gets a sparse gradient.
    """
    total = Total()
    given = Weights(weights, _nonzero(weights), total)
    if given.kept is not None and given.kept.numel() == 0:
        records = _sparse_alone(records)
    for record in records:
        rule = rule_for(record.call)
        for key, grad in rule.weighted_grads(record, given).items():
            total.add(key, grad, rule.fresh)
    _through_derivations(derivations, total, trainable)
    found = total.found
    return {name: _like(found[id(p)], p) if id(p) in found else torch.zeros_like(p) for name, p in trainable.items()}


def _nonzero(weights: Tensor) -> Tensor | None:
    """Indices of non-zero weights; None in a CUDA graph, which cannot wait for them, and in a trace of fixed sizes."""
    return weights.nonzero().squeeze(1) if may_look_at_values() else None


def _through_derivations(derivations: Sequence[Call], total: Total, trainable: Mapping[str, nn.Parameter]) -> None:
    """Pass gradients of derived tensors on to the parameters that they were made from."""
    derived = [t for call in derivations for t in call.outputs if t is not None and id(t) in total.found]
    if not derived:
        return
    grads = [total.found[id(t)].to_dense().to(t.dtype).view_as(t) for t in derived]
    # The graph is kept: after a virtual step, the gradient for a second set of weights is needed.
    found = torch.autograd.grad(derived, list(trainable.values()), grads, retain_graph=True, allow_unused=True)
    for parameter, grad in zip(trainable.values(), found):
        if grad is not None:
            total.add(id(parameter), grad)


def _sparse_alone(records: Iterable[Record]) -> list[Record]:
    """Records of tables that get a sparse gradient and that nothing else uses."""
    sparse, dense = list[Record](), set[int]()
    for record in records:
        if rule_for(record.call).sparse(record.call):
            sparse.append(record)
        else:
            dense.update(id(p) for _, p in record.call.parameters)
    return [record for record in sparse if all(id(p) not in dense for _, p in record.call.parameters)]


def _like(grad: Tensor, parameter: Tensor) -> Tensor:
    grad = grad.to(parameter.dtype)
    return grad if grad.is_sparse or grad.shape == parameter.shape else grad.view_as(parameter)
