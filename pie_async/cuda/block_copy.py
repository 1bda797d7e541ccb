"""Which bytes to copy for which blocks: as few and as long pieces as the slots allow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pie_async.cuda.pool_arena import PoolArena
from pie_async.cuda.vmm import DeviceArena
from pie_async.messages import CopyRun

if TYPE_CHECKING:
    from pie_async.cuda.driver import Copies


Pieces = npt.NDArray[np.int64]
"""[5, n]: address, bytes of a layer, first slot and number of slots of each `Piece` of the pool,
and the device's slot that the first one goes to or comes from."""


def find_pieces(pool: PoolArena, runs: Iterable[CopyRun]) -> Pieces:
    """Where in the pool these runs lie: the same for every layer."""
    pieces = []
    for run in runs:
        slot = int(run.device_slot)
        for piece in pool.pieces(run.host_slot, run.count):
            pieces.append((*piece, slot))
            slot += piece.num_slots
    return np.array(pieces, np.int64).reshape(-1, 5).T


def to_device(device: DeviceArena, layers: range, pieces: Pieces) -> Copies:
    """Copies of these layers, whole stacks.

    Laid out for all stacks together: hundreds of blocks may be hundreds of copies for each, too
    many for a loop.
    """
    addresses, layer_bytes, pool_slots, counts, device_slots = pieces
    stacks = [
        (stack.start, len(stack) * device.layout.layer_block_bytes, start)
        for stack, start in device.stacks
        if stack.start in layers
    ]
    first, size, start = np.array(stacks, np.int64).reshape(-1, 3).T[:, :, None]
    copies = np.empty((3, len(stacks), pieces.shape[1]), np.uint64)
    copies[0] = addresses + first * layer_bytes + pool_slots * size
    copies[1] = start + device_slots * size
    copies[2] = counts * size
    return copies.reshape(3, -1)


def to_host(device: DeviceArena, layers: range, pieces: Pieces) -> Copies:
    """The same, the other way."""
    return to_device(device, layers, pieces)[[1, 0, 2]]
