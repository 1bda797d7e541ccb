"""Attempts to copy: how many a copy has, and what a stream remembers of those that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal

from pie_async.ids import HostSlot
from pie_async.runtime.faults import CopyKind

MOST_ATTEMPTS = 3
"""A copy that failed, or whose blocks arrived with other checksums, is made again at once: who
waits for it is on a stream and cannot ask."""

Outcome = Literal["arrives", "fails", "corrupted"]
Tamper = Callable[[CopyKind], Outcome]
"""Asked before every attempt what becomes of it: how plans of faults reach a device's copies."""

Mark = tuple[int, int]


class Attempts:
    """One stream's failed attempts; whoever works on the stream counts, its events keep marks."""

    def __init__(self) -> None:
        self._num_failed = 0
        self._damaged: list[HostSlot] = []

    def numbers(self) -> Iterator[int]:
        """Number the attempts of a copy; leave the loop at the one that went well."""
        for number in range(1, MOST_ATTEMPTS + 1):
            yield number
            self._num_failed += 1

    def give_up(self, slots: Iterable[HostSlot]) -> None:
        """What is in these host slots was not copied, or not as it is."""
        self._damaged += slots

    def mark(self) -> Mark:
        return self._num_failed, len(self._damaged)

    def between(self, first: Mark, last: Mark) -> tuple[int, tuple[HostSlot, ...]]:
        """Failed attempts, and the host slots whose blocks had no good one."""
        return last[0] - first[0], tuple(self._damaged[first[1] : last[1]])
