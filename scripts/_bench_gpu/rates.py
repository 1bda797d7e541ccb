"""The dense matrix product that prefill is held against."""

from __future__ import annotations

import torch

from pie_async.cuda.rates import measure_rates

_CPU_SIZE = 512


class _CpuDriver:
    """The part of the driver that measuring uses, for smoke tests without a GPU."""

    device = torch.device("cpu")

    def synchronize_device(self) -> None:
        """The CPU is never behind."""

    def trim(self) -> None:
        """Nothing is kept."""


def dense_flops_per_s(device: str, dtype: torch.dtype) -> float:
    """Of a product of two large square matrices, measured now."""
    if device != "cuda":
        return measure_rates(_CpuDriver(), dtype, size=_CPU_SIZE, copy_bytes=2**20).flops_per_s
    from pie_async.cuda.errors import require_cuda

    require_cuda()
    from pie_async.cuda.driver import Driver

    driver = Driver(torch.device("cuda"))
    try:
        return measure_rates(driver, dtype).flops_per_s
    finally:
        driver.close()
