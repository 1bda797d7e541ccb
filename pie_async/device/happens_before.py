"""Finds accesses to memory that nothing orders: races, even where the timing happened to fit.

Vector clocks with FastTrack's per-location epochs (Flanagan and Freund, PLDI 2009), over
streams instead of threads. Order comes from three things only: a stream's own order, an
event waited for after it was recorded, and the host having observed an event before it
issued more work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pie_async.errors import DeviceFault

Locations = npt.NDArray[np.int64]
Clock = tuple[int, ...]

_REMEMBERED_OPERATIONS = 1 << 14


class _Operation(NamedTuple):
    label: str
    span_s: tuple[float, float] | None

    @property
    def when(self) -> str:
        if self.span_s is None:
            return "at an unknown time"
        begin_s, end_s = self.span_s
        return f"from {begin_s:.9f} to {end_s:.9f} s"


class UnorderedAccess(DeviceFault):
    """Two accesses to one location, at least one a write, with no order between them."""


class HappensBefore:
    """Checks reads and writes of numbered memory locations by a few streams.

    An operation begins with `begin`, then names what it reads and writes. Operations come
    in their order of issue, from one thread.
    """

    def __init__(
        self, streams: Sequence[str], num_locations: int, describe: Callable[[int], str]
    ) -> None:
        """`describe` names a location in an error."""
        count = len(streams)
        self._streams = tuple(streams)
        self._describe = describe
        self._host = [0] * count
        self._clocks = np.zeros((count, count), np.int64)
        self._operations: list[deque[_Operation]] = [
            deque(maxlen=_REMEMBERED_OPERATIONS) for _ in range(count)
        ]
        self._writer = np.zeros(num_locations, np.int8)
        self._write_epoch = np.zeros(num_locations, np.int64)
        self._read_epochs = np.zeros((count, num_locations), np.int64)

    def begin(self, stream: int, label: str, span_s: tuple[float, float] | None = None) -> None:
        """Start an operation of this stream; errors name it, and when it began and ended."""
        self._clocks[stream, stream] += 1
        self._operations[stream].append(_Operation(label, span_s))

    def read(self, stream: int, locations: Locations) -> None:
        """The operation begun last on this stream reads these locations.

        Raises:
            UnorderedAccess: one of them was written without order before this.
        """
        self._check_writes(stream, locations, "reads")
        self._read_epochs[stream, locations] = self._clocks[stream, stream]

    def write(self, stream: int, locations: Locations) -> None:
        """The operation begun last on this stream writes these locations.

        Raises:
            UnorderedAccess: one of them was read or written without order before this.
        """
        self._check_writes(stream, locations, "writes")
        for other, clock in enumerate(self._clocks[stream].tolist()):
            if other == stream:
                continue
            late = self._read_epochs[other, locations] > clock
            if late.any():
                location = int(locations[late.argmax()])
                epoch = int(self._read_epochs[other, location])
                self._report(stream, "writes", location, other, "reads", epoch)
        self._writer[locations] = stream
        self._write_epoch[locations] = self._clocks[stream, stream]

    def record(self, stream: int) -> Clock:
        """What an event recorded now on this stream comes after."""
        return tuple(self._clocks[stream].tolist())

    def wait(self, stream: int, recorded: Clock) -> None:
        """Later operations of this stream come after the event recorded there."""
        np.maximum(self._clocks[stream], recorded, out=self._clocks[stream])

    def observe(self, recorded: Clock) -> None:
        """The host saw that event fire; what it issues from now on comes after it."""
        self._host = [max(pair) for pair in zip(self._host, recorded, strict=True)]

    def host_issues(self) -> None:
        """The host is about to issue work, ordered after all it has observed."""
        np.maximum(self._clocks, self._host, out=self._clocks)

    def _check_writes(self, stream: int, locations: Locations, does: str) -> None:
        known = self._clocks[stream][self._writer[locations]]
        late = self._write_epoch[locations] > known
        if late.any():
            location = int(locations[late.argmax()])
            epoch = int(self._write_epoch[location])
            self._report(stream, does, location, int(self._writer[location]), "writes", epoch)

    def _report(
        self, stream: int, does: str, location: int, other: int, did: str, epoch: int
    ) -> None:
        late = self._operation(stream, int(self._clocks[stream, stream]))
        early = self._operation(other, epoch)
        here, there = self._streams[stream], self._streams[other]
        raise UnorderedAccess(
            f"{here}: {late.label} {does} {self._describe(location)}, which {there}: "
            f"{early.label} {did}, and no event orders the two; let {here} wait for an event "
            f"that {there} records after its access ({there} {early.when}, {here} {late.when})"
        )

    def _operation(self, stream: int, epoch: int) -> _Operation:
        """A stream's operation, unless it was too long ago."""
        kept = self._operations[stream]
        index = epoch - 1 - (int(self._clocks[stream, stream]) - len(kept))
        if index < 0:
            return _Operation(f"an operation {-index} before the oldest kept", None)
        return kept[index]
