"""Attempts to copy: how many a copy has, and what a stream remembers of those that failed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from pie_async.ids import HostSlot
from pie_async.runtime.faults import CopyKind

MOST_ATTEMPTS = 3
"""A copy that failed, or whose blocks arrived with other checksums, is made again at once: who
waits for it is on a stream and cannot ask."""

Outcome = Literal["arrives", "fails", "corrupted"]
Tamper = Callable[[CopyKind], Outcome]
"""Asked before every attempt what becomes of it: how plans of faults reach a device's copies."""

Mark = tuple[int, int]

MOST_KEPT = 4096
"""Verdicts of a stream: far more than there are between its oldest unread event and now."""


class _Verdict(NamedTuple):
    """What became of copies of these host slots' blocks."""

    number: int
    slots: Sequence[HostSlot]
    is_wrong: Iterable[object] | None
    """For each slot, once the stream got there; None: all are."""

    def damaged(self) -> list[HostSlot]:
        if self.is_wrong is None:
            return list(self.slots)
        return [slot for slot, wrong in zip(self.slots, self.is_wrong, strict=True) if wrong]


class Attempts:
    """One stream's failed attempts; whoever works on the stream counts, its events keep marks."""

    def __init__(self) -> None:
        self._num_failed = 0
        self._num_verdicts = 0
        self._verdicts: deque[_Verdict] = deque(maxlen=MOST_KEPT)

    def numbers(self) -> Iterator[int]:
        """Number the attempts of a copy; leave the loop at the one that went well."""
        for number in range(1, MOST_ATTEMPTS + 1):
            yield number
            self._num_failed += 1

    def give_up(self, slots: Sequence[HostSlot]) -> None:
        """What is in these host slots was not copied, or not as it is."""
        self._add(slots, None)

    def will_tell(self, slots: Sequence[HostSlot], is_wrong: Iterable[object]) -> None:
        """What was copied of these host slots is being compared.

        Args:
            is_wrong: whether it came out wrong, for each; to be read once the stream got there.
        """
        self._add(slots, is_wrong)

    def mark(self) -> Mark:
        return self._num_failed, self._num_verdicts

    def between(self, first: Mark, last: Mark) -> tuple[int, tuple[HostSlot, ...]]:
        """Failed attempts, and the host slots whose blocks had no good one.

        The stream has got to `last`.
        """
        failed, damaged = last[0] - first[0], []
        if first[1] < last[1]:
            for verdict in list(self._verdicts):
                if first[1] <= verdict.number < last[1]:
                    found = verdict.damaged()
                    failed += bool(found and verdict.is_wrong is not None)
                    damaged += found
        return failed, tuple(dict.fromkeys(damaged))

    def _add(self, slots: Sequence[HostSlot], is_wrong: Iterable[object] | None) -> None:
        self._verdicts.append(_Verdict(self._num_verdicts, slots, is_wrong))
        self._num_verdicts += 1
