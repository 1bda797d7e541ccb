"""What happened, in order: a bounded log of every message an actor handled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from pie_async.ids import IterationId
from pie_async.messages import AnyMessage

_encoder = msgspec.msgpack.Encoder()


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One handled message."""

    at_s: float
    actor: str
    message: AnyMessage


class Story:
    """The last `length` messages of one engine.

    Entries refer to the (immutable) messages themselves, so noting one costs well under a
    microsecond. In virtual time two runs of the same seed give equal stories.
    """

    def __init__(self, now: Callable[[], float], *, length: int = 4096) -> None:
        self._now = now
        self._entries: deque[Entry] = deque(maxlen=length)

    def keep_all(self) -> None:
        """Forget nothing from now on."""
        self._entries = deque(self._entries)

    def note(self, actor: str, message: AnyMessage) -> None:
        self._entries.append(Entry(self._now(), actor, message))

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def of_iteration(self, iteration: IterationId) -> list[Entry]:
        """All that is remembered of one iteration."""
        return [e for e in self._entries if getattr(e.message, "iteration", None) == iteration]

    def to_bytes(self) -> bytes:
        """The entries as concatenated msgpack frames, to compare or to store."""
        return b"".join(_encoder.encode(entry) for entry in self._entries)

    def tell(self, *, last: int = 40) -> str:
        """The last entries as text, for an error report."""
        entries = list(self._entries)[-last:]
        return "\n".join(f"{e.at_s:12.6f}  {e.actor:18} {e.message}" for e in entries)
