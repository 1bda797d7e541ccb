"""Which bytes to copy for which blocks: as few and as long pieces as the slots allow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from pie_async.cuda.pool_arena import PoolArena
from pie_async.cuda.vmm import DeviceArena
from pie_async.messages import CopyRun

if TYPE_CHECKING:
    from pie_async.cuda.driver import Copies


def to_device(
    pool: PoolArena, device: DeviceArena, layers: range, runs: Iterable[CopyRun]
) -> Copies:
    """Copies of these layers, whole stacks, of these runs.

    Pieces are looked for once and laid out for all stacks together: hundreds of blocks may be
    hundreds of copies for each, too many for a loop.
    """
    pieces = []
    for run in runs:
        slot = int(run.device_slot)
        for piece in pool.pieces(run.host_slot, run.count):
            pieces.append((*piece, slot))
            slot += piece.num_slots
    found = np.array(pieces, np.int64).reshape(-1, 5).T
    addresses, layer_bytes, pool_slots, counts, device_slots = found
    stacks = [
        (stack.start, len(stack) * device.layout.layer_block_bytes, start)
        for stack, start in device.stacks
        if stack.start in layers
    ]
    first, size, start = np.array(stacks, np.int64).reshape(-1, 3).T[:, :, None]
    copies = np.empty((3, len(stacks), len(pieces)), np.uint64)
    copies[0] = addresses + first * layer_bytes + pool_slots * size
    copies[1] = start + device_slots * size
    copies[2] = counts * size
    return copies.reshape(3, -1)


def to_host(pool: PoolArena, device: DeviceArena, layers: range, runs: Iterable[CopyRun]) -> Copies:
    """The same, the other way."""
    return to_device(pool, device, layers, runs)[[1, 0, 2]]
