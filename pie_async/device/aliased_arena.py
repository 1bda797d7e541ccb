"""CPU memory in which several layers' staging slots are the same physical pages.

Per layer, one address range [resident slots | staging slots]. The staging parts of layers that
are never staged at once map the same ring buffer, so a slot number means the same in every layer
and staging takes a part of what is streamed: on the CPU by mapping one shared file several
times, on CUDA by mapping one physical allocation at several addresses. Pages are committed when
first written.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import tempfile

import torch

from pie_async.core.layout import KvLayout
from pie_async.errors import ConfigError

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value


class AliasedArena:
    """Address ranges for all layers, each viewed as a tensor.

    Attributes:
        layers: per layer, [slots, 2, kv_heads, block_tokens, head_dim]; zero at first.
        first_staging_slot: where the staging part begins: at or above the number of resident
            slots asked for, because mappings begin at page borders.
        slots: slots per layer, staging ones included.
    """

    def __init__(
        self, layout: KvLayout, *, device_slots: int, staging_slots: int, dtype: torch.dtype
    ) -> None:
        """Map the memory.

        Raises:
            ConfigError: the operating system refuses the address space.
        """
        slot_bytes = layout.layer_block_bytes
        slots_per_page = mmap.PAGESIZE // math.gcd(slot_bytes, mmap.PAGESIZE)
        self.first_staging_slot = -(-device_slots // slots_per_page) * slots_per_page
        self.slots = self.first_staging_slot + staging_slots
        resident_bytes = self.first_staging_slot * slot_bytes
        ring_bytes = -(-staging_slots * slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        layer_bytes = resident_bytes + ring_bytes
        self._mapping = _Mapping(layout.num_layers * layer_bytes)
        file = _shared_file(layout.num_layers * resident_bytes + layout.ring_layers * ring_bytes)
        try:
            for layer in range(layout.num_layers):
                start = self._mapping.address + layer * layer_bytes
                _map(start, resident_bytes, file, layer * resident_bytes)
                ring = layout.num_layers * resident_bytes + layout.ring_buffer(layer) * ring_bytes
                _map(start + resident_bytes, ring_bytes, file, ring)
        finally:
            os.close(file)
        shape = (self.slots, 2, layout.kv_heads, layout.block_tokens, layout.head_dim)
        self.layers = [
            self._mapping.view(layer * layer_bytes, self.slots * slot_bytes, dtype).view(shape)
            for layer in range(layout.num_layers)
        ]


class _Mapping:
    """A reserved address range, given back when nothing views it any more."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self.address = _map(None, num_bytes, -1, 0)

    def view(self, offset: int, num_bytes: int, dtype: torch.dtype) -> torch.Tensor:
        buffer = (ctypes.c_byte * num_bytes).from_address(self.address + offset)
        buffer._mapping = self  # type: ignore[attr-defined]  # torch keeps the buffer alive
        return torch.frombuffer(buffer, dtype=dtype)

    def __del__(self) -> None:
        if hasattr(self, "address"):
            _libc.munmap(self.address, self._num_bytes)


def _shared_file(num_bytes: int) -> int:
    """A file descriptor of anonymous, sparse, shareable memory."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("pie_async_kv")
    else:
        with tempfile.TemporaryFile() as unlinked:
            file = os.dup(unlinked.fileno())
    os.ftruncate(file, max(num_bytes, mmap.PAGESIZE))
    return file


def _map(address: int | None, num_bytes: int, file: int, offset: int) -> int:
    """mmap; at `address` exactly, if given; reserved but inaccessible without a file."""
    if num_bytes == 0:
        assert address is not None
        return address
    if file == -1:
        protection, flags = 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    else:
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
    mapped = _libc.mmap(address, num_bytes, protection, flags, file, offset)
    if mapped == _MAP_FAILED or mapped is None:
        reason = os.strerror(ctypes.get_errno())
        raise ConfigError(
            f"the operating system refuses {num_bytes} bytes for the KV arena ({reason}); "
            "lower device_kv_bytes or host_pool_bytes",
            option="device_kv_bytes",
        )
    return int(mapped)
