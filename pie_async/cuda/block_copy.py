"""Which bytes to copy for which blocks: as few and as long pieces as the slots allow."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pie_async.cuda.pool_arena import PoolArena
from pie_async.cuda.vmm import DeviceArena
from pie_async.messages import BlockMove, CopyRun

if TYPE_CHECKING:
    from pie_async.cuda.driver import Copies


def to_device(
    pool: PoolArena, device: DeviceArena, layers: Sequence[int], runs: Iterable[CopyRun], size: int
) -> Copies:
    """Copies of these layers of these runs; `size`: bytes of one slot of one layer.

    Pieces are looked for once, then laid out for all layers together: a sequence that comes back
    may take ten thousand copies, which the interpreter would need 20 ms for.
    """
    pieces = []
    for run in runs:
        destination = device.address(0, run.device_slot)
        for source, layer_bytes, count in pool.pieces(run.host_slot, run.count):
            pieces.append((source, layer_bytes, destination, count * size))
            destination += count * size
    found = np.array(pieces, np.int64).reshape(-1, 4).T
    sources, layer_bytes_of, destinations, sizes = found
    numbers = np.array(layers, np.int64)[:, None]
    copies = np.empty((3, len(numbers), len(sources)), np.uint64)
    copies[0] = sources + numbers * layer_bytes_of
    copies[1] = destinations + numbers * device.layer_bytes
    copies[2] = sizes
    return copies.reshape(3, -1)


def to_host(
    pool: PoolArena, device: DeviceArena, layers: Sequence[int], runs: Iterable[CopyRun], size: int
) -> Copies:
    """The same, the other way."""
    return to_device(pool, device, layers, runs, size)[[1, 0, 2]]


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
