"""Numbers between host and device without waiting for the device.

Through pinned memory that a kernel of the current stream reads or writes. A copy engine would
do, but it does one thing after another: behind staged KV a few kilobytes of token ids would
wait for a millisecond, and the iteration with them (H200). On the CPU nothing is copied twice.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_TYPESTR = {
    torch.int32: "<i4",
    torch.int64: "<i8",
    torch.float32: "<f4",
    torch.float64: "<f8",
}


def upload(
    numbers: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.tensor(numbers, dtype=dtype, device=device)`, ordered on the current stream."""
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=dtype)
    host = torch.tensor(numbers, dtype=dtype, pin_memory=True)
    there = torch.empty_like(host, device=device)
    if host.numel():
        copy(seen_by_gpu(host, device), there)
        _keep(host)
    return there


def download(tensor: Tensor) -> Tensor:
    """The tensor on the host; its numbers are there once the current stream got so far."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    if host.numel():
        copy(tensor, seen_by_gpu(host, tensor.device))
        _keep(host)
    return host


def copy(source: Tensor, destination: Tensor) -> None:
    """By a kernel: what torch calls a copy may go to a copy engine."""
    torch.add(source, 0, out=destination)


def seen_by_gpu(host: Tensor, device: torch.device) -> Tensor:
    """Pinned memory as a tensor that kernels can use; it does not own the memory.

    Args:
        host: contiguous, int32, int64, float32 or float64.
    """
    view = torch.as_tensor(_Pinned(host), device=device)
    assert view.data_ptr() == host.data_ptr(), "the GPU would work on a copy"
    return view


class _Pinned:
    """The memory as other libraries see it (the CUDA Array Interface, version 3)."""

    def __init__(self, host: Tensor) -> None:
        assert host.is_pinned() and host.is_contiguous()
        self.__cuda_array_interface__ = {
            "shape": tuple(host.shape),
            "typestr": _TYPESTR[host.dtype],
            "data": (host.data_ptr(), False),
            "version": 3,
        }


class _InUse(threading.local):
    """Pinned tensors that issued kernels still use, oldest first; torch knows nothing of it."""

    def __init__(self) -> None:
        self.tensors: deque[tuple[torch.cuda.Event, Tensor]] = deque()


_in_use = _InUse()


def _keep(host: Tensor) -> None:
    """Until the current stream got so far."""
    event = torch.cuda.Event()
    event.record()
    tensors = _in_use.tensors
    tensors.append((event, host))
    while tensors[0][0].query():
        tensors.popleft()
        if not tensors:
            return
