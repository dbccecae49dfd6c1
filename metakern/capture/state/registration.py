"""Parameters that a forward pass makes, as in layers built on the first batch: the step would miss them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules import module as registration

from metakern.capture.members import modules_of, name_of


@contextmanager
def nothing_registered(model: nn.Module, known: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside the block, no module of the model may get a trainable parameter that is not among `known`.

    Raises: ValueError before it gets one; lazy modules keep the parameters that they have.
    """

    def parameter(owner: nn.Module, name: str, value: nn.Parameter) -> None:
        if type(value) is Tensor:
            return  # replaces a parameter for one pass
        if value.requires_grad and all(value is not p for p in known) and owner in modules_of(model):
            where = ".".join(filter(None, (name_of(model, owner), name)))
            raise ValueError(
                f"parameter '{where}' was registered while the step was running, so it would have neither dots nor a "
                "gradient; make it before: if the first forward pass does so, run the model on a batch once"
            )

    def module(owner: nn.Module, name: str, value: nn.Module | None) -> None:
        for inner, p in () if value is None else value.named_parameters():
            parameter(owner, f"{name}.{inner}", p)

    handles = (
        registration.register_module_parameter_registration_hook(parameter),
        registration.register_module_module_registration_hook(module),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
