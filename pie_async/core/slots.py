"""Who owns which slot of an arena."""

from __future__ import annotations

import heapq


class SlotPool:
    """Slots 0 .. size - 1 of one arena, the lowest free one first.

    Lowest first keeps the used slots dense, so that copies of neighbouring blocks merge
    into long runs.
    """

    def __init__(self, name: str, size: int, *, first: int = 0) -> None:
        self.name = name
        self.size = size
        self.first = first
        self._free = list(range(first, first + size))  # sorted, so already a heap
        self._is_free = bytearray(b"\x01" * size)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.size - len(self._free)

    def take(self) -> int | None:
        """The lowest free slot, or None."""
        if not self._free:
            return None
        slot = heapq.heappop(self._free)
        self._is_free[slot - self.first] = 0
        return slot

    def give_back(self, slot: int) -> None:
        assert not self._is_free[slot - self.first], f"{self.name} slot {slot} freed twice"
        self._is_free[slot - self.first] = 1
        heapq.heappush(self._free, slot)

    def is_free(self, slot: int) -> bool:
        return bool(self._is_free[slot - self.first])
