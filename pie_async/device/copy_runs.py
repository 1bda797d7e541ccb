"""Which copies bring which blocks: moves as runs, as few and as long as the slots allow."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from pie_async.ids import DeviceSlot, HostSlot
from pie_async.messages import BlockMove, CopyRun


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


def host_slots_of(runs: Sequence[CopyRun]) -> list[HostSlot]:
    """Their host slots, in order."""
    return [HostSlot(run.host_slot + each) for run in runs for each in range(run.count)]


def singles(run: CopyRun) -> Iterator[CopyRun]:
    """The same run block by block."""
    for each in range(run.count):
        host_slot, device_slot = run.host_slot + each, run.device_slot + each
        yield CopyRun(HostSlot(host_slot), DeviceSlot(device_slot), 1)
