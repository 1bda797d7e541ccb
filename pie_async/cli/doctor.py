"""`pie-async doctor`: what this machine has and what an engine would make of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from pie_async import __version__
from pie_async.cli.options import MODEL, with_engine_flags
from pie_async.config import BUILTIN_MODEL, MIB, EngineConfig, format_size
from pie_async.errors import ConfigError
from pie_async.hardware import Hardware, read_hardware

if TYPE_CHECKING:
    from pie_async.cli.measure import Measured
    from pie_async.cli.plan import MemoryPlan

COPY_BYTES = 64 * MIB
COPY_S = 0.2
"""How long each copy rate is measured."""


class CopyRates(msgspec.Struct, frozen=True, kw_only=True):
    """Measured rates between host pool and arena, which on the CPU are both host memory."""

    contiguous_bytes_per_s: float
    """One copy of `COPY_BYTES`."""
    block_bytes_per_s: float
    """One copy for each block of a layer."""
    layer_block_bytes: int


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU that torch sees."""

    name: str
    capability: str
    total_bytes: int


class Torch(msgspec.Struct, frozen=True, kw_only=True):
    """The installed torch."""

    version: str
    threads: int
    cuda: str | None
    """The CUDA version it was built with; None: without CUDA."""
    gpus: list[Gpu]
    missing_for_cuda: str | None
    """What keeps device cuda from working, in one line; None: nothing."""


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """Everything the doctor found. Sizes are bytes."""

    version: str
    hardware: Hardware
    torch: Torch
    copies: CopyRates
    measured: Measured
    plan: MemoryPlan
    warnings: list[str]


@with_engine_flags
def doctor(
    *,
    model: MODEL = BUILTIN_MODEL,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    machine: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what was measured here, for `plan --machine`."),
    ] = None,
    engine: EngineConfig,
) -> int:
    """Look at this machine, measure its copies, and say what would be pooled for MODEL."""
    del model
    if machine is not None and machine.suffix != ".json":
        raise ConfigError(f"{machine} must end in .json", option="machine")
    found = diagnose(engine)
    if machine is not None:
        _write(found.measured, machine)
    if json:
        typer.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        for line in lines(found):
            typer.echo(line)
    return 0


def _write(measured: Measured, path: Path) -> None:
    body = msgspec.json.format(msgspec.json.encode(measured.machine), indent=2)
    try:
        path.write_bytes(body + b"\n")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}", option="machine") from error


def diagnose(config: EngineConfig) -> Diagnosis:
    """Look, measure and plan; takes about a second, with a GPU a few.

    Raises:
        ConfigError, ModelError: no plan can be made for this configuration.
    """
    from pie_async.cli.measure import measure
    from pie_async.cli.plan import memory_plan, memory_warning

    plan = memory_plan(config)
    torch = _torch()
    warning = memory_warning(plan)
    return Diagnosis(
        version=__version__,
        hardware=read_hardware(),
        torch=torch,
        copies=_measure_copies(plan.block_bytes // plan.num_layers),
        measured=measure(gpu=bool(torch.gpus)),
        plan=plan,
        warnings=[warning] if warning else [],
    )


def _torch() -> Torch:
    import torch

    return Torch(
        version=str(torch.__version__),
        threads=torch.get_num_threads(),
        cuda=torch.version.cuda,
        gpus=[_gpu(number) for number in range(torch.cuda.device_count())],
        missing_for_cuda=_missing_for_cuda(),
    )


def _gpu(number: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(number)
    return Gpu(
        name=properties.name,
        capability=f"{properties.major}.{properties.minor}",
        total_bytes=properties.total_memory,
    )


def _missing_for_cuda() -> str | None:
    from pie_async.cuda.errors import require_cuda

    try:
        require_cuda()
    except ConfigError as error:
        return str(error)
    return None


def _measure_copies(layer_block_bytes: int) -> CopyRates:
    import torch

    blocks = max(1, COPY_BYTES // layer_block_bytes)
    pool = torch.ones(blocks, layer_block_bytes, dtype=torch.uint8)
    arena = torch.ones_like(pool)
    # every other slot, backwards: neighbours in the pool are seldom neighbours in the arena
    order = list(range(0, blocks, 2))[::-1] or [0]

    def copy_blocks() -> int:
        for slot, block in enumerate(order):
            arena[slot].copy_(pool[block])
        return len(order) * layer_block_bytes

    def copy_all() -> int:
        arena.copy_(pool)
        return pool.nbytes

    return CopyRates(
        contiguous_bytes_per_s=_rate(copy_all),
        block_bytes_per_s=_rate(copy_blocks),
        layer_block_bytes=layer_block_bytes,
    )


def _rate(copy: Callable[[], int]) -> float:
    copy()  # the first one touches the pages
    copied, began_s = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - began_s) < COPY_S:
        copied += copy()
    return copied / elapsed_s


def lines(found: Diagnosis) -> Iterator[str]:
    """The diagnosis for people."""
    from pie_async.cli.plan import plan_lines

    hardware = found.hardware
    yield f"pie-async {found.version}, torch {found.torch.version}, Python {hardware.python}"
    yield f"system: {hardware.system}"
    yield (
        f"processor: {hardware.processor}, {hardware.cores} of {hardware.cores_in_all} cores, "
        f"{found.torch.threads} torch threads"
    )
    yield f"memory: {', '.join(_memory(hardware))}"
    for gpu in found.torch.gpus:
        yield (
            f"GPU: {gpu.name}, {format_size(gpu.total_bytes)}, compute capability {gpu.capability}"
        )
    if found.torch.gpus and found.torch.missing_for_cuda:
        yield found.torch.missing_for_cuda
    elif found.torch.gpus:
        yield "--device cuda computes on the first GPU"
    else:
        yield "GPU: none; models run on the CPU, whose memory plays device arena and host pool"
    copies = found.copies
    yield (
        f"copies between pool and arena: {copies.contiguous_bytes_per_s / 1e9:.1f} GB/s in one "
        f"piece, {copies.block_bytes_per_s / 1e9:.1f} GB/s in blocks of "
        f"{format_size(copies.layer_block_bytes)}"
    )
    yield from _rates(found.measured)
    yield ""
    yield from plan_lines(found.plan)
    for length, (resident, pooled) in found.plan.sequences.items():
        yield (
            f"sequences of {length:,} tokens: {resident:,} in the arena, {pooled:,} with the pool"
        )
    yield from found.warnings


def _rates(measured: Measured) -> Iterator[str]:
    gpu = measured.machine.gpu
    yield (
        f"{gpu.name}: memory {gpu.hbm_bytes_per_s / 1e9:,.0f} GB/s read and written, products "
        f"{max(gpu.flops_per_s.values()) / 1e12:,.2f} TFLOP/s at best"
    )
    if measured.both_bytes_per_s is None:
        return
    yield (
        f"link: {measured.h2d_bytes_per_s / 1e9:.1f} GB/s to the device, "
        f"{measured.d2h_bytes_per_s / 1e9:.1f} back; to it {measured.both_bytes_per_s / 1e9:.1f} "
        "while as much goes back"
        + _also(measured.h2d_under_compute_bytes_per_s, "while compute takes all of its memory")
    )
    if measured.pin_bytes_per_s is not None:
        yield f"pinning host memory: {measured.pin_bytes_per_s / 1e9:.1f} GB/s"


def _also(bytes_per_s: float | None, when: str) -> str:
    return "" if bytes_per_s is None else f", {bytes_per_s / 1e9:.1f} {when}"


def _memory(hardware: Hardware) -> Iterator[str]:
    if hardware.memory_bytes is not None:
        yield f"{format_size(hardware.memory_bytes)} in all"
    if hardware.available_bytes is not None:
        yield f"{format_size(hardware.available_bytes)} free"
    if hardware.cgroup_limit_bytes is None:
        yield "no container limit"
    else:
        used = format_size(hardware.cgroup_used_bytes or 0)
        yield f"container limit {format_size(hardware.cgroup_limit_bytes)} ({used} used)"
    if hardware.locked_limit_bytes is None:
        yield "no limit to pinned memory"
    else:
        yield f"at most {format_size(hardware.locked_limit_bytes)} may be pinned"
