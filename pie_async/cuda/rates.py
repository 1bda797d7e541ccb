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

_BACKLOG, _BOUNDARIES = 4, 64
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


def measure_boundary(driver: StreamDriver, *, size: int = _SIZE) -> float:
    """Seconds that compute loses between two layer groups: a launch, and a wait for an event of a
    copy stream between two events that time it, as the launcher issues them.

    They are issued behind products that take longer than issuing them does; otherwise the host's
    time would be measured.
    """
    factor = torch.ones(size, size, dtype=torch.bfloat16, device=driver.device)
    product, counter = torch.empty_like(factor), torch.zeros(1, device=driver.device)
    torch.mm(factor, factor, out=product)
    counter.add_(1)  # both once before: loading a kernel takes the host longer than the backlog
    driver.synchronize_device()  # all that was on torch's own stream
    compute, h2d = CudaStream("compute", driver), CudaStream("h2d", driver)
    try:
        with driver.torch_on(compute.handle):
            for _ in range(_BACKLOG):
                torch.mm(factor, factor, out=product)
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
    del factor, product, counter
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
