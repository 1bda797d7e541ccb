"""Copies between the CPU device's arena and its host pool: at a link's rate, checked on request."""

from __future__ import annotations

import ctypes
import time
import zlib
from collections.abc import Iterator, Sequence

from pie_async.core.layout import KvLayout
from pie_async.device.aliased_arena import AliasedArena
from pie_async.device.attempts import Attempts, Tamper
from pie_async.device.copy_runs import host_slots_of, singles
from pie_async.device.cpu_pool import CpuPool
from pie_async.ids import HostSlot
from pie_async.messages import CopyRun
from pie_async.runtime.faults import CopyKind


class CpuCopies:
    """Copies, on the thread of the stream that asks.

    Attributes:
        tamper: see `Device`.
    """

    def __init__(
        self,
        arena: AliasedArena,
        pool: CpuPool,
        layout: KvLayout,
        *,
        link_bytes_per_s: float | None,
        checks: bool,
    ) -> None:
        self._arena = arena
        self._pool = pool
        self._slot_bytes = layout.layer_block_bytes
        self._item_bytes = layout.item_bytes
        self._link_bytes_per_s = link_bytes_per_s
        self._checksums = _Checksums(self._slot_bytes) if checks else None
        self.tamper: Tamper | None = None

    def copy(
        self, attempts: Attempts, kind: CopyKind, layers: range, runs: Sequence[CopyRun]
    ) -> None:
        """Copy these layers of these runs, again if that goes wrong.

        Args:
            attempts: of the stream, where failed ones are noted.

        Raises:
            DeviceFault: the pool has no memory for one of the slots.
        """
        self._require(runs)
        damaged: Sequence[HostSlot] = ()
        for _ in attempts.numbers():
            damaged = self._attempt(kind, layers, runs)
            if not damaged:
                return
        attempts.give_up(damaged)
        if kind == "stage":  # it will be read: let it be finite, and nobody's
            self._clear(layers, runs, damaged)

    def _attempt(
        self, kind: CopyKind, layers: range, runs: Sequence[CopyRun]
    ) -> Sequence[HostSlot]:
        """Copy once; host slots of what is not right."""
        outcome = "arrives" if self.tamper is None else self.tamper(kind)
        if outcome == "fails":
            return host_slots_of(runs)
        self._move(kind, layers, runs)
        if outcome == "corrupted":
            self._spoil(kind, layers, runs)
        return () if self._checksums is None else self._wrong(self._checksums, kind, layers, runs)

    def write_back(self, layers: range, runs: Sequence[CopyRun]) -> None:
        """Copy from staging slots to the pool what was copied the other way.

        Raises:
            DeviceFault: as `copy`.
        """
        self._require(runs)
        self._move("demote", layers, runs)

    def _require(self, runs: Sequence[CopyRun]) -> None:
        self._pool.require(max((run.host_slot + run.count for run in runs), default=0))

    def _move(self, kind: CopyKind, layers: range, runs: Sequence[CopyRun]) -> None:
        """At the link's rate."""
        began_s, num_bytes = time.perf_counter(), 0
        for source, destination, length in self._pieces(kind, layers, runs):
            ctypes.memmove(destination, source, length)
            num_bytes += length
        if self._link_bytes_per_s is not None:
            rest_s = num_bytes / self._link_bytes_per_s - (time.perf_counter() - began_s)
            if rest_s > 0:
                time.sleep(rest_s)

    def _pieces(
        self, kind: CopyKind, layers: range, runs: Sequence[CopyRun]
    ) -> Iterator[tuple[int, int, int]]:
        """(source, destination, bytes) of every run in every layer."""
        size = self._slot_bytes
        for layer in layers:
            pool, arena = self._pool.address(layer), self._arena.layers[layer].data_ptr()
            for run in runs:
                there, here = pool + run.host_slot * size, arena + run.device_slot * size
                ends = (here, there) if kind == "demote" else (there, here)
                yield *ends, run.count * size

    def _wrong(
        self, sums: _Checksums, kind: CopyKind, layers: range, runs: Sequence[CopyRun]
    ) -> Sequence[HostSlot]:
        """Host slots whose copies have other checksums than they should."""
        wrong: set[HostSlot] = set()
        for run in (one for many in runs for one in singles(many)):
            pieces = self._pieces(kind, layers, (run,))
            for layer, (source, destination, _) in zip(layers, pieces, strict=True):
                if kind == "demote":
                    sums.remember(run.host_slot, layer, source)
                if not sums.is_right(run.host_slot, layer, destination):
                    wrong.add(run.host_slot)
        return sorted(wrong)

    def _spoil(self, kind: CopyKind, layers: range, runs: Sequence[CopyRun]) -> None:
        """Shift what was copied first by one number: all of it is wrong, and finite."""
        for _, destination, _ in self._pieces(kind, layers[:1], runs[:1]):
            ctypes.memmove(
                destination, destination + self._item_bytes, self._slot_bytes - self._item_bytes
            )

    def _clear(self, layers: range, runs: Sequence[CopyRun], damaged: Sequence[HostSlot]) -> None:
        for run in (one for many in runs for one in singles(many)):
            if run.host_slot in damaged:
                for layer in layers:
                    self._arena.layers[layer][run.device_slot].zero_()


class _Checksums:
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
