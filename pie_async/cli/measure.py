"""What this machine's memories, link and processor do, measured in about a second on a CPU and a
few on a GPU, so that `pie-async plan --machine` can simulate it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import msgspec

from pie_async.config import GIB, MIB
from pie_async.device.cost_model import LINKS, Gpu, Link, Machine
from pie_async.hardware import read_hardware, usable_bytes

COPY_BYTES = 256 * MIB
CPU_COPY_BYTES = 64 * MIB
BLOCK_BYTES = 64 * 1024
LEAST_S = 0.2
"""How long a rate is measured."""


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """Rates in bytes per second; None: it was not measured, or cannot be here."""

    machine: Machine
    h2d_bytes_per_s: float
    d2h_bytes_per_s: float
    both_bytes_per_s: float | None = None
    """To the device while as much goes back at the same time."""
    h2d_under_compute_bytes_per_s: float | None = None
    """While the device reads and writes its memory as fast as it can."""
    pin_bytes_per_s: float | None = None
    """Pinning host memory."""


def measure(*, gpu: bool) -> Measured:
    """Measure the first GPU, or the processor."""
    return _measure_gpu() if gpu else _measure_cpu()


def _rate(work: Callable[[], int], wait: Callable[[], None] = lambda: None) -> float:
    """Per second of what `work` says it did; `wait` returns when all of it is done."""
    work()  # the first time memory is touched, kernels are loaded
    wait()
    done, began_s = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - began_s) < LEAST_S:
        done += work()
        wait()
    return done / elapsed_s


# --- a GPU ----------------------------------------------------------------------------------


def _measure_gpu() -> Measured:
    import torch

    cuda = torch.device("cuda", 0)
    properties = torch.cuda.get_device_properties(cuda)
    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    back = torch.empty_like(host, pin_memory=True)
    device = torch.empty(COPY_BYTES, dtype=torch.uint8, device=cuda)
    away = torch.zeros_like(device)
    untyped: Any = torch.cuda
    up, down = untyped.Stream(cuda), untyped.Stream(cuda)

    def h2d() -> int:
        with torch.cuda.stream(up):
            device.copy_(host, non_blocking=True)
        return COPY_BYTES

    def d2h() -> int:
        with torch.cuda.stream(down):
            back.copy_(away, non_blocking=True)
        return COPY_BYTES

    def both() -> int:
        d2h()
        return h2d()

    large = torch.empty(2 * GIB // 4, dtype=torch.float32, device=cuda)

    def hbm() -> int:
        large.mul_(1.0)
        return 2 * large.nbytes  # read and written

    h2d_rate = _rate(h2d, torch.cuda.synchronize)
    hbm_rate = _rate(hbm, torch.cuda.synchronize)
    flops = {
        bytes_of: rate
        for bytes_of, dtype in ((2, torch.bfloat16), (4, torch.float32))
        if (rate := _flops(8192, dtype, "cuda", torch.cuda.synchronize))
    }
    return Measured(
        machine=Machine(
            gpu=Gpu(
                name=properties.name.replace("NVIDIA ", ""),
                memory_bytes=properties.total_memory,
                hbm_bytes_per_s=hbm_rate,
                flops_per_s={1: 2 * flops[2], **flops},  # FP8 is not measured: twice that of 16 bit
            ),
            link=_link("measured", h2d_rate),
        ),
        h2d_bytes_per_s=h2d_rate,
        d2h_bytes_per_s=_rate(d2h, torch.cuda.synchronize),
        both_bytes_per_s=_rate(both, torch.cuda.synchronize),
        h2d_under_compute_bytes_per_s=_under(hbm, h2d, up),
        pin_bytes_per_s=_pin_rate(),
    )


def _under(compute: Callable[[], int], copy: Callable[[], int], stream: Any) -> float:
    """The copies' rate while compute never pauses: timed on their own stream."""
    import torch

    untyped: Any = torch.cuda
    began, ended = (untyped.Event(enable_timing=True) for _ in range(2))
    for _ in range(200):
        compute()  # enough to outlast the copies
    began.record(stream)
    copied = sum(copy() for _ in range(8))
    ended.record(stream)
    torch.cuda.synchronize()
    took_ms: float = began.elapsed_time(ended)
    return copied / (took_ms / 1e3)


def _pin_rate() -> float | None:
    """As the engine pins: memory of its own, registered with the driver. None where there is
    not enough room to try."""
    import torch

    usable = usable_bytes(read_hardware())
    if usable is not None and usable < 2 * GIB:
        return None
    memory = torch.empty(GIB, dtype=torch.uint8)
    began_s = time.perf_counter()
    untyped: Any = torch.cuda
    runtime = untyped.cudart()
    if int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) != 0:
        return None
    took_s = time.perf_counter() - began_s
    runtime.cudaHostUnregister(memory.data_ptr())
    return GIB / took_s


# --- a processor ----------------------------------------------------------------------------


def _measure_cpu() -> Measured:
    import torch

    pool = torch.ones(CPU_COPY_BYTES, dtype=torch.uint8)
    arena = torch.ones_like(pool)
    blocks, places = pool.view(-1, BLOCK_BYTES), arena.view(-1, BLOCK_BYTES)
    order = list(range(0, len(blocks), 2))[::-1]  # neighbours here are no neighbours there

    def copy() -> int:
        arena.copy_(pool)
        return CPU_COPY_BYTES

    def copy_blocks() -> int:
        for number, block in enumerate(order):
            places[number].copy_(blocks[block])
        return len(order) * BLOCK_BYTES

    copy_rate, block_rate = _rate(copy), _rate(copy_blocks)
    run_s = max(0.0, BLOCK_BYTES / block_rate - BLOCK_BYTES / copy_rate)
    hardware = read_hardware()
    flops = _flops(512, torch.float32, "cpu", lambda: None)
    return Measured(
        machine=Machine(
            gpu=Gpu(
                name=f"CPU, {hardware.cores} cores",
                memory_bytes=usable_bytes(hardware) or 8 * GIB,
                hbm_bytes_per_s=2 * copy_rate,  # read and written
                flops_per_s={1: flops, 2: flops, 4: flops},
                layer_overhead_s=100e-6,
                iteration_overhead_s=500e-6,
            ),
            link=Link(name="copy", bytes_per_s=copy_rate, latency_s=20e-6, run_s=run_s),
        ),
        h2d_bytes_per_s=copy_rate,
        d2h_bytes_per_s=copy_rate,
    )


def _flops(side: int, dtype: object, device: str, wait: Callable[[], None]) -> float:
    import torch

    one = torch.ones(side, side, dtype=dtype, device=device)  # type: ignore[call-overload]
    out = torch.empty_like(one)

    def multiply() -> int:
        torch.mm(one, one, out=out)
        return 2 * side**3

    return _rate(multiply, wait)


def _link(name: str, bytes_per_s: float) -> Link:
    """What a copy command and a run of it cost is taken from the named link that is nearest."""
    nearest = min(LINKS.values(), key=lambda each: abs(each.bytes_per_s - bytes_per_s))
    return msgspec.structs.replace(nearest, name=name, bytes_per_s=bytes_per_s)
