"""What happened, in order: a bounded log of every message an actor handled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import takewhile

import msgspec

from pie_async.ids import IterationId
from pie_async.messages import AnyMessage

MOST_SHOWN = 8
"""Entries of a tuple that are told: a prompt may have a hundred thousand."""

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

    def since(self, at_s: float) -> list[Entry]:
        """What was handled after `at_s`. Cost: that alone, however much is remembered."""
        recent = list(takewhile(lambda entry: entry.at_s > at_s, reversed(self._entries)))
        recent.reverse()
        return recent

    def of_iteration(self, iteration: IterationId) -> list[Entry]:
        """All that is remembered of one iteration."""
        return [e for e in self._entries if getattr(e.message, "iteration", None) == iteration]

    def to_bytes(self) -> bytes:
        """The entries as concatenated msgpack frames, to compare or to store."""
        return b"".join(_encoder.encode(entry) for entry in self._entries)

    def tell(self, *, last: int = 40) -> str:
        """The last entries as text, for an error report; long tuples are cut."""
        entries = list(self._entries)[-last:]
        return "\n".join(f"{e.at_s:12.6f}  {e.actor:18} {_brief(e.message)}" for e in entries)


def _brief(value: object) -> str:
    """A message, or a part of one, in a line that somebody can read."""
    if isinstance(value, msgspec.Struct):
        fields = msgspec.structs.asdict(value).items()
        inside = ", ".join(f"{name}={_brief(each)}" for name, each in fields)
        return f"{type(value).__name__}({inside})"
    if isinstance(value, tuple):
        shown = [_brief(each) for each in value[:MOST_SHOWN]]
        if len(value) > MOST_SHOWN:
            shown.append(f"... {len(value)} in all")
        return f"({', '.join(shown)})"
    return repr(value)
