"""A small CUDA device with a random model, on a GPU or on a driver that stands in for one."""

from __future__ import annotations

from pathlib import Path

import torch

from pie_async.cuda.device import CudaDevice
from pie_async.cuda.errors import require_cuda
from pie_async.cuda.plain_runner import PlainRunner
from pie_async.errors import ConfigError, DeviceFault
from support.cpu_rig import random_decoder
from support.device_rigs import DEVICE_SLOTS, HOST_SLOTS, LAYOUT, SLOW_LINK_BYTES_PER_S, Rig
from support.fake_cuda_driver import FakeDriver

CHUNK_BYTES = 5 * LAYOUT.block_bytes
"""So small that the host pool has several chunks."""


def why_no_cuda() -> str | None:
    """What is missing for tests on a GPU; None where they can run."""
    try:
        require_cuda()
    except ConfigError as error:
        return str(error)
    return None


def slow_driver():
    """The real driver, with a link as slow as the contract suite's."""
    from pie_async.cuda.driver import Driver

    class SlowDriver(Driver):
        def copy(self, copies, stream: int) -> None:
            num_bytes = int(copies[2].sum())
            with self.torch_on(stream):
                # in clock cycles, of which no GPU has more than 3e9 a second
                torch.cuda._sleep(int(num_bytes / SLOW_LINK_BYTES_PER_S * 3e9))
            super().copy(copies, stream)

    return SlowDriver(torch.device("cuda"))


def cuda_device(
    directory: Path, driver, *, poisons: bool = False, in_neighbour: bool = False
) -> CudaDevice:
    """Not yet started; `directory` is scratch space."""
    device = CudaDevice(
        driver,
        LAYOUT,
        device_slots=DEVICE_SLOTS,
        host_slots=HOST_SLOTS,
        staging_slots=HOST_SLOTS,
        dtype=torch.float32,
        chunk_bytes=CHUNK_BYTES,
        poisons=poisons,
        in_neighbour=in_neighbour,
    )
    device.load(
        PlainRunner(
            random_decoder(directory, driver.device),
            device.arena.layers,
            lanes=4,
            max_blocks=16,
            block_tokens=LAYOUT.block_tokens,
        )
    )
    return device


def cuda_rig(directory: Path, driver=None, *, in_neighbour: bool = False) -> Rig:
    """The CUDA device on a GPU, unless a driver is given.

    Args:
        in_neighbour: the pool lies in a GPU's memory, here that of the same one.
    """
    driver = driver or slow_driver()
    if in_neighbour:
        driver.open_neighbour(driver.device.index)
    device = cuda_device(directory, driver, in_neighbour=in_neighbour)

    def contents(slot: int) -> list[object]:
        return [layer[slot].cpu().numpy().tobytes() for layer in device.arena.layers]

    def break_compute() -> None:
        device.compute.fail(DeviceFault("broken by the test"))

    return Rig(device, contents, break_compute)


def fake_cuda_rig(directory: Path, *, in_neighbour: bool = False) -> Rig:
    """The CUDA device without a GPU."""
    driver = FakeDriver(link_bytes_per_s=SLOW_LINK_BYTES_PER_S)
    return cuda_rig(directory, driver, in_neighbour=in_neighbour)
