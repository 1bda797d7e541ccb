"""Who owns which slot of an arena."""

from __future__ import annotations

import heapq


class SlotPool:
    """Slots `first` .. `first` + size - 1 of one arena.

    The lowest free one first, or for other tenants the highest: each keeps its slots dense, so
    that copies of neighbouring blocks merge into long runs.
    """

    def __init__(self, name: str, size: int, *, first: int = 0) -> None:
        self.name = name
        self.size = size
        self.first = first
        self._is_free = bytearray(b"\x01" * size)
        self._num_free = size
        # Sorted, so already heaps. A slot taken from one stays in the other until its turn.
        self._lowest = _Heap(range(size))
        self._highest = _Heap(range(1 - size, 1))  # negated

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_used(self) -> int:
        return self.size - self._num_free

    def take(self, preferred: int | None = None, *, is_highest: bool = False) -> int | None:
        """The preferred slot if it is free, else the lowest or highest; None if none is."""
        if not self._num_free:
            return None
        if preferred is not None and self.is_free(preferred):
            index = preferred - self.first
        else:
            index = self._next(is_highest=is_highest)
        self._is_free[index] = 0
        self._num_free -= 1
        return self.first + index

    def give_back(self, slot: int) -> None:
        index = slot - self.first
        assert not self._is_free[index], f"{self.name} slot {slot} freed twice"
        self._is_free[index] = 1
        self._num_free += 1
        self._lowest.push(index)
        self._highest.push(-index)

    def grow(self, size: int) -> None:
        """So many slots from now on; never fewer than before."""
        more = range(self.size, size)
        self.size = max(self.size, size)
        self._is_free.extend(b"\x01" * len(more))
        self._num_free += len(more)
        for index in more:
            self._lowest.push(index)
            self._highest.push(-index)

    def is_free(self, slot: int) -> bool:
        index = slot - self.first
        return 0 <= index < self.size and bool(self._is_free[index])

    def _next(self, *, is_highest: bool) -> int:
        while True:
            index = -self._highest.pop() if is_highest else self._lowest.pop()
            if self._is_free[index]:
                return index


class _Heap:
    """Distinct numbers, the smallest first."""

    def __init__(self, numbers: range) -> None:
        self._numbers = list(numbers)
        self._held = set(numbers)

    def push(self, number: int) -> None:
        if number not in self._held:
            self._held.add(number)
            heapq.heappush(self._numbers, number)

    def pop(self) -> int:
        number = heapq.heappop(self._numbers)
        self._held.remove(number)
        return number
