"""Numbers between host and device without waiting for the device.

Through pinned memory, which torch keeps and reuses once the copy is done. On the CPU nothing
is copied twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(
    numbers: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.tensor(numbers, dtype=dtype, device=device)`, ordered on the current stream."""
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=dtype)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """The tensor on the host; its numbers are there once the current stream got so far."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
