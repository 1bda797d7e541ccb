"""What only a GPU can show of the CUDA device, and what its driver promises the rest.

Promises of the driver are tested on its stand-in too, so that the stand-in keeps them.
"""

from __future__ import annotations

import asyncio
import ctypes
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from support.cuda_rig import cuda_device
from support.device_rigs import LAYOUT
from support.device_scripts import (
    feed,
    fired,
    issue,
    moves,
    prefill,
    run_resident,
    run_staged,
)
from support.fake_cuda_driver import FakeDriver

from pie_async.core.layout import KvLayout
from pie_async.cuda.block_copy import find_pieces, to_device, to_host
from pie_async.cuda.peer_arena import PeerArena
from pie_async.cuda.rates import measure_boundary
from pie_async.cuda.vmm import DeviceArena
from pie_async.messages import CopyRun, TableUpdate

PROMPT = tuple(range(10, 21))


@pytest.fixture(
    params=[
        pytest.param("stand-in", marks=pytest.mark.realtime),
        pytest.param("gpu", marks=pytest.mark.gpu),
    ]
)
def driver(request: pytest.FixtureRequest):
    driver = real_driver() if request.param == "gpu" else FakeDriver(links={1: "nvlink"})
    yield driver
    driver.close()


def real_driver():
    from pie_async.cuda.driver import Driver

    return Driver(torch.device("cuda"))


def test_a_boundary_between_layer_groups_takes_microseconds(driver) -> None:
    if isinstance(driver, FakeDriver):
        assert 0 < measure_boundary(driver) < 1
    else:
        assert 0.5e-6 < measure_boundary(driver) < 50e-6


def test_memory_mapped_twice_is_the_same_memory(driver) -> None:
    arena = DeviceArena(driver, LAYOUT, device_slots=8, staging_slots=8, dtype=torch.float32)
    slot, ring = arena.first_staging_slot + 3, LAYOUT.ring_layers
    arena.layers[0][slot].fill_(5.0)
    arena.layers[1][slot].fill_(7.0)
    driver.synchronize_device()
    assert arena.layers[ring][slot].eq(5.0).all().item()
    assert arena.layers[1][slot].eq(7.0).all().item()
    arena.close()


@pytest.mark.parametrize("count", [1, 7])
def test_copies_bring_every_byte_there_and_back(driver, count: int) -> None:
    num_bytes = 3 * 4096
    arena = DeviceArena(driver, LAYOUT, device_slots=256, staging_slots=0, dtype=torch.float32)
    pinned, stream, event = driver.pin(2 * num_bytes), driver.create_stream(), driver.create_event()
    host = torch.frombuffer(
        (ctypes.c_byte * (2 * num_bytes)).from_address(pinned), dtype=torch.uint8
    )
    host[:num_bytes] = torch.randint(256, (num_bytes,), generator=torch.Generator().manual_seed(1))
    host[num_bytes:] = 0
    edges = [num_bytes * i // count for i in range(count + 1)]
    there = np.array(
        [
            (pinned + first, arena.stacks[1][1] + first, last - first)
            for first, last in itertools.pairwise(edges)
        ],
        np.uint64,
    ).T
    back = there[[1, 0, 2]] + np.array([[0], [num_bytes], [0]], np.uint64)
    driver.copy(there, stream)
    driver.copy(back, stream)
    driver.record(event, stream)
    driver.synchronize(event)
    assert torch.equal(host[:num_bytes], host[num_bytes:])
    assert host.any()
    del host
    driver.destroy_event(event)
    driver.destroy_stream(stream)
    driver.unpin(pinned)
    arena.close()


@pytest.mark.parametrize("peer", [0, 1], ids=["same card", "another card"])
def test_a_pool_in_gpu_memory_keeps_every_byte(driver, peer: int) -> None:
    if peer >= driver.gpu_count:
        pytest.skip("takes two GPUs")
    driver.open_neighbour(peer)
    arena = DeviceArena(driver, LAYOUT, device_slots=16, staging_slots=0, dtype=torch.float32)
    pool = PeerArena(driver, LAYOUT, slots=16)
    stream = driver.create_stream()
    runs = [CopyRun(3, 1, 9), CopyRun(0, 12, 2)]
    layers = range(LAYOUT.num_layers)
    for layer in layers:
        arena.layers[layer].copy_(torch.randn(arena.layers[layer].shape))
    want = [layer.clone() for layer in arena.layers]
    driver.synchronize_device()
    driver.copy(to_host(arena, layers, find_pieces(pool, runs)), stream)
    driver.synchronize_stream(stream)
    for layer in arena.layers:
        layer.zero_()
    driver.synchronize_device()
    driver.copy(to_device(arena, layers, find_pieces(pool, runs)), stream)
    driver.synchronize_stream(stream)
    for layer, wanted in zip(arena.layers, want, strict=True):
        assert torch.equal(layer[1:10], wanted[1:10])
        assert torch.equal(layer[12:14], wanted[12:14])
        assert not layer[0].any()
        assert not layer[10:12].any()
    del layer
    driver.destroy_stream(stream)
    pool.close()
    arena.close()


def test_a_closed_pool_in_gpu_memory_gives_its_memory_back(driver) -> None:
    layout = KvLayout(
        num_layers=4, block_tokens=16, kv_heads=8, head_dim=128, item_bytes=2,
        num_groups=4, ring_depth=3,
    )  # fmt: skip
    driver.open_neighbour(0)
    before = driver.neighbour_free_bytes()
    pool = PeerArena(driver, layout, slots=400)
    taken = before - driver.neighbour_free_bytes()
    assert 400 * layout.block_bytes <= taken <= 400 * layout.block_bytes + 8 * 2**20
    pool.close()
    assert driver.neighbour_free_bytes() == pytest.approx(before, abs=8 * 2**20)


def test_a_closed_arena_gives_all_its_memory_back(driver) -> None:
    layout = KvLayout(
        num_layers=4, block_tokens=16, kv_heads=8, head_dim=128, item_bytes=2,
        num_groups=4, ring_depth=3,
    )  # fmt: skip
    before = driver.free_bytes()
    arena = DeviceArena(driver, layout, device_slots=400, staging_slots=200, dtype=torch.float16)
    taken = before - driver.free_bytes()
    wanted = (4 * 400 + layout.ring_layers * 200) * layout.layer_block_bytes
    assert wanted <= taken <= wanted + 32 * 2**20
    arena.close()
    assert driver.free_bytes() == pytest.approx(before, abs=8 * 2**20)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
async def test_issuing_an_iteration_never_waits_for_the_gpu(tmp_path) -> None:
    device = cuda_device(tmp_path, real_driver())
    device.start(asyncio.get_running_loop())

    def strictly():
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run_resident(device, feed(0, len(PROMPT) + 1, ()))
        finally:
            torch.cuda.set_sync_debug_mode("default")

    prompt = prefill(0, PROMPT, (0, 1, 2, 3))
    await fired(device, (await issue(device, lambda: run_resident(device, prompt)))[1])
    again = feed(0, len(PROMPT), ())
    await fired(device, (await issue(device, lambda: run_resident(device, again)))[1])
    forward, done = await issue(device, strictly)
    await fired(device, done)
    assert len(forward.sampled) == 1
    await device.drain()
    device.close()


@pytest.mark.gpu
@pytest.mark.parametrize("without", [(), ("computed",)], ids=["waiting", "not waiting"])
async def test_staging_is_right_only_if_it_waits_for_the_ring(tmp_path, without) -> None:
    device = cuda_device(tmp_path, real_driver())
    device.start(asyncio.get_running_loop())
    assert device._runner is not None
    run_layers = device._runner.run_layers

    def run_slowly(forward, layers) -> None:
        torch.cuda._sleep(4_000_000)  # clock cycles: milliseconds, far longer than a copy
        run_layers(forward, layers)

    async def sampled(work):
        forward, done = await issue(device, work)
        await fired(device, done)
        return forward.sampled

    def demote():
        device.demote(moves((0, 1), (3, 4)))
        return device.d2h.record()

    await sampled(lambda: run_resident(device, prefill(0, PROMPT, (0, 1, 2))))
    await fired(device, await issue(device, demote))
    right = await sampled(lambda: run_resident(device, feed(0, len(PROMPT), (5,))))
    device._runner.run_layers = run_slowly  # type: ignore[method-assign]
    first = device.memory.first_staging_slot
    table = TableUpdate(0, 0, (first, first + 1))
    again = feed(0, len(PROMPT), (5,), tables=(table,), is_staged=True)
    runs = (CopyRun(3, first, 2),)
    staged = await sampled(lambda: run_staged(device, again, runs, without=without))
    assert (staged == right) == (not without)
    await device.drain()
    device.close()


FAULT = """
import asyncio, sys, tempfile
from pathlib import Path
sys.path[:0] = ["tests", "."]
from support.cuda_rig import cuda_device
from support.device_scripts import fired, issue, prefill, run_resident
from pie_async.cuda.driver import Driver
from pie_async.errors import DeviceFault
import numpy as np
import torch

async def main():
    with tempfile.TemporaryDirectory() as scratch:
        device = cuda_device(Path(scratch), Driver(torch.device("cuda")))
    device.start(asyncio.get_running_loop())
    bad = prefill(0, (10_000,), (0,))  # beyond the vocabulary: an assertion fails on the GPU
    _, done = await issue(device, lambda: run_resident(device, bad))
    try:
        await fired(device, done)
    except DeviceFault as fault:
        print("fault:", str(fault).splitlines()[0])
    await device.drain()
    device.close()
    print("closed")

asyncio.run(main())
"""


@pytest.mark.gpu
def test_a_fault_on_the_gpu_is_reported_and_the_device_closes() -> None:
    """In a process of its own, whose context is lost."""
    done = subprocess.run(
        [sys.executable, "-c", FAULT], capture_output=True, text=True, timeout=120, check=False
    )
    assert "fault:" in done.stdout, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "closed", done.stderr[-2000:]
