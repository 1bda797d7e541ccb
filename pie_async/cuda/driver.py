"""The part of the CUDA driver that the device needs, in plain numbers.

Streams, events, memory and addresses are integers; times are seconds. The only module that
calls cuda-python, and the one place where the driver's errors become the project's. A thread
calls `enter_thread` before anything else.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from cuda.bindings import driver as cuda

from pie_async.cuda.errors import CudaFault

Copies = npt.NDArray[np.uint64]
"""[3, n]: source addresses, destination addresses, bytes."""
PeerLink = Literal["none", "pcie", "nvlink"]
"""What joins two GPUs, if each can reach the other's memory."""


class Driver:
    """One GPU, in the context that torch uses too.

    Args:
        device: with an index, or torch's current device.
    """

    def __init__(self, device: torch.device) -> None:
        torch.cuda.init()
        ordinal = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", ordinal)
        _checked(cuda.cuInit(0), "starting")
        self._gpu = _checked(cuda.cuDeviceGet(ordinal), "looking for the GPU")
        self._context = _checked(cuda.cuDevicePrimaryCtxRetain(self._gpu), "opening the GPU")
        self._torch_streams: dict[int, torch.cuda.Stream] = {}
        self.enter_thread()
        self._neighbour: tuple[Any, Any] | None = None
        location = _location(ordinal)
        self._memory = cuda.CUmemAllocationProp()
        self._memory.type = cuda.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._memory.location = location
        self._accesses = [_access(location)]
        self._batched = cuda.CUmemcpyAttributes()
        self._batched.srcAccessOrder = cuda.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
        self._batched.flags = cuda.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE
        self._copy_batch = _batch_copy_function()
        granularity = cuda.CUmemAllocationGranularity_flags
        self.page_bytes = int(
            _checked(
                cuda.cuMemGetAllocationGranularity(
                    self._memory, granularity.CU_MEM_ALLOC_GRANULARITY_MINIMUM
                ),
                "asking for the page size",
            )
        )
        """Address ranges are mapped in multiples of it."""

    def close(self) -> None:
        """Give back what torch keeps for later, and this use of the context."""
        try:
            self.limit_torch(self.total_bytes())
            self.trim()
        finally:
            self._close_neighbour()
            cuda.cuDevicePrimaryCtxRelease(self._gpu)

    def enter_thread(self) -> None:
        """Make this GPU the calling thread's."""
        torch.cuda.set_device(self.device)
        _checked(cuda.cuCtxSetCurrent(self._context), "entering a thread")

    def synchronize_device(self) -> None:
        """Block until everything issued to the GPU, by torch too, is done."""
        torch.cuda.synchronize(self.device)

    # --- streams and events -----------------------------------------------------------------

    def create_stream(self) -> int:
        flags = cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(_checked(cuda.cuStreamCreate(flags), "creating a stream"))

    def destroy_stream(self, stream: int) -> None:
        _checked(cuda.cuStreamDestroy(stream), "destroying a stream")

    def synchronize_stream(self, stream: int) -> None:
        _checked(cuda.cuStreamSynchronize(stream), "waiting for a stream")

    def torch_on(self, stream: int) -> AbstractContextManager[Any]:
        """Inside it, the calling thread's torch operations go to this stream."""
        if stream not in self._torch_streams:
            external = torch.cuda.ExternalStream(stream, self.device)
            self._torch_streams[stream] = external
        return torch.cuda.stream(self._torch_streams[stream])

    def create_event(self) -> int:
        """An event that tells the time, and lets a waiting thread sleep."""
        flags = cuda.CUevent_flags.CU_EVENT_BLOCKING_SYNC
        return int(_checked(cuda.cuEventCreate(flags), "creating an event"))

    def destroy_event(self, event: int) -> None:
        _checked(cuda.cuEventDestroy(event), "destroying an event")

    def record(self, event: int, stream: int) -> None:
        _checked(cuda.cuEventRecord(event, stream), "recording an event")

    def wait(self, stream: int, event: int) -> None:
        _checked(cuda.cuStreamWaitEvent(stream, event, 0), "waiting for an event")

    def synchronize(self, event: int) -> None:
        """Block this thread, without the interpreter's lock, until the event has fired."""
        _checked(cuda.cuEventSynchronize(event), "running issued work")

    def elapsed_s(self, first: int, last: int) -> float:
        """Time between two events that have fired."""
        return float(_checked(cuda.cuEventElapsedTime(first, last), "reading the time")) / 1e3

    # --- copies -----------------------------------------------------------------------------

    def copy(self, copies: Copies, stream: int) -> None:
        """Issue copies, which may run in any order among themselves."""
        count = copies.shape[1]
        if count == 1:
            source, destination, num_bytes = copies[:, 0].tolist()
            _checked(cuda.cuMemcpyAsync(destination, source, num_bytes, stream), "copying")
        elif count:
            # Many small copies: 2.4 times the rate of one call for each (64 KiB, PCIe 5).
            rows = np.ascontiguousarray(copies)
            sources, destinations, sizes = (row.ctypes.data for row in rows)
            attributes, first = int(self._batched.getPtr()), ctypes.addressof(_FIRST)
            code = self._copy_batch(
                destinations, sources, sizes, count, attributes, first, 1, int(stream)
            )
            _checked((cuda.CUresult(code),), "copying")

    def spin(self, seconds: float, stream: int) -> None:
        """Keep a stream busy for about so long, by the clock that the card may run at."""
        clock = cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CLOCK_RATE
        khz = _checked(cuda.cuDeviceGetAttribute(clock, self._gpu), "asking for the clock's rate")
        with self.torch_on(stream):
            torch.cuda._sleep(int(seconds * float(khz) * 1e3))

    # --- memory -----------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """Memory that is free on the card, by the driver's count."""
        return int(_checked(cuda.cuMemGetInfo(), "asking for free memory")[0])

    def total_bytes(self) -> int:
        """Memory that the card has, by the driver's count."""
        return int(_checked(cuda.cuMemGetInfo(), "asking for the memory's size")[1])

    @property
    def memory_bytes_per_s(self) -> float:
        """Fastest that the card's memory can be read, by its clock and width."""
        attribute = cuda.CUdevice_attribute
        clock_khz, width_bits = (
            _checked(cuda.cuDeviceGetAttribute(each, self._gpu), "asking for the memory's rate")
            for each in (
                attribute.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE,
                attribute.CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH,
            )
        )
        return 2 * float(clock_khz) * 1e3 * float(width_bits) / 8

    @property
    def name(self) -> str:
        """What the card is called."""
        return torch.cuda.get_device_name(self.device)

    def torch_bytes(self) -> int:
        """Memory that torch has taken from the driver, in use or kept for later."""
        return torch.cuda.memory_reserved(self.device)

    def torch_kept_bytes(self) -> int:
        """Of `torch_bytes`, what is in no tensor now."""
        return self.torch_bytes() - torch.cuda.memory_allocated(self.device)

    def limit_torch(self, num_bytes: int) -> None:
        """Let torch take no more than this; it gives back what it keeps before it fails."""
        share = max(0.0, min(1.0, num_bytes / self.total_bytes()))
        torch.cuda.set_per_process_memory_fraction(share, self.device)

    def trim(self) -> None:
        """Give back what torch keeps for later."""
        torch.cuda.empty_cache()

    def reserve(self, num_bytes: int) -> int:
        """Addresses without memory."""
        reserved = cuda.cuMemAddressReserve(num_bytes, self.page_bytes, 0, 0)
        return int(_checked(reserved, "reserving addresses"))

    def unreserve(self, address: int, num_bytes: int) -> None:
        _checked(cuda.cuMemAddressFree(address, num_bytes), "freeing addresses")

    def create_memory(self, num_bytes: int) -> int:
        """Memory without an address, a multiple of `page_bytes`."""
        return int(_checked(cuda.cuMemCreate(num_bytes, self._memory, 0), "allocating memory"))

    def release_memory(self, memory: int) -> None:
        """Freed once it is unmapped everywhere."""
        handle = cuda.CUmemGenericAllocationHandle(memory)
        _checked(cuda.cuMemRelease(handle), "freeing memory")

    def map(self, address: int, num_bytes: int, memory: int) -> None:
        """All of this memory at these addresses; the same memory may be mapped several times.
        A neighbour that is open reaches it too: copies that it does not reach are slow."""
        handle = cuda.CUmemGenericAllocationHandle(memory)
        _checked(cuda.cuMemMap(address, num_bytes, 0, handle, 0), "mapping memory")
        accesses = self._accesses
        access = cuda.cuMemSetAccess(address, num_bytes, accesses, len(accesses))
        _checked(access, "mapping memory")

    def unmap(self, address: int, num_bytes: int) -> None:
        _checked(cuda.cuMemUnmap(address, num_bytes), "unmapping memory")

    def pin(self, num_bytes: int) -> int:
        """Host memory that copies can reach directly; takes 0.4 s per GiB."""
        pinned = cuda.cuMemHostAlloc(num_bytes, cuda.CU_MEMHOSTALLOC_PORTABLE)
        return int(_checked(pinned, "pinning host memory"))

    def unpin(self, address: int) -> None:
        _checked(cuda.cuMemFreeHost(address), "freeing host memory")

    def view(self, address: int, num_bytes: int, dtype: torch.dtype) -> torch.Tensor:
        """Device memory as a flat tensor, which does not own it."""
        return torch.as_tensor(_Bytes(address, num_bytes), device=self.device).view(dtype)

    # --- a neighbour: a GPU that lends its memory ----------------------------------------------

    @property
    def gpu_count(self) -> int:
        """GPUs that this process sees; their ordinals are those below."""
        return int(_checked(cuda.cuDeviceGetCount(), "counting the GPUs"))

    def link_to(self, ordinal: int) -> PeerLink:
        """How this GPU and another one reach each other's memory."""
        other = _checked(cuda.cuDeviceGet(ordinal), "looking for the neighbour")
        for here, there in ((self._gpu, other), (other, self._gpu)):
            asked = cuda.cuDeviceCanAccessPeer(here, there)
            if not _checked(asked, "asking for the way to the neighbour"):
                return "none"
        # The driver has no word for it, but NVLink carries every atomic operation and PCIe does
        # not; its performance rank only orders the links of one machine.
        atomics = cuda.CUdevice_P2PAttribute.CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED
        asked = cuda.cuDeviceGetP2PAttribute(atomics, self._gpu, other)
        return "nvlink" if _checked(asked, "asking for the way to the neighbour") else "pcie"

    def open_neighbour(self, ordinal: int) -> None:
        """Let copies reach a GPU's memory, and it what is mapped here from now on; one at most.

        This GPU itself may be the neighbour, where there is no other to test with.
        """
        assert self._neighbour is None, "there is one neighbour at most"
        gpu = _checked(cuda.cuDeviceGet(ordinal), "looking for the neighbour")
        context = _checked(cuda.cuDevicePrimaryCtxRetain(gpu), "opening the neighbour")
        self._neighbour = (gpu, context)
        if ordinal == self.device.index:
            return
        try:
            _reach(context)
            with self._in_neighbour():
                _reach(self._context)
        except CudaFault:
            self._close_neighbour()
            raise
        self._accesses.append(_access(_location(ordinal)))

    def _close_neighbour(self) -> None:
        if self._neighbour is not None:
            cuda.cuDevicePrimaryCtxRelease(self._neighbour[0])
            self._neighbour = None

    def neighbour_free_bytes(self) -> int:
        """Memory that is free on the neighbour, by the driver's count."""
        with self._in_neighbour():
            return self.free_bytes()

    def allocate_in_neighbour(self, num_bytes: int) -> int:
        """The neighbour's memory, in one piece."""
        with self._in_neighbour():
            return int(_checked(cuda.cuMemAlloc(num_bytes), "allocating memory of the neighbour"))

    def free_in_neighbour(self, address: int) -> None:
        with self._in_neighbour():
            _checked(cuda.cuMemFree(address), "freeing memory of the neighbour")

    @contextmanager
    def _in_neighbour(self) -> Iterator[None]:
        """Inside it, the calling thread's driver calls are the neighbour's."""
        assert self._neighbour is not None, "open_neighbour() comes first"
        _checked(cuda.cuCtxPushCurrent(self._neighbour[1]), "turning to the neighbour")
        try:
            yield
        finally:
            cuda.cuCtxPopCurrent()


class _Bytes:
    """Device memory as other libraries see it (the CUDA Array Interface, version 3)."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


_FIRST = (ctypes.c_size_t * 1)(0)
"""The attributes of a batch begin to hold with its first copy."""
_BATCH_COPY_SINCE = 13000
"""The CUDA version whose cuMemcpyBatchAsync is called: the one before took another argument."""


def _batch_copy_function() -> Any:
    """cuMemcpyBatchAsync, to be called with arrays: cuda-python wants an object for every address,
    2 us a copy, with the interpreter's lock held."""
    flags = cuda.CUdriverProcAddress_flags.CU_GET_PROC_ADDRESS_DEFAULT
    asked = cuda.cuGetProcAddress(b"cuMemcpyBatchAsync", _BATCH_COPY_SINCE, flags)
    address = int(_checked(asked, "looking for the driver's batched copies")[0])
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    prototype = ctypes.CFUNCTYPE(
        ctypes.c_int, pointer, pointer, pointer, size, pointer, pointer, size, pointer
    )
    return prototype(address)


def _location(ordinal: int) -> Any:
    location = cuda.CUmemLocation()
    location.type = cuda.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    location.id = ordinal
    return location


def _access(location: Any) -> Any:
    access = cuda.CUmemAccessDesc()
    access.location = location
    access.flags = cuda.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
    return access


def _reach(context: Any) -> None:
    """Let the calling thread's GPU reach what is allocated in this context, of another GPU."""
    result = cuda.cuCtxEnablePeerAccess(context, 0)
    # torch, or an engine before this one, may have done it
    if result[0] != cuda.CUresult.CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED:
        _checked(result, "reaching the neighbour")


def _checked(result: tuple[Any, ...], doing: str) -> Any:
    """What a driver call returned beside its error code.

    Raises:
        CudaFault: it failed.
    """
    code, *values = result
    if code != cuda.CUresult.CUDA_SUCCESS:
        name = _text(cuda.cuGetErrorName(code)) or str(code)
        raise CudaFault(doing, name, _text(cuda.cuGetErrorString(code)))
    return values[0] if len(values) == 1 else values


def _text(result: tuple[Any, ...]) -> str:
    return result[1].decode() if isinstance(result[1], bytes) else ""
