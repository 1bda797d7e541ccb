"""Which bytes to copy for which blocks: as few and as long pieces as the slots allow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from pie_async.cuda.pool_arena import PoolArena
from pie_async.cuda.vmm import DeviceArena
from pie_async.messages import BlockMove, CopyRun

if TYPE_CHECKING:
    from pie_async.cuda.driver import Copy


def to_device(
    pool: PoolArena, device: DeviceArena, layers: Iterable[int], runs: Sequence[CopyRun], size: int
) -> list[Copy]:
    """Copies of these layers of these runs; `size`: bytes of one slot of one layer."""
    return list(_copies(pool, device, layers, runs, size))


def to_host(
    pool: PoolArena, device: DeviceArena, layers: Iterable[int], runs: Sequence[CopyRun], size: int
) -> list[Copy]:
    """The same, the other way."""
    return [
        (there, here, length) for here, there, length in to_device(pool, device, layers, runs, size)
    ]


def runs_of(moves: Iterable[BlockMove]) -> list[CopyRun]:
    """Moves whose slots are neighbours on both sides, together."""
    runs: list[CopyRun] = []
    for move in sorted(moves, key=lambda move: move.host_slot):
        if runs and _continues(runs[-1], move):
            last = runs.pop()
            runs.append(CopyRun(last.host_slot, last.device_slot, last.count + 1))
        else:
            runs.append(CopyRun(move.host_slot, move.device_slot, 1))
    return runs


def _continues(run: CopyRun, move: BlockMove) -> bool:
    return (run.host_slot + run.count, run.device_slot + run.count) == (
        move.host_slot,
        move.device_slot,
    )


def _copies(
    pool: PoolArena, device: DeviceArena, layers: Iterable[int], runs: Sequence[CopyRun], size: int
) -> Iterator[Copy]:
    for layer in layers:
        for run in runs:
            destination = device.address(layer, run.device_slot)
            for source, count in pool.pieces(layer, run.host_slot, run.count):
                yield source, destination, count * size
                destination += count * size
