"""The CUDA device's parts on a stand-in for the driver: memory, copies, events, errors."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import weakref

import msgspec
import pytest
import torch
from support.checkpoints import write_checkpoint
from support.cuda_rig import CHUNK_BYTES, cuda_device
from support.device_rigs import LAYOUT
from support.device_scripts import fired, issue, moves, prefill, run_resident
from support.fake_cuda_driver import FakeDriver

from pie_async.core.layout import KvLayout
from pie_async.cuda.block_copy import find_pieces, to_device, to_host
from pie_async.cuda.errors import CudaFault
from pie_async.cuda.host_arena import HostArena
from pie_async.cuda.plain_runner import PlainRunner
from pie_async.cuda.profiling import WIDEST
from pie_async.cuda.vmm import DeviceArena
from pie_async.device.copy_runs import runs_of
from pie_async.errors import ConfigError, DeviceFault
from pie_async.messages import CopyRun
from pie_async.model.config import read_config
from pie_async.model.weights import load_model

pytestmark = pytest.mark.realtime

SLOT = LAYOUT.layer_block_bytes


@pytest.fixture
def driver():
    driver = FakeDriver()
    yield driver
    driver.close()
    assert driver.leftovers() == []


STACKED = msgspec.structs.replace(LAYOUT, num_groups=3, is_stacked=True)
"""Three stacks, the last of one layer."""


def arena(driver: FakeDriver, layout: KvLayout = LAYOUT, **how) -> DeviceArena:
    sizes = {"device_slots": 10, "staging_slots": 8, "dtype": torch.float32, **how}
    return DeviceArena(driver, layout, **sizes)


both_layouts = pytest.mark.parametrize("layout", [LAYOUT, STACKED], ids=["layers", "stacks"])


# --- the device arena -------------------------------------------------------------------------


@both_layouts
def test_layers_of_one_ring_buffer_share_their_staging_slots_and_nothing_else(driver, layout):
    one = arena(driver, layout)
    for layer, view in enumerate(one.layers):
        view[0].fill_(layer)
        view[one.first_staging_slot].fill_(layer)
    for layer, view in enumerate(one.layers):
        assert bool((view[0] == layer).all())
        last_writer = max(
            other
            for other in range(layout.num_layers)
            if layout.ring_buffer(other) == layout.ring_buffer(layer)
        )
        assert bool((view[one.first_staging_slot] == last_writer).all())
    del view
    one.close()


def test_the_ring_takes_as_much_memory_as_its_buffers_not_as_its_layers(driver):
    before = driver.free_bytes()
    one = arena(driver, staging_slots=1000)
    taken = before - driver.free_bytes()
    pages = (10 * SLOT + 4095) // 4096 * LAYOUT.num_layers
    pages += (1000 * SLOT + 4095) // 4096 * LAYOUT.ring_layers
    assert taken == pages * 4096
    one.close()
    assert driver.free_bytes() == before


def test_layers_a_ring_apart_share_a_buffer(driver):
    one = arena(driver, staging_slots=8)
    last = one.first_staging_slot + 7
    one.layers[0][last].fill_(7.0)
    assert bool((one.layers[LAYOUT.ring_layers][last] == 7.0).all())
    assert not bool((one.layers[1][last] == 7.0).any())
    one.close()


def test_too_little_memory_on_the_card_names_the_options_and_leaves_nothing_behind():
    driver = FakeDriver(memory_bytes=20_000)
    with pytest.raises(ConfigError, match="free; lower device_kv_bytes or max_streamed"):
        arena(driver)
    assert driver.leftovers() == []


# --- the host arena ---------------------------------------------------------------------------


def test_one_layer_of_neighbouring_slots_is_one_piece_within_a_chunk(driver):
    host = HostArena(driver, LAYOUT, slots=16, chunk_bytes=CHUNK_BYTES)
    assert [piece.num_slots for piece in host.pieces(0, 5)] == [5]
    assert [piece.num_slots for piece in host.pieces(3, 9)] == [2, 5, 2]
    host.close()


def test_no_two_slots_of_any_layer_overlap(driver):
    host = HostArena(driver, LAYOUT, slots=16, chunk_bytes=CHUNK_BYTES)
    starts = sorted(
        piece.address + layer * piece.layer_bytes + piece.slot * SLOT
        for layer in range(LAYOUT.num_layers)
        for slot in range(16)
        for piece in host.pieces(slot, 1)
    )
    assert len(starts) == 80
    assert all(b - a >= SLOT for a, b in itertools.pairwise(starts))
    host.close()


def test_a_refusal_to_pin_at_start_is_an_error_of_the_configuration():
    with pytest.raises(ConfigError, match=r"refuses to pin .* lower host_pool_bytes"):
        HostArena(FakeDriver(pinnable_bytes=100), LAYOUT, slots=16)


def test_a_refusal_to_pin_later_is_told_to_whoever_needs_that_memory():
    driver = FakeDriver(pinnable_bytes=2 * CHUNK_BYTES)
    host = HostArena(driver, LAYOUT, slots=16, chunk_bytes=CHUNK_BYTES)
    assert [piece.num_slots for piece in host.pieces(5, 5)] == [5]
    with pytest.raises(ConfigError, match=r"after 25\.0 KiB of the pool"):
        list(host.pieces(10, 1))
    host.close()
    assert driver.leftovers() == []


def test_what_is_pinned_is_told_and_so_is_why_there_will_be_no_more():
    driver = FakeDriver(pinnable_bytes=2 * CHUNK_BYTES)
    host = HostArena(driver, LAYOUT, slots=16, chunk_bytes=CHUNK_BYTES)
    told, is_over = [], threading.Event()

    def grown(slots: int, refusal: str | None) -> None:
        told.append((slots, refusal))
        if refusal is not None:
            is_over.set()

    host.watch(grown)
    assert is_over.wait(10)
    assert [slots for slots, _ in told[-1:]] == [10]
    assert "refuses to pin more" in told[-1][1]
    assert sorted(slots for slots, _ in told) == [slots for slots, _ in told]
    host.close()


# --- copies -----------------------------------------------------------------------------------


def test_neighbours_on_both_sides_are_copied_as_one():
    assert runs_of(moves((4, 5, 9, 6, 20), (0, 1, 2, 3, 4))) == [
        CopyRun(0, 4, 2),
        CopyRun(2, 9, 1),
        CopyRun(3, 6, 1),
        CopyRun(4, 20, 1),
    ]


def test_copies_both_ways_move_the_same_bytes(driver):
    host = HostArena(driver, LAYOUT, slots=16, chunk_bytes=CHUNK_BYTES)
    one = arena(driver)
    runs = [CopyRun(3, 1, 4)]
    there = to_device(one, range(2), find_pieces(host, runs))
    back = to_host(one, range(2), find_pieces(host, runs))
    assert back.tolist() == there[[1, 0, 2]].tolist()
    assert there[2].tolist() == [2 * SLOT, 2 * SLOT] * 2  # a chunk's border in between
    one.close()
    host.close()


def test_a_block_of_a_stack_is_one_copy(driver):
    host = HostArena(driver, STACKED, slots=16, chunk_bytes=CHUNK_BYTES)
    one = arena(driver, STACKED)
    assert to_device(one, range(3, 5), find_pieces(host, [CopyRun(3, 1, 2)]))[2].tolist() == [
        4 * SLOT
    ]
    assert to_device(one, range(1), find_pieces(host, [CopyRun(3, 1, 2)]))[2].tolist() == [2 * SLOT]
    assert to_device(one, range(5), find_pieces(host, []))[2].tolist() == []
    one.close()
    host.close()


@both_layouts
def test_what_is_copied_out_and_in_again_is_what_it_was_in_every_layer(driver, layout):
    host = HostArena(driver, layout, slots=16, chunk_bytes=CHUNK_BYTES)
    one, stream = arena(driver, layout), driver.create_stream()
    first, layers = one.first_staging_slot, range(layout.num_layers)
    for view in one.layers:
        view[:10].copy_(torch.randn(view[:10].shape))
    want = [view[:10].clone() for view in one.layers]
    driver.copy(to_host(one, layers, find_pieces(host, [CopyRun(3, 0, 10)])), stream)
    for index in range(layout.num_groups):
        group = layout.group(index)
        driver.copy(to_device(one, group, find_pieces(host, [CopyRun(7, first + 2, 5)])), stream)
        driver.synchronize_stream(stream)
        for layer in group:
            assert torch.equal(one.layers[layer][first + 2 : first + 7], want[layer][4:9])
            assert torch.equal(one.layers[layer][:10], want[layer])
    one.close()
    host.close()


# --- the device -------------------------------------------------------------------------------


@pytest.mark.parametrize("in_neighbour", [False, True], ids=["host", "peer"])
async def test_everything_is_given_back_at_the_end(tmp_path, in_neighbour: bool):
    driver = FakeDriver()
    if in_neighbour:
        driver.open_neighbour(1)
    device = cuda_device(tmp_path, driver, in_neighbour=in_neighbour)
    assert bool(driver.lent) == in_neighbour
    device.start(asyncio.get_running_loop())
    forward, done = await issue(
        device, lambda: run_resident(device, prefill(0, tuple(range(10, 21)), (0, 1, 2)))
    )
    await fired(device, done)
    assert len(forward.sampled) == 1
    await device.drain()
    device.close()
    assert driver.leftovers() == []
    assert driver.streams == {}


async def test_cuda_events_are_used_again(tmp_path):
    driver = FakeDriver()
    device = cuda_device(tmp_path, driver)
    device.start(asyncio.get_running_loop())

    def wait_a_little() -> object:
        device.compute.wait(device.h2d.record())
        return device.compute.record()

    for _ in range(200):
        await fired(device, await issue(device, wait_a_little))
    await device.drain()
    # h2d's are settled by the drain alone: nobody asked for them before
    assert len(device.compute._handles) < 10
    device.close()


async def test_an_error_found_by_the_gpu_fails_what_waits_and_lets_the_device_close(tmp_path):
    driver = FakeDriver()
    device = cuda_device(tmp_path, driver)
    device.start(asyncio.get_running_loop())
    event = await issue(device, device.compute.record)
    driver.failing = "CUDA_ERROR_ILLEGAL_ADDRESS"
    with pytest.raises(DeviceFault, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        await fired(device, event)
    later = await issue(device, device.compute.record)
    with pytest.raises(DeviceFault, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
        await fired(device, later)
    await device.drain()
    device.close()


async def test_an_operation_that_torch_refuses_surfaces_at_the_next_event(tmp_path):
    device = cuda_device(tmp_path, FakeDriver())
    device.start(asyncio.get_running_loop())
    bad = prefill(0, (10_000,), (0,))  # beyond the vocabulary
    _, done = await issue(device, lambda: run_resident(device, bad))
    with pytest.raises(DeviceFault, match="the compute stream failed: IndexError"):
        await fired(device, done)
    await device.drain()
    device.close()


async def test_graphs_are_captured_between_the_last_event_of_an_iteration_and_the_next(tmp_path):
    """Within one, the time they take would count as time that it computed. And capturing writes
    where an iteration's numbers lie: the next one may be issued without its sampling, which comes
    when masks are made, and it was sampled from what capturing had left (on an H200)."""
    device = cuda_device(tmp_path, FakeDriver())
    order: list[str] = []

    class Capturing(PlainRunner):
        wants_graphs = True

        def capture_wanted(self) -> None:
            order.append("capture")
            self.wants_graphs = False

    device._runner.__class__ = Capturing
    device.start(asyncio.get_running_loop())
    all_queued = threading.Event()

    def run() -> object:
        all_queued.wait()
        _, done = run_resident(device, prefill(0, tuple(range(10, 21)), (0, 1, 2)))
        order.append("event")
        return done

    ran = asyncio.create_task(issue(device, run))
    await asyncio.sleep(0)
    device.launch(lambda: order.append("next"))
    all_queued.set()
    await fired(device, await ran)
    await device.drain()
    assert order == ["event", "capture", "next"]
    device.close()


async def test_a_closed_device_holds_no_weights(tmp_path):
    """Though whoever asks for the memory's report may hold the runner."""
    device = cuda_device(tmp_path, FakeDriver())
    runner = device._runner
    decoder = weakref.ref(runner._decoder)
    device.start(asyncio.get_running_loop())
    await device.drain()
    device.close()
    gc.collect()
    assert decoder() is None
    assert runner.graph_bytes == 0


def test_profiling_asks_for_no_position_that_a_model_has_not(tmp_path):
    """Learned positions are a table; its end is a block's, or within one."""
    path = write_checkpoint(tmp_path, "opt").path
    decoder = load_model(path, read_config(path), torch.float32, torch.device("cpu"))
    config = decoder.config
    shape = (4, 2, config.kv_heads, 16, config.head_dim)
    kv = [torch.zeros(shape) for _ in range(config.num_layers)]
    max_blocks = -(-config.max_positions // 16) + 1
    runner = PlainRunner(decoder, kv, lanes=3, max_blocks=max_blocks, block_tokens=16)
    assert runner.profile(1000, WIDEST) == 0


# --- errors ------------------------------------------------------------------------------------


def test_a_fault_says_what_was_being_done():
    fault = CudaFault("copying", "CUDA_ERROR_INVALID_VALUE", "invalid argument")
    assert str(fault) == "CUDA failed while copying: CUDA_ERROR_INVALID_VALUE (invalid argument)"
