"""May the host look at a value on the device?"""

from __future__ import annotations

import torch
from torch import Tensor


def host_may_wait() -> bool:
    """False while a CUDA graph is being captured: values do not exist then, and checks of them are left out."""
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def finite_sum(values: Tensor) -> bool:
    """Is the sum of the values finite? Then all of them are; not the other way round. The host waits for it."""
    total = values.detach().sum()
    return bool(total - total == 0)
