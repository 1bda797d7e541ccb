"""The pool in the memory of a neighbour: another GPU, which the one that computes reaches directly.

Its memory is there at once and does not move, so it is one piece, stack after stack: neighbouring
slots of a stack are one copy, however many they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pie_async.config import format_size
from pie_async.core.layout import KvLayout
from pie_async.cuda.errors import CudaFault
from pie_async.cuda.pool_arena import Grown, Piece
from pie_async.errors import ConfigError

if TYPE_CHECKING:
    from pie_async.cuda.driver import Driver

_log = logging.getLogger(__name__)


class PeerArena:
    """Slots in the neighbour that the driver has opened."""

    chunk_slots = 0
    """Its memory stays."""

    def __init__(self, driver: Driver, layout: KvLayout, *, slots: int) -> None:
        """Allocate all of them.

        Raises:
            ConfigError: the neighbour has too little memory.
        """
        self._driver = driver
        self._slots = slots
        self._slot_bytes = layout.layer_block_bytes
        self._address = 0
        if not slots:
            return
        pool_bytes = slots * layout.block_bytes
        try:
            self._address = driver.allocate_in_neighbour(pool_bytes)
        except CudaFault as fault:
            if not fault.is_out_of_memory:
                raise
            raise _too_large(pool_bytes, driver.neighbour_free_bytes()) from fault

    def pieces(self, slot: int, count: int) -> Iterator[Piece]:
        """See `PoolArena`; it is always one."""
        if count:
            yield Piece(self._address, self._slots * self._slot_bytes, slot, count)

    def watch(self, grown: Grown) -> None:
        """Call this now; there will never be more."""
        grown(self._slots, None)

    def resize(self, slots: int) -> None:
        """Nobody asks for it."""
        raise NotImplementedError("a pool in another GPU's memory keeps its size")

    @property
    def pinned_slots(self) -> int:
        """All of them."""
        return self._slots

    def close(self) -> None:
        """Free everything; no copy is under way."""
        if self._address:
            self._driver.free_in_neighbour(self._address)
            self._address = 0


def open_peer(driver: Driver, peer: int, pool_bytes: int) -> None:
    """Open GPU `peer` for the pool. Before the arena is made, whose memory it is to reach, and
    before anything is loaded.

    Args:
        pool_bytes: that it has to have room for; 0: no pool, so it is not opened.

    Raises:
        ConfigError: there is no such GPU, it is the one that computes, the two cannot reach each
            other, or it has too little free memory; says what is possible.
    """
    count, own = driver.gpu_count, driver.device.index
    if peer >= count:
        seen = "1 GPU" if count == 1 else f"{count} GPUs"
        raise _unusable(
            driver, peer, f"there is no GPU {peer}: this process sees {seen}, counted from 0"
        )
    if peer == own:
        raise _unusable(driver, peer, f"GPU {peer} is the one that computes")
    link = driver.link_to(peer)
    if link == "none":
        raise _unusable(driver, peer, f"GPU {own} and GPU {peer} cannot reach each other's memory")
    if not pool_bytes:
        return
    try:
        driver.open_neighbour(peer)
    except CudaFault as fault:
        reason = f"GPU {peer} cannot be opened beside GPU {own} ({fault.name})"
        raise _unusable(driver, peer, reason) from fault
    free_bytes = driver.neighbour_free_bytes()
    if pool_bytes > free_bytes:
        raise _too_large(pool_bytes, free_bytes)
    _log.info("the pool lies in the memory of GPU %d, reached over %s", peer, link)
    if link == "pcie":
        _log.warning(
            "pool peer:%d is reached over PCIe, not NVLink: it is no faster than pool host", peer
        )


def _unusable(driver: Driver, peer: int, reason: str) -> ConfigError:
    others = set(range(driver.gpu_count)) - {driver.device.index, peer}
    possible = [
        "host",
        *(f"peer:{number}" for number in sorted(others) if driver.link_to(number) != "none"),
    ]
    return ConfigError(
        f"pool peer:{peer} cannot be used: {reason}; possible here: {', '.join(possible)}",
        option="pool",
    )


def _too_large(pool_bytes: int, free_bytes: int) -> ConfigError:
    return ConfigError(
        f"host_pool_bytes is {format_size(pool_bytes)}, but {format_size(free_bytes)} are free on "
        "the GPU that holds the pool; lower it, or use pool host",
        option="host_pool_bytes",
    )
