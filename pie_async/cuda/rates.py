"""How fast this card multiplies, reads and goes from one layer group to the next, measured in a
few milliseconds."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from pie_async.cuda.streams import CudaStream

if TYPE_CHECKING:
    from pie_async.cuda.driver import Driver as StreamDriver

_BOUNDARIES = 64
_BACKLOG_S = 0.01
"""Longer than issuing the boundaries takes the host, whose time would be measured otherwise."""
_SIZE = 8192
_COPY_BYTES = 2**30
_ROUNDS = 5


class Driver(Protocol):
    """What measuring asks of `cuda/driver.py`."""

    @property
    def device(self) -> torch.device: ...
    def synchronize_device(self) -> None: ...
    def trim(self) -> None: ...


class Rates(NamedTuple):
    """Of large operations."""

    flops_per_s: float
    read_bytes_per_s: float
    """A copy's, its reads and writes counted."""


def measure_rates(
    driver: Driver, dtype: torch.dtype, *, size: int = _SIZE, copy_bytes: int = _COPY_BYTES
) -> Rates:
    """A product of two [size, size] matrices and a copy; gives the memory back."""
    product_s = _product_s(driver, dtype, size)
    copy_s = _copy_s(driver, copy_bytes)
    driver.trim()
    return Rates(2 * size**3 / product_s, copy_bytes / copy_s)


def measure_boundary(driver: StreamDriver) -> float:
    """Seconds that compute loses between two layer groups: a launch, and a wait for an event of a
    copy stream between two events that time it, as the launcher issues them."""
    counter = torch.zeros(1, device=driver.device)
    counter.add_(1)  # once before: loading a kernel takes the host longer than a backlog lasts
    driver.synchronize_device()  # it was on torch's own stream
    compute, h2d = CudaStream("compute", driver), CudaStream("h2d", driver)
    try:
        compute.delay(_BACKLOG_S)
        with driver.torch_on(compute.handle):
            began = last = compute.record()
            for _ in range(_BOUNDARIES):
                compute.wait(h2d.record())
                compute.note_work()
                counter.add_(1)
                last = compute.record()
        compute.await_event(last)
        if last.fault is not None:
            raise last.fault
    finally:
        driver.synchronize_device()
        compute.close()
        h2d.close()
    del counter
    driver.trim()
    took_s = last.busy_s + last.waited_s - began.busy_s - began.waited_s
    return took_s / _BOUNDARIES


def _product_s(driver: Driver, dtype: torch.dtype, size: int) -> float:
    left = torch.randn(size, size, dtype=dtype, device=driver.device)
    right = torch.randn(size, size, dtype=dtype, device=driver.device)
    return _seconds(driver, lambda: torch.mm(left, right))


def _copy_s(driver: Driver, copy_bytes: int) -> float:
    """Half of the bytes are read, half written."""
    source = torch.zeros(copy_bytes // 2, dtype=torch.uint8, device=driver.device)
    destination = torch.empty_like(source)
    return _seconds(driver, lambda: destination.copy_(source))


def _seconds(driver: Driver, work: Callable[[], object]) -> float:
    """One of several runs in a row, after one that does not count."""
    work()
    driver.synchronize_device()
    began_s = time.perf_counter()
    for _ in range(_ROUNDS):
        work()
    driver.synchronize_device()
    return (time.perf_counter() - began_s) / _ROUNDS
