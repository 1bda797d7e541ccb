"""The host pool: pinned memory in chunks, pinned in the background.

Pinning takes 0.4 s per GiB, too long to wait for at start and far too long for the launch
thread. Slots are handed out lowest first, so the first chunk is pinned at once and the others,
in order, by a thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pie_async.config import MIB, format_size
from pie_async.core.layout import KvLayout
from pie_async.cuda.errors import CudaFault
from pie_async.cuda.pool_arena import Grown
from pie_async.errors import ConfigError

if TYPE_CHECKING:
    from pie_async.cuda.driver import Driver

CHUNK_BYTES = 256 * MIB
"""Pinned in a tenth of a second; one layer of it is still one long copy."""


class HostArena:
    """Pinned slots. Within a chunk layer-major, so that one layer of neighbours is contiguous."""

    def __init__(
        self, driver: Driver, layout: KvLayout, *, slots: int, chunk_bytes: int = CHUNK_BYTES
    ) -> None:
        """Pin the first chunk, begin to pin the rest.

        Raises:
            ConfigError: the operating system refuses the first chunk.
        """
        self._driver = driver
        self._num_layers = layout.num_layers
        self._slot_bytes = layout.layer_block_bytes
        self._chunk_slots = max(1, min(slots, chunk_bytes // layout.block_bytes))
        self._slots = slots
        self._chunks: list[int] = []
        self._refusal: ConfigError | None = None
        self._is_closing = False
        self._grown: Grown | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._pin_rest, name="pie-pin", daemon=True)
        if slots:
            self._pin_chunk()
            if self._refusal is not None:
                raise self._refusal
            self._thread.start()

    def pieces(self, layer: int, slot: int, count: int) -> Iterator[tuple[int, int]]:
        """(address, slots) of contiguous pieces that together are one layer of these slots.

        Blocks until they are pinned; those that `watch` has told of are.

        Raises:
            ConfigError: the operating system refused to.
        """
        while count:
            chunk, first = divmod(slot, self._chunk_slots)
            length = min(count, self._chunk_slots - first)
            offset = (layer * self._chunk_slots + first) * self._slot_bytes
            yield self._chunk(chunk) + offset, length
            slot, count = slot + length, count - length

    def watch(self, grown: Grown) -> None:
        """Call this now and whenever more is pinned, from whichever thread did it."""
        with self._changed:
            self._grown = grown
            self._tell()

    @property
    def pinned_slots(self) -> int:
        """Slots that copies can use without waiting."""
        return min(self._slots, len(self._chunks) * self._chunk_slots)

    def close(self) -> None:
        """Free everything; no copy is under way."""
        self._is_closing = True
        if self._thread.is_alive():
            self._thread.join()
        while self._chunks:
            self._driver.unpin(self._chunks.pop())

    def _chunk(self, number: int) -> int:
        if number >= len(self._chunks):
            with self._changed:
                self._changed.wait_for(
                    lambda: number < len(self._chunks) or self._refusal is not None
                )
            if number >= len(self._chunks):
                assert self._refusal is not None
                raise self._refusal
        return self._chunks[number]

    def _pin_rest(self) -> None:
        self._driver.enter_thread()
        while len(self._chunks) * self._chunk_slots < self._slots and not self._is_closing:
            self._pin_chunk()
            if self._refusal is not None:
                return

    def _pin_chunk(self) -> None:
        chunk_bytes = self._num_layers * self._chunk_slots * self._slot_bytes
        try:
            address = self._driver.pin(chunk_bytes)
        except CudaFault as fault:
            pinned = format_size(len(self._chunks) * chunk_bytes)
            refusal = ConfigError(
                f"the operating system refuses to pin more host memory after {pinned} of the "
                f"pool ({fault.name}); lower host_pool_bytes to that, or raise `ulimit -l` and "
                "the container's memory limit",
                option="host_pool_bytes",
            )
            refusal.__cause__ = fault
            with self._changed:
                self._refusal = refusal
                self._changed.notify_all()
                self._tell()
            return
        with self._changed:
            self._chunks.append(address)
            self._changed.notify_all()
            self._tell()

    def _tell(self) -> None:
        if self._grown is not None:
            refusal = None if self._refusal is None else str(self._refusal)
            self._grown(self.pinned_slots, refusal)
