"""May the host look at a value, and does it stand for that of every step?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode


def host_may_wait() -> bool:
    """False while a CUDA graph is being captured: values do not exist then, and checks of them are left out."""
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def is_traced() -> bool:
    """True while a step is made into a program, which will run on other values."""
    return get_proxy_mode() is not None


def finite_sum(values: Tensor) -> bool:
    """Is the sum of the values finite? Then all of them are; not the other way round. The host waits for it."""
    total = values.detach().sum()
    return bool(total - total == 0)
