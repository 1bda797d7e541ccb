"""Checksums of the blocks in a host pool."""

from __future__ import annotations

import ctypes
import zlib

from pie_async.ids import HostSlot


class Checksums:
    """What one layer of each pooled block should add up to, as of when it was copied out."""

    def __init__(self, slot_bytes: int) -> None:
        self._slot_bytes = slot_bytes
        self._sums: dict[tuple[HostSlot, int], int] = {}

    def remember(self, slot: HostSlot, layer: int, address: int) -> None:
        """A block whose one layer lies there is being copied to this host slot."""
        self._sums[slot, layer] = self._sum(address)

    def is_right(self, slot: HostSlot, layer: int, address: int) -> bool:
        """Whether what lies there is what was copied out; True for a slot never written."""
        expected = self._sums.get((slot, layer))
        return expected is None or expected == self._sum(address)

    def _sum(self, address: int) -> int:
        return zlib.crc32((ctypes.c_char * self._slot_bytes).from_address(address))
