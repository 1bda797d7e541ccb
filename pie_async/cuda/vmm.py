"""The device arena: address ranges [resident slots | staging slots], one for every stack of layers.

A stack is a layer group, whose layers lie side by side in every slot, or a layer by itself
(`KvLayout.stacks`). The staging part of a stack maps a ring buffer that stacks of other groups map
too, so a slot number means the same in every layer, and the staging ring takes only as much of what
is streamed as its depth is of all groups.
"""

from __future__ import annotations

import itertools
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
        layout: what lies in it.
        layers: per layer, [slots, 2, kv_heads, block_tokens, head_dim], contiguous within a slot.
        stacks: each stack of the layout, and where it begins.
        first_staging_slot: where the staging part begins: at or above the number of resident
            slots asked for, because mappings begin at page borders.
        staging_slots: how many there are.
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
        self.layout = layout
        page = driver.page_bytes
        slots_per_page = page // math.gcd(layout.layer_block_bytes, page)
        self.first_staging_slot = -(-device_slots // slots_per_page) * slots_per_page
        self.staging_slots = staging_slots
        self._ring_bytes = self._paged(staging_slots, max(map(len, layout.stacks)))
        """Of one buffer; mapped whole, also where a stack has fewer layers than another."""
        self.stacks: list[tuple[range, int]] = []
        self._undo: list[Callable[[], None]] = []
        try:
            self._allocate(device_slots)
            self._allocate_ring()
        except CudaFault as fault:
            self.close()
            raise self._refused(fault, device_slots, staging_slots) from fault
        self.layers = [
            view for stack, start in self.stacks for view in self._views(stack, start, dtype)
        ]

    def close(self) -> None:
        """Unmap and free everything; `layers` must not be used any more."""
        self.layers = []
        while self._undo:
            self._undo.pop()()

    def _views(self, stack: range, start: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        layout, slots = self.layout, self.first_staging_slot + self.staging_slots
        num_bytes = slots * len(stack) * layout.layer_block_bytes
        shape = (2, layout.kv_heads, layout.block_tokens, layout.head_dim)
        return self._driver.view(start, num_bytes, dtype).view(slots, len(stack), *shape).unbind(1)

    def _paged(self, slots: int, layers: int) -> int:
        """Bytes of whole pages that hold these layers of so many slots."""
        page = self._driver.page_bytes
        return -(-slots * layers * self.layout.layer_block_bytes // page) * page

    def _allocate(self, device_slots: int) -> None:
        driver, stacks = self._driver, self.layout.stacks
        sizes = [self._before_staging(stack) + self._ring_bytes for stack in stacks]
        num_bytes = sum(sizes)
        start = driver.reserve(num_bytes)
        self._undo.append(lambda: driver.unreserve(start, num_bytes))
        starts = itertools.accumulate(sizes[:-1], initial=start)
        self.stacks = list(zip(stacks, starts, strict=True))
        for stack, address in self.stacks:
            resident_bytes = self._paged(device_slots, len(stack))
            self._map(address, resident_bytes, self._memory(resident_bytes))

    def _allocate_ring(self) -> None:
        if not self.staging_slots:
            return
        buffers: dict[int, int] = {}
        for stack, start in self.stacks:
            number = self.layout.ring_buffer(stack.start)
            if number not in buffers:
                buffers[number] = self._memory(self._ring_bytes)
            self._map(start + self._before_staging(stack), self._ring_bytes, buffers[number])

    def _before_staging(self, stack: range) -> int:
        """Bytes from a stack's start to its staging part: whole pages."""
        return self.first_staging_slot * len(stack) * self.layout.layer_block_bytes

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
        arena_bytes = sum(self._paged(device_slots, len(stack)) for stack in self.layout.stacks)
        ring_bytes = self._paged(staging_slots, self.layout.ring_layers)
        return ConfigError(
            f"the GPU has no room for {format_size(arena_bytes)} of KV and a staging ring of "
            f"{format_size(ring_bytes)} beside the weights: "
            f"{format_size(self._driver.free_bytes())} are free; lower device_kv_bytes or "
            "max_streamed_bytes",
            option="device_kv_bytes",
        )
