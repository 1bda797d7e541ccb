"""The host pool of the CPU device: address space whose pages are committed when first written."""

from __future__ import annotations

import ctypes
import mmap

from pie_async.core.layout import KvLayout
from pie_async.errors import DeviceFault


class CpuPool:
    """Slots of KV, layer-major: one layer of neighbours is contiguous.

    Attributes:
        slots: that may be used; the pages of the others are not committed.
    """

    def __init__(self, layout: KvLayout, slots: int) -> None:
        """
        Raises:
            OSError: the operating system refuses the address space.
        """
        self._slot_bytes = layout.layer_block_bytes
        self._most = self.slots = slots
        # Whole pages a layer: what is given back of one must not be another's.
        pages = -(-max(1, slots) * self._slot_bytes // mmap.PAGESIZE)
        self._layer_bytes = pages * mmap.PAGESIZE
        self._num_layers = layout.num_layers
        self._memory = mmap.mmap(-1, self._num_layers * self._layer_bytes, mmap.MAP_PRIVATE)
        self._view = (ctypes.c_byte * len(self._memory)).from_buffer(self._memory)
        self._start = ctypes.addressof(self._view)

    def address(self, layer: int) -> int:
        """Where one layer of slot 0 lies; the next slots follow."""
        return self._start + layer * self._layer_bytes

    def require(self, slots: int) -> None:
        """
        Raises:
            DeviceFault: there are fewer.
        """
        if slots > self.slots:
            raise DeviceFault(
                f"host slot {slots - 1} is copied, but the pool has memory for {self.slots}"
            )

    def resize(self, slots: int) -> None:
        """Use so many from now on; the pages behind them go back to the operating system."""
        self.slots = slots
        first = -(-slots * self._slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if slots == self._most or first == self._layer_bytes or not hasattr(mmap, "MADV_DONTNEED"):
            return
        for layer in range(self._num_layers):
            start = layer * self._layer_bytes + first
            self._memory.madvise(mmap.MADV_DONTNEED, start, self._layer_bytes - first)

    def close(self) -> None:
        """Give all of it back; nothing is copied any more."""
        del self._view
        self._memory.close()
