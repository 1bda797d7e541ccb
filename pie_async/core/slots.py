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
        self.num_retiring = 0
        """Slots in use that are the pool's no more: it was made smaller."""
        # Sorted, so already heaps. A slot taken from one stays in the other until its turn.
        self._lowest = _Heap(range(size))
        self._highest = _Heap(range(1 - size, 1))  # negated

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_used(self) -> int:
        """Slots that are taken, retiring ones included."""
        return self.size - self._num_free + self.num_retiring

    @property
    def end_used(self) -> int:
        """One more than the highest index of a slot that is taken; 0 if none is."""
        return self._is_free.rfind(b"\x00") + 1

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
        if index >= self.size:
            self.num_retiring -= 1
            return
        self._num_free += 1
        self._lowest.push(index)
        self._highest.push(-index)

    def resize(self, size: int) -> None:
        """So many slots from now on. Those behind that are taken retire: when they are given back
        nobody gets them again, unless the pool has grown until then."""
        self._is_free.extend(b"\x01" * (size - len(self._is_free)))
        low, high = sorted((self.size, size))
        num_taken = self._is_free.count(0, low, high)
        num_free = high - low - num_taken
        if size < self.size:
            self._num_free -= num_free
            self.num_retiring += num_taken
        else:
            self._num_free += num_free
            self.num_retiring -= num_taken
            for index in range(low, high):
                if self._is_free[index]:
                    self._lowest.push(index)
                    self._highest.push(-index)
        self.size = size

    def is_free(self, slot: int) -> bool:
        index = slot - self.first
        return 0 <= index < self.size and bool(self._is_free[index])

    def num_free_between(self, start: int, stop: int) -> int:
        """Free ones among the slots of index start .. stop - 1, counted from `first`."""
        return self._is_free.count(1, start, min(stop, self.size))

    def _next(self, *, is_highest: bool) -> int:
        while True:
            index = -self._highest.pop() if is_highest else self._lowest.pop()
            if index < self.size and self._is_free[index]:
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
