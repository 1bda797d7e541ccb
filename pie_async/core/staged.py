"""What an iteration has to bring through the staging ring, kept up to date block by block.

An iteration may stage a thousand blocks of which the one before staged all but ten. So they are
not looked for again: they stand in arrays by staging slot, whose neighbours are found at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pie_async.ids import BlockId, DeviceSlot, HostSlot
from pie_async.messages import CopyRun

_NOTHING = -1


class Staged(NamedTuple):
    """The blocks that one iteration stages; what the ring does later leaves it as it is."""

    first_slot: int
    """Of the ring."""
    host_slots: npt.NDArray[np.int64]
    """By staging slot; -1 where there is nothing to stage."""
    block_ids: npt.NDArray[np.int64]

    def runs(self) -> list[CopyRun]:
        """The copies that bring them, neighbours on both sides merged, by staging slot."""
        staging = np.flatnonzero(self.host_slots != _NOTHING)
        if not staging.size:
            return []
        host = self.host_slots[staging]
        # Slots of a run differ from their staging slots by the same number, without a gap.
        is_new = (np.diff(staging) != 1) | (np.diff(host) != 1)
        begins = np.concatenate(([0], np.flatnonzero(is_new) + 1))
        counts = np.diff(begins, append=staging.size)
        columns = (host[begins], staging[begins] + self.first_slot, counts)
        return [
            CopyRun(HostSlot(host_slot), DeviceSlot(device_slot), count)
            for host_slot, device_slot, count in zip(
                *(column.tolist() for column in columns), strict=True
            )
        ]

    def blocks_from(self, host_slots: Iterable[HostSlot]) -> list[BlockId]:
        """Those that came from these slots of the pool, by staging slot."""
        wanted = np.fromiter(host_slots, np.int64)
        return [BlockId(each) for each in self.block_ids[np.isin(self.host_slots, wanted)].tolist()]


class StagedBlocks:
    """What an iteration issued now has to stage.

    Args:
        size: slots of the staging ring.
        first: the number of the first of them.
    """

    def __init__(self, size: int, *, first: int) -> None:
        self._first = first
        self._host_slots = np.full(size, _NOTHING, np.int64)
        self._block_ids = np.zeros(size, np.int64)

    def add(self, block: BlockId, host_slot: HostSlot, staging_slot: DeviceSlot) -> None:
        """From now on it is read where it is staged."""
        self._host_slots[staging_slot - self._first] = host_slot
        self._block_ids[staging_slot - self._first] = block

    def remove(self, staging_slot: DeviceSlot) -> None:
        """Nothing has to be there any more, if ever it had."""
        self._host_slots[staging_slot - self._first] = _NOTHING

    def source(self, staging_slot: DeviceSlot) -> HostSlot | None:
        """From where a staging slot is filled; None: it is not."""
        host_slot = int(self._host_slots[staging_slot - self._first])
        return None if host_slot == _NOTHING else HostSlot(host_slot)

    def now(self) -> Staged:
        """As of now."""
        return Staged(self._first, self._host_slots.copy(), self._block_ids.copy())
