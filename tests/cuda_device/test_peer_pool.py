"""The pool in another GPU's memory: what is refused, where slots lie, what the driver is asked."""

# cuda-python's functions have the driver's names
# ruff: noqa: N802, N815

from __future__ import annotations

import itertools
import logging
import types
from collections.abc import Callable

import pytest
import torch
from support.device_rigs import LAYOUT
from support.fake_cuda_driver import FakeDriver

from pie_async.cuda.block_copy import find_pieces, to_device
from pie_async.cuda.errors import CudaFault
from pie_async.cuda.peer_arena import PeerArena, open_peer
from pie_async.cuda.vmm import DeviceArena
from pie_async.errors import ConfigError
from pie_async.messages import CopyRun

SLOT = LAYOUT.layer_block_bytes


@pytest.fixture
def driver():
    driver = FakeDriver(links={1: "nvlink"})
    driver.open_neighbour(1)
    yield driver
    assert driver.leftovers() == []


# --- the arena --------------------------------------------------------------------------------


def test_one_layer_of_neighbouring_slots_is_one_piece(driver):
    pool = PeerArena(driver, LAYOUT, slots=16)
    (piece,) = pool.pieces(2, 14)
    assert (piece.slot, piece.num_slots, piece.layer_bytes) == (2, 14, 16 * SLOT)
    assert list(pool.pieces(2, 0)) == []
    pool.close()


def test_no_two_slots_of_any_layer_overlap_and_all_lie_in_the_lent_memory(driver):
    pool = PeerArena(driver, LAYOUT, slots=16)
    starts = sorted(
        piece.address + layer * piece.layer_bytes + piece.slot * SLOT
        for layer in range(LAYOUT.num_layers)
        for slot in range(16)
        for piece in pool.pieces(slot, 1)
    )
    ((lent, buffer),) = driver.lent.items()
    assert [b - a for a, b in itertools.pairwise(starts)] == [SLOT] * 79
    assert (starts[0], starts[-1] + SLOT) == (lent, lent + len(buffer))
    pool.close()


def test_all_slots_are_there_at_once(driver):
    pool, told = PeerArena(driver, LAYOUT, slots=16), []
    assert pool.pinned_slots == 16
    pool.watch(lambda slots, refusal: told.append((slots, refusal)))
    assert told == [(16, None)]
    pool.close()


def test_a_run_is_one_copy_a_layer(driver):
    pool = PeerArena(driver, LAYOUT, slots=16)
    arena = DeviceArena(driver, LAYOUT, device_slots=16, staging_slots=0, dtype=torch.float32)
    copies = to_device(arena, range(2), find_pieces(pool, [CopyRun(3, 1, 9)]))
    assert copies[2].tolist() == [9 * SLOT] * 2
    arena.close()
    pool.close()


def test_no_slots_take_nothing():
    driver = FakeDriver(links={1: "nvlink"})  # no neighbour is open
    pool = PeerArena(driver, LAYOUT, slots=0)
    assert driver.lent == {}
    pool.close()


def test_memory_gone_since_it_was_asked_for_is_an_error_of_the_configuration():
    driver = FakeDriver(links={1: "nvlink"}, neighbour_bytes=LAYOUT.block_bytes)
    driver.open_neighbour(1)
    with pytest.raises(ConfigError, match="are free on the GPU that holds the pool") as refused:
        PeerArena(driver, LAYOUT, slots=2)
    assert refused.value.option == "host_pool_bytes"


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("links", "peer", "says"),
    [
        ({}, 1, "there is no GPU 1: this process sees 1 GPU, .* possible here: host$"),
        ({1: "nvlink", 2: "none"}, 3, "sees 3 GPUs, .* possible here: host, peer:1$"),
        ({1: "nvlink", 2: "pcie"}, 0, "GPU 0 is the one that computes; .* host, peer:1, peer:2$"),
        ({1: "none", 2: "pcie"}, 1, "GPU 0 and GPU 1 cannot reach .*: host, peer:2$"),
    ],
)
def test_a_peer_that_cannot_be_used_is_refused_with_what_can(links, peer: int, says: str):
    driver = FakeDriver(links=links)
    with pytest.raises(ConfigError, match=f"^pool peer:{peer} cannot be used: .*{says}") as refused:
        open_peer(driver, peer, 2**20)
    assert refused.value.option == "pool"
    assert driver.neighbour is None


def test_a_peer_that_the_driver_refuses_is_not_offered_again():
    driver = FakeDriver(links={1: "nvlink", 2: "nvlink"})
    driver.failing = "CUDA_ERROR_TOO_MANY_PEERS"
    with pytest.raises(ConfigError, match=r"TOO_MANY_PEERS.*possible here: host, peer:2$"):
        open_peer(driver, 1, 2**20)


def test_a_pool_larger_than_the_peers_free_memory_is_refused():
    driver = FakeDriver(links={1: "nvlink"}, neighbour_bytes=2**30)
    with pytest.raises(ConfigError, match=r"is 2\.0 GiB, but 1\.0 GiB are free") as refused:
        open_peer(driver, 1, 2**31)
    assert refused.value.option == "host_pool_bytes"


def test_without_a_pool_the_peer_is_checked_and_not_opened():
    driver = FakeDriver(links={1: "nvlink"})
    open_peer(driver, 1, 0)
    assert driver.neighbour is None
    with pytest.raises(ConfigError, match="there is no GPU 2"):
        open_peer(driver, 2, 0)


@pytest.mark.parametrize(("link", "warnings"), [("pcie", 1), ("nvlink", 0)])
def test_a_peer_behind_pcie_is_used_and_said_to_be_slow(caplog, link: str, warnings: int):
    driver = FakeDriver(links={1: link})
    with caplog.at_level(logging.WARNING):
        open_peer(driver, 1, 2**20)
    assert driver.neighbour == 1
    assert sum("over PCIe, not NVLink" in line for line in caplog.messages) == warnings


# --- what the driver is asked -----------------------------------------------------------------


class FakeCuda:
    """cuda-python's functions around a neighbour, for two GPUs; its types are the real ones.

    Attributes:
        contexts: the calling thread's, the current one last.
        reached: (from, to) contexts between which access was enabled.
        allocated: addresses, and the context that was current.
        retained: GPUs whose contexts were not released.
        accesses: GPUs that reach what was mapped last.
    """

    def __init__(self, real: types.ModuleType, *, atomics: int = 1, one_way: bool = False) -> None:
        self._real, self._atomics, self._one_way = real, atomics, one_way
        self.contexts = ["context 0"]
        self.reached: list[tuple[str, str]] = []
        self.allocated: dict[int, str] = {}
        self.retained: list[object] = []
        self.accesses: list[int] = []

    def __getattr__(self, name: str) -> object:
        assert not name.startswith("cu"), f"{name} was not expected"
        return getattr(self._real, name)

    @property
    def _ok(self) -> object:
        return self._real.CUresult.CUDA_SUCCESS

    def cuGetErrorName(self, code):
        return self._ok, code.name.encode()

    cuGetErrorString = cuGetErrorName

    def cuDeviceGetCount(self):
        return self._ok, 2

    def cuDeviceGet(self, ordinal):
        return self._ok, ordinal

    def cuDeviceCanAccessPeer(self, here, there):
        assert here != there
        return self._ok, int(not (self._one_way and here == 1))

    def cuDeviceGetP2PAttribute(self, attribute, here, there):
        wanted = self._real.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
        assert attribute == wanted
        return self._ok, self._atomics

    def cuDevicePrimaryCtxRetain(self, gpu):
        self.retained.append(gpu)
        return self._ok, f"context {gpu}"

    def cuDevicePrimaryCtxRelease(self, gpu):
        self.retained.remove(gpu)
        return (self._ok,)

    def cuCtxPushCurrent(self, context):
        self.contexts.append(context)
        return (self._ok,)

    def cuCtxPopCurrent(self):
        return self._ok, self.contexts.pop()

    def cuCtxEnablePeerAccess(self, context, flags):
        assert flags == 0
        assert context != self.contexts[-1]
        pair = (self.contexts[-1], context)
        if pair in self.reached:
            return (self._real.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED,)
        self.reached.append(pair)
        return (self._ok,)

    def cuMemGetInfo(self):
        return self._ok, {"context 0": 100, "context 1": 200}[self.contexts[-1]], 1000

    def cuMemAlloc(self, num_bytes):
        if num_bytes > 200:
            return self._real.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None
        self.allocated[64] = self.contexts[-1]
        return self._ok, 64

    def cuMemFree(self, address):
        assert self.allocated.pop(address) == self.contexts[-1]
        return (self._ok,)

    def cuMemMap(self, *_):
        return (self._ok,)

    def cuMemSetAccess(self, address, num_bytes, accesses, count):
        assert len(accesses) == count
        self.accesses = [access.location.id for access in accesses]
        return (self._ok,)


@pytest.fixture
def opened(monkeypatch) -> Callable[..., tuple[object, FakeCuda]]:
    """The real driver on GPU 0 of two, over cuda-python's own types."""
    pytest.importorskip("cuda.bindings.driver")
    from pie_async.cuda import driver as module

    def make(**how) -> tuple[object, FakeCuda]:
        cuda = FakeCuda(module.cuda, **how)
        monkeypatch.setattr(module, "cuda", cuda)
        driver = object.__new__(module.Driver)  # the rest of it wants a GPU
        driver.device = torch.device("cuda", 0)
        driver._gpu, driver._context, driver._neighbour = 0, "context 0", None
        driver._accesses = [module._access(module._location(0))]
        return driver, cuda

    return make


def test_peer_access_is_enabled_both_ways_and_what_is_mapped_later_is_the_neighbours_too(opened):
    driver, cuda = opened()
    driver.map(0, 4096, 1)
    assert cuda.accesses == [0]
    driver.open_neighbour(1)
    assert cuda.reached == [("context 0", "context 1"), ("context 1", "context 0")]
    driver.map(0, 4096, 1)
    assert cuda.accesses == [0, 1]
    assert cuda.contexts == ["context 0"]


def test_access_that_torch_enabled_before_is_no_error(opened):
    driver, cuda = opened()
    cuda.reached += [("context 0", "context 1"), ("context 1", "context 0")]
    driver.open_neighbour(1)
    assert len(cuda.reached) == 2


def test_memory_is_the_neighbours_and_the_thread_returns_to_its_own_gpu(opened):
    driver, cuda = opened()
    driver.open_neighbour(1)
    assert (driver.neighbour_free_bytes(), driver.free_bytes()) == (200, 100)
    address = driver.allocate_in_neighbour(50)
    assert cuda.allocated == {address: "context 1"}
    with pytest.raises(CudaFault, match="neighbour") as fault:
        driver.allocate_in_neighbour(500)
    assert fault.value.is_out_of_memory
    driver.free_in_neighbour(address)
    assert cuda.allocated == {}
    assert cuda.contexts == ["context 0"]


def test_a_gpu_that_is_its_own_neighbour_needs_no_peer_access(opened):
    driver, cuda = opened()
    driver.open_neighbour(0)
    driver.map(0, 4096, 1)
    assert (cuda.reached, cuda.accesses) == ([], [0])
    driver.free_in_neighbour(driver.allocate_in_neighbour(50))


@pytest.mark.parametrize(
    ("how", "link"),
    [({"atomics": 1}, "nvlink"), ({"atomics": 0}, "pcie"), ({"one_way": True}, "none")],
)
def test_the_link_is_known_by_what_it_carries(opened, how: dict, link: str):
    assert opened(**how)[0].link_to(1) == link


def test_the_neighbour_is_given_back_once(opened, monkeypatch):
    driver, cuda = opened()
    cuda.retained.append(0)  # what opening the driver took
    driver.open_neighbour(1)
    monkeypatch.setattr(type(driver), "limit_torch", lambda *_: None)
    monkeypatch.setattr(type(driver), "trim", lambda *_: None)
    driver.close()
    assert cuda.retained == []


def test_contexts_are_given_back_even_if_torch_refuses_to_trim(opened, monkeypatch):
    driver, cuda = opened()
    cuda.retained.append(0)  # what opening the driver took
    driver.open_neighbour(1)

    def refuse(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(type(driver), "total_bytes", lambda *_: 1)
    monkeypatch.setattr(type(driver), "limit_torch", refuse)
    with pytest.raises(RuntimeError):
        driver.close()
    assert cuda.retained == []


def test_a_neighbour_that_cannot_be_reached_is_given_back_at_once(opened, monkeypatch):
    driver, cuda = opened()

    def refuse(context: object, flags: int) -> tuple[object]:
        return (cuda.CUresult.CUDA_ERROR_TOO_MANY_PEERS,)

    monkeypatch.setattr(cuda, "cuCtxEnablePeerAccess", refuse)
    with pytest.raises(CudaFault):
        driver.open_neighbour(1)
    assert cuda.retained == []
    assert cuda.contexts == ["context 0"]
