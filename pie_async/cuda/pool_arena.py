"""What the device asks of the memory that holds the pool, wherever that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

PCIE_BRIDGE_BYTES = 96 * 1024
NVLINK_BRIDGE_BYTES = 256 * 1024
"""What a link moves in 2 us, in which the host issues one copy of a batch (10,000 copies of 64 KiB
held an iteration up for 20 ms)."""

Grown = Callable[[int, str | None], None]
"""Told how many slots there are now, and why there will be no more, if memory is refused."""


class PoolArena(Protocol):
    """Slots of KV that copies reach directly, one layer of neighbours contiguous."""

    def pieces(self, slot: int, count: int) -> Iterator[tuple[int, int, int]]:
        """Contiguous pieces that together are one layer of these slots: (address in layer 0,
        bytes from there to the next layer, slots)."""

    @property
    def chunk_slots(self) -> int:
        """By which `resize` takes and gives back memory; 0: it does not."""

    @property
    def bridge_bytes(self) -> int:
        """Copying so much that nobody reads takes the link no longer than one more copy."""

    def watch(self, grown: Grown) -> None:
        """Call this now and whenever there are more slots or fewer, from any thread."""

    def resize(self, slots: int) -> None:
        """Begin to make it so large; `watch` tells when it is done."""

    @property
    def pinned_slots(self) -> int:
        """Slots that copies can use without waiting, the lowest ones."""

    def close(self) -> None:
        """Free everything; no copy is under way."""
