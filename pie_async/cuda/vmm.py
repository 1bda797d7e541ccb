"""The device arena: per layer one address range [resident slots | staging slots].

The staging part of layer l maps ring buffer l mod R, so a slot number means the same in every
layer and staging costs R / L of what is streamed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from pie_async.config import format_size
from pie_async.core.layout import KvLayout
from pie_async.cuda.errors import CudaFault
from pie_async.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from pie_async.cuda.driver import Driver


class DeviceArena:
    """KV memory on the GPU.

    Attributes:
        layers: per layer, [slots, 2, kv_heads, block_tokens, head_dim].
        first_staging_slot: where the staging part begins: at or above the number of resident
            slots asked for, because mappings begin at page borders.
        staging_slots: how many there are.
        layer_bytes: from a slot to the same one of the next layer.
    """

    def __init__(
        self,
        driver: Driver,
        layout: KvLayout,
        *,
        device_slots: int,
        staging_slots: int,
        dtype: torch.dtype,
    ) -> None:
        """Allocate and map.

        Raises:
            ConfigError: the card has too little memory.
        """
        self._driver = driver
        self._layout = layout
        self._slot_bytes = slot_bytes = layout.layer_block_bytes
        page = driver.page_bytes
        slots_per_page = page // math.gcd(slot_bytes, page)
        self.first_staging_slot = -(-device_slots // slots_per_page) * slots_per_page
        self.staging_slots = staging_slots
        slots = self.first_staging_slot + staging_slots
        self.layer_bytes = self._paged(slots)
        self._undo: list[Callable[[], None]] = []
        try:
            self._allocate(device_slots)
            self._allocate_ring()
        except CudaFault as fault:
            self.close()
            raise self._refused(fault, device_slots, staging_slots) from fault
        shape = (slots, 2, layout.kv_heads, layout.block_tokens, layout.head_dim)
        self.layers = [
            driver.view(self.address(layer, 0), slots * slot_bytes, dtype).view(shape)
            for layer in range(layout.num_layers)
        ]

    def address(self, layer: int, slot: int) -> int:
        """Where one layer of a block lies; following slots follow."""
        return self._start + layer * self.layer_bytes + slot * self._slot_bytes

    def close(self) -> None:
        """Unmap and free everything; `layers` must not be used any more."""
        self.layers = []
        while self._undo:
            self._undo.pop()()

    def _paged(self, slots: int) -> int:
        """Bytes of whole pages that hold this many slots of one layer."""
        page = self._driver.page_bytes
        return -(-slots * self._slot_bytes // page) * page

    def _allocate(self, device_slots: int) -> None:
        driver, num_layers = self._driver, self._layout.num_layers
        num_bytes = num_layers * self.layer_bytes
        self._start = start = driver.reserve(num_bytes)
        self._undo.append(lambda: driver.unreserve(start, num_bytes))
        resident_bytes = self._paged(device_slots)
        for layer in range(num_layers):
            self._map(self.address(layer, 0), resident_bytes, self._memory(resident_bytes))

    def _allocate_ring(self) -> None:
        layout, buffer_bytes = self._layout, self._paged(self.staging_slots)
        if not buffer_bytes:
            return
        buffers = [self._memory(buffer_bytes) for _ in range(layout.ring_layers)]
        for layer in range(layout.num_layers):
            address = self.address(layer, self.first_staging_slot)
            self._map(address, buffer_bytes, buffers[layout.ring_buffer(layer)])

    def _memory(self, num_bytes: int) -> int:
        memory = self._driver.create_memory(num_bytes)
        self._undo.append(lambda: self._driver.release_memory(memory))
        return memory

    def _map(self, address: int, num_bytes: int, memory: int) -> None:
        self._driver.map(address, num_bytes, memory)
        self._undo.append(lambda: self._driver.unmap(address, num_bytes))

    def _refused(self, fault: CudaFault, device_slots: int, staging_slots: int) -> Exception:
        if not fault.is_out_of_memory:
            return fault
        layout = self._layout
        arena_bytes = layout.num_layers * self._paged(device_slots)
        ring_bytes = layout.ring_layers * self._paged(staging_slots)
        return ConfigError(
            f"the GPU has no room for {format_size(arena_bytes)} of KV and a staging ring of "
            f"{format_size(ring_bytes)} beside the weights: "
            f"{format_size(self._driver.free_bytes())} are free; lower device_kv_bytes or "
            "max_streamed_bytes",
            option="device_kv_bytes",
        )
