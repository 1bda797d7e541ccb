"""Stands in for `cuda/driver.py` on a machine without a GPU.

Streams are threads, device memory is memory, and the same memory can be mapped at several
addresses. What is asynchronous on a GPU is asynchronous here, but for torch's operations: they
run in the launch thread, once their stream has caught up. So compute that ignores its copies
shows here, but copies that overtake compute show on a GPU alone (tests/gpu).
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import sys
import threading
import time
import types
from contextlib import contextmanager
from queue import SimpleQueue

import torch

from pie_async.cuda import card_memory, errors
from pie_async.cuda.errors import CudaFault
from pie_async.device.aliased_arena import _libc, _map


def assemble_with(driver: FakeDriver, monkeypatch) -> None:
    """What assembly for the CUDA device opens from now on."""
    # The driver's own module needs cuda-python; what takes its place does not.
    module = types.ModuleType("pie_async.cuda.driver")
    module.Driver = lambda _: driver
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(errors, "require_cuda", lambda _: None)
    monkeypatch.setattr(card_memory, "SLACK_BYTES", 0)


class FakeRecord:
    """One recording of an event."""

    def __init__(self) -> None:
        self.fired = threading.Event()
        self.at_s = 0.0

    def fire(self) -> None:
        self.at_s = time.perf_counter()
        self.fired.set()


class FakeStream:
    def __init__(self) -> None:
        self.work: SimpleQueue = SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (work := self.work.get()) is not None:
            work()


class FakeDriver:
    """The driver's methods, and counts of what was not given back.

    Args:
        link_bytes_per_s: of copies.
        memory_bytes: that the card has for `create_memory`.
        pinnable_bytes: that the host lets be pinned.
        links: to each other GPU, by its ordinal; this one is GPU 0.
        neighbour_bytes: free memory of each of those.
    """

    device = torch.device("cpu", 0)
    name = "stand-in"
    page_bytes = mmap.PAGESIZE

    def __init__(
        self,
        *,
        link_bytes_per_s: float | None = None,
        memory_bytes: int = 2**30,
        pinnable_bytes: int = 2**30,
        links: dict[int, str] | None = None,
        neighbour_bytes: int = 2**30,
    ) -> None:
        self._link_bytes_per_s = link_bytes_per_s
        self._free_bytes = self._total_bytes = memory_bytes
        self._pinnable_bytes = pinnable_bytes
        self._links = links or {}
        self._neighbour_bytes = neighbour_bytes
        self.neighbour: int | None = None
        self.lent: dict[int, ctypes.Array] = {}
        self._unreached: dict[int, range] = {}
        self._names = itertools.count(1)
        self.streams: dict[int, FakeStream] = {}
        self.events: dict[int, FakeRecord | None] = {}
        self.memories: dict[int, tuple[int, int]] = {}
        self.mapped: dict[int, int] = {}
        self.reserved: dict[int, int] = {}
        self.pinned: dict[int, ctypes.Array] = {}
        self.copies: list[tuple[int, int, int]] = []
        self.failing: str | None = None
        self.num_closed = 0

    def leftovers(self) -> list[object]:
        """What was not given back, but for the stream that torch may still need."""
        kinds = (
            self.events, self.memories, self.mapped, self.reserved, self.pinned, self.lent
        )  # fmt: skip
        return [name for kind in kinds for name in kind]

    def close(self) -> None:
        for name in list(self.streams):
            self.destroy_stream(name)
        self.neighbour = None
        self.num_closed += 1

    def enter_thread(self) -> None:
        pass

    def synchronize_device(self) -> None:
        pass

    def create_stream(self) -> int:
        name = next(self._names)
        self.streams[name] = FakeStream()
        return name

    def destroy_stream(self, stream: int) -> None:
        ended = self.streams.pop(stream)
        ended.work.put(None)
        ended.thread.join()

    def synchronize_stream(self, stream: int) -> None:
        record = FakeRecord()
        self.streams[stream].work.put(record.fire)
        record.fired.wait()

    @contextmanager
    def torch_on(self, stream: int):
        self.synchronize_stream(stream)
        yield

    def create_event(self) -> int:
        name = next(self._names)
        self.events[name] = None
        return name

    def destroy_event(self, event: int) -> None:
        del self.events[event]

    def record(self, event: int, stream: int) -> None:
        record = self.events[event] = FakeRecord()
        self.streams[stream].work.put(record.fire)

    def wait(self, stream: int, event: int) -> None:
        record = self.events[event]
        assert record is not None, "a wait for an event that was never recorded"
        self.streams[stream].work.put(record.fired.wait)

    def synchronize(self, event: int) -> None:
        record = self.events[event]
        assert record is not None
        record.fired.wait()
        if self.failing is not None:
            raise CudaFault("running issued work", self.failing, "as the test asked")

    def elapsed_s(self, first: int, last: int) -> float:
        began, ended = self.events[first], self.events[last]
        assert began is not None and began.fired.is_set()
        assert ended is not None and ended.fired.is_set()
        return ended.at_s - began.at_s

    def copy(self, copies, stream: int) -> None:
        copies = copies.T.tolist()
        self.copies += copies
        for source, destination, _ in copies:
            self._check_reach(source, destination)

        def move() -> None:
            began_s = time.perf_counter()
            for source, destination, num_bytes in copies:
                ctypes.memmove(destination, source, num_bytes)
            if self._link_bytes_per_s is not None:
                total = sum(num_bytes for _, _, num_bytes in copies)
                rest_s = total / self._link_bytes_per_s - (time.perf_counter() - began_s)
                time.sleep(max(0.0, rest_s))

        self.streams[stream].work.put(move)

    def spin(self, seconds: float, stream: int) -> None:
        self.streams[stream].work.put(lambda: time.sleep(seconds))

    def free_bytes(self) -> int:
        return self._free_bytes

    @property
    def memory_bytes_per_s(self) -> float:
        return 1e12

    def total_bytes(self) -> int:
        return self._total_bytes

    def torch_bytes(self) -> int:
        return 0

    def torch_kept_bytes(self) -> int:
        return 0

    def limit_torch(self, num_bytes: int) -> None:
        self.torch_limit_bytes = num_bytes

    def trim(self) -> None:
        pass

    def reserve(self, num_bytes: int) -> int:
        address = _map(None, num_bytes, -1, 0)
        self.reserved[address] = num_bytes
        return address

    def unreserve(self, address: int, num_bytes: int) -> None:
        assert self.reserved.pop(address) == num_bytes
        _libc.munmap(address, num_bytes)

    def create_memory(self, num_bytes: int) -> int:
        assert num_bytes % self.page_bytes == 0
        if num_bytes > self._free_bytes:
            raise CudaFault("allocating memory", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")
        self._free_bytes -= num_bytes
        file = os.memfd_create("fake_cuda")
        os.ftruncate(file, num_bytes)
        name = next(self._names)
        self.memories[name] = (file, num_bytes)
        return name

    def release_memory(self, memory: int) -> None:
        file, num_bytes = self.memories.pop(memory)
        os.close(file)
        self._free_bytes += num_bytes

    def map(self, address: int, num_bytes: int, memory: int) -> None:
        file, size = self.memories[memory]
        assert num_bytes == size, "all of it, from its start"
        assert address % self.page_bytes == 0
        assert address not in self.mapped
        _map(address, num_bytes, file, 0)
        self.mapped[address] = num_bytes
        if self.neighbour is None:
            self._unreached[address] = range(address, address + num_bytes)

    def unmap(self, address: int, num_bytes: int) -> None:
        assert self.mapped.pop(address) == num_bytes
        self._unreached.pop(address, None)

    def pin(self, num_bytes: int) -> int:
        if num_bytes > self._pinnable_bytes:
            raise CudaFault("pinning host memory", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")
        self._pinnable_bytes -= num_bytes
        buffer = (ctypes.c_byte * num_bytes)()
        address = ctypes.addressof(buffer)
        self.pinned[address] = buffer
        return address

    def unpin(self, address: int) -> None:
        self._pinnable_bytes += len(self.pinned.pop(address))

    @property
    def gpu_count(self) -> int:
        return 1 + len(self._links)

    def link_to(self, ordinal: int) -> str:
        return self._links[ordinal]

    def open_neighbour(self, ordinal: int) -> None:
        assert self.neighbour is None
        if self.failing is not None:
            raise CudaFault("reaching the neighbour", self.failing, "as the test asked")
        self.neighbour = ordinal

    def neighbour_free_bytes(self) -> int:
        assert self.neighbour is not None
        return self._neighbour_bytes

    def allocate_in_neighbour(self, num_bytes: int) -> int:
        assert self.neighbour is not None
        if num_bytes > self._neighbour_bytes:
            raise CudaFault("allocating", "CUDA_ERROR_OUT_OF_MEMORY", "out of memory")
        self._neighbour_bytes -= num_bytes
        buffer = (ctypes.c_byte * num_bytes)()
        self.lent[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free_in_neighbour(self, address: int) -> None:
        self._neighbour_bytes += len(self.lent.pop(address))

    def _check_reach(self, *ends: int) -> None:
        """On a GPU such copies are right, but slow and synchronous."""
        lent = [range(start, start + len(buffer)) for start, buffer in self.lent.items()]
        if any(end in part for end in ends for part in lent):
            for mapped in self._unreached.values():
                assert not any(end in mapped for end in ends), "mapped before it was opened"

    def view(self, address: int, num_bytes: int, dtype: torch.dtype) -> torch.Tensor:
        buffer = (ctypes.c_byte * num_bytes).from_address(address)
        return torch.frombuffer(buffer, dtype=dtype)
