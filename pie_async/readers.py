"""Notices streams that nobody reads any more, and that somebody reads again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from pie_async.ids import SequenceId
from pie_async.request_stream import RequestStream

LOOKS = 4
"""In which the patience is counted: whether a stream was read is asked so often, for a timer for
each output would cost as much as the output."""

Changed = Callable[[tuple[SequenceId, ...], bool], None]
"""Told of unfinished sequences and whether somebody reads them."""


class Readers:
    """Looks at open streams from time to time, while one of them has output that waits."""

    def __init__(
        self,
        streams: Callable[[], Iterable[RequestStream]],
        *,
        patience_s: float,
        changed: Changed,
    ) -> None:
        """
        Args:
            streams: those that are open.
            patience_s: how long output may wait; 0: for ever.
        """
        self._streams = streams
        self._every_s = patience_s / LOOKS
        self._changed = changed
        self._seen: dict[RequestStream, tuple[int, int]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def note(self) -> None:
        """There is output. Cheap: to be called whenever there is."""
        if self._timer is None and self._every_s:
            self._timer = asyncio.get_running_loop().call_later(self._every_s, self._look)

    def close(self) -> None:
        """Look no more; what nobody reads counts as read."""
        self._every_s = 0.0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for stream in self._streams():
            if not stream.is_read:
                self._read_again(stream)

    def _look(self) -> None:
        self._timer = None
        unread: list[SequenceId] = []
        seen: dict[RequestStream, tuple[int, int]] = {}
        for stream in dict.fromkeys(self._streams()):
            if not (stream.is_read and stream.has_waiting_output):
                continue
            taken, looks = self._seen.get(stream, (-1, 0))
            looks = looks + 1 if taken == stream.num_taken else 0
            if looks < LOOKS:
                seen[stream] = (stream.num_taken, looks)
            else:
                stream.is_read, stream.on_read = False, self._read_again
                unread += stream.unfinished
        self._seen = seen
        if seen:
            self.note()
        if unread:
            self._changed(tuple(unread), False)

    def _read_again(self, stream: RequestStream) -> None:
        stream.is_read, stream.on_read = True, None
        self._changed(stream.unfinished, True)
