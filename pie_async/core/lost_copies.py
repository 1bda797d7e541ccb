"""What actors make of copies that went wrong for good."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from pie_async.errors import DeviceFault
from pie_async.ids import BlockId, HostSlot
from pie_async.messages import BlockMove

MOST_FAILURES_IN_A_ROW = 16
"""Then the link is broken, and not a copy."""


def split(
    moves: Sequence[BlockMove], damaged: Collection[HostSlot]
) -> tuple[tuple[BlockId, ...], tuple[BlockId, ...]]:
    """The blocks that were copied, and those that were not.

    Args:
        damaged: host slots from or to which nothing was copied right.
    """
    copied = tuple([move.block for move in moves if move.host_slot not in damaged])
    return copied, tuple([move.block for move in moves if move.host_slot in damaged])


class Patience:
    """Counts commands of one direction that failed with none in between that went well."""

    def __init__(self, direction: str) -> None:
        self._direction = direction
        self._in_a_row = 0

    def take(self, damaged: Collection[HostSlot]) -> None:
        """What a command's copies came to.

        Raises:
            DeviceFault: too many failed in a row.
        """
        self._in_a_row = self._in_a_row + 1 if damaged else 0
        if self._in_a_row >= MOST_FAILURES_IN_A_ROW:
            raise DeviceFault(
                f"{self._in_a_row} copies {self._direction} in a row failed, each several times; "
                "the link is taken for broken"
            )
