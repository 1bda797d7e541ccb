"""The host pool: pinned memory in chunks, pinned and given back in the background.

Pinning takes 0.4 s per GiB, too long to wait for at start and far too long for the launch
thread; giving back takes long as well. Slots are handed out lowest first, so the first chunk is
pinned at once and the others, in order, by a thread, which also unpins the last ones when told to.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pie_async.config import format_size
from pie_async.core.layout import KvLayout
from pie_async.cuda.errors import CudaFault
from pie_async.cuda.pool_arena import Grown, Piece
from pie_async.device.protocol import POOL_CHUNK_BYTES, chunk_slots_of
from pie_async.errors import ConfigError, DeviceFault

if TYPE_CHECKING:
    from pie_async.cuda.driver import Driver

CHUNK_BYTES = POOL_CHUNK_BYTES


class HostArena:
    """Pinned slots. Within a chunk stack after stack, so that one of neighbours is contiguous.

    Attributes:
        chunk_slots: slots that are pinned together.
    """

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
        self.chunk_slots = chunk_slots_of(layout, slots, chunk_bytes=chunk_bytes)
        self._slots = slots
        self._wanted_chunks = -(-slots // self.chunk_slots)
        self._chunks: list[int] = []
        self._refusal: ConfigError | None = None
        self._is_closing = False
        self._grown: Grown | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._keep_size, name="pie-pin", daemon=True)
        if slots:
            self._pin_chunk()
            if self._refusal is not None:
                raise self._refusal
            self._thread.start()

    def pieces(self, slot: int, count: int) -> Iterator[Piece]:
        """See `PoolArena`; a piece ends with its chunk.

        Blocks until they are pinned; those that `watch` has told of are.

        Raises:
            ConfigError: the operating system refused to.
            DeviceFault: they were given back.
        """
        while count:
            chunk, first = divmod(slot, self.chunk_slots)
            length = min(count, self.chunk_slots - first)
            layer_bytes = self.chunk_slots * self._slot_bytes
            yield Piece(self._chunk(chunk), layer_bytes, first, length)
            slot, count = slot + length, count - length

    def watch(self, grown: Grown) -> None:
        """Call this now and whenever there is more or less, from whichever thread did it."""
        with self._changed:
            self._grown = grown
            self._tell()

    def resize(self, slots: int) -> None:
        """Begin to pin more or to give the last chunks back; no copy is to touch those again."""
        with self._changed:
            self._wanted_chunks = -(-slots // self.chunk_slots)
            self._refusal = None  # there may be room again
            self._changed.notify_all()
            if self._wanted_chunks == len(self._chunks):
                self._tell()

    @property
    def pinned_slots(self) -> int:
        """Slots that copies can use without waiting."""
        return min(self._slots, len(self._chunks) * self.chunk_slots)

    def close(self) -> None:
        """Free everything; no copy is under way."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        while self._chunks:
            self._driver.unpin(self._chunks.pop())

    def _chunk(self, number: int) -> int:
        if number >= len(self._chunks):
            with self._changed:
                self._changed.wait_for(
                    lambda: (
                        number < len(self._chunks)
                        or self._refusal is not None
                        or number >= self._wanted_chunks
                    )
                )
                if number >= len(self._chunks):
                    raise self._refusal or DeviceFault(
                        f"chunk {number} of the host pool is copied, but was given back"
                    )
        return self._chunks[number]

    def _keep_size(self) -> None:
        """Pin and unpin, one chunk at a time, until the end."""
        self._driver.enter_thread()
        while self._await_work():
            if len(self._chunks) < self._wanted_chunks:
                self._pin_chunk()
            else:
                self._unpin_chunk()

    def _await_work(self) -> bool:
        """Whether there is any, once there is; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._has_work)
        return not self._is_closing

    @property
    def _has_work(self) -> bool:
        missing = self._wanted_chunks - len(self._chunks)
        return missing < 0 or (missing > 0 and self._refusal is None)

    def _unpin_chunk(self) -> None:
        with self._changed:
            address = self._chunks.pop()
        self._driver.unpin(address)
        with self._changed:
            self._tell()

    def _pin_chunk(self) -> None:
        chunk_bytes = self._num_layers * self.chunk_slots * self._slot_bytes
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
