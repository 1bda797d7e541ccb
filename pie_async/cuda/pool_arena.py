"""What the device asks of the memory that holds the pool, wherever that is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

Grown = Callable[[int, str | None], None]
"""Told how many slots there are now, and why there will be no more, if memory is refused."""


class Piece(NamedTuple):
    """Slots that are neighbours in every stack of layers (`KvLayout.stacks`)."""

    address: int
    """Of the memory that holds them: stack after stack, each with the same slots."""
    layer_bytes: int
    """One layer of all slots in it."""
    slot: int
    """The first of them, counted from that memory's own first."""
    num_slots: int


class PoolArena(Protocol):
    """Slots of KV that copies reach directly, one stack of neighbours contiguous."""

    def pieces(self, slot: int, count: int) -> Iterator[Piece]:
        """The pieces that together are these slots."""

    @property
    def chunk_slots(self) -> int:
        """By which `resize` takes and gives back memory; 0: it does not."""

    def watch(self, grown: Grown) -> None:
        """Call this now and whenever there are more slots or fewer, from any thread."""

    def resize(self, slots: int) -> None:
        """Begin to make it so large; `watch` tells when it is done."""

    @property
    def pinned_slots(self) -> int:
        """Slots that copies can use without waiting, the lowest ones."""

    def close(self) -> None:
        """Free everything; no copy is under way."""
