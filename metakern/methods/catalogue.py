"""The methods that can be named on the command line."""

from __future__ import annotations

from metakern.methods.hard_mining import HARD_MINING, HARD_MINING_AS_SHIPPED
from metakern.methods.learning_to_reweight import L2RW
from metakern.methods.method import Method
from metakern.methods.proportion import PROPORTION, PROPORTION_AS_SHIPPED
from metakern.methods.random_weights import RANDOM
from metakern.methods.resample import RESAMPLE
from metakern.methods.uniform import UNIFORM

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        UNIFORM,
        RANDOM,
        PROPORTION,
        PROPORTION_AS_SHIPPED,
        RESAMPLE,
        HARD_MINING,
        HARD_MINING_AS_SHIPPED,
        L2RW,
    )
}


def find(name: str) -> Method:
    """The method called `name`.

    Raises: ValueError listing the names when there is no such method.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; there are: {', '.join(METHODS)}")
    return METHODS[name]
