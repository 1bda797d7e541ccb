"""Copies for staging: fewer of them, at the price of copying what nobody reads."""

from __future__ import annotations

from collections.abc import Sequence

from pie_async.messages import CopyRun


def bridged(runs: Sequence[CopyRun], most_slots: int) -> list[CopyRun]:
    """These runs, joined across gaps of up to `most_slots` slots.

    Blocks that ended leave holes among the streamed ones. Copying a hole along puts whatever lies
    there, old or half written, into staging slots that no block table holds: no run of this
    iteration ends there, and every iteration stages anew what it reads.

    Args:
        runs: of one iteration, all of those that write the staging ring.
        most_slots: what takes the link as long as one more copy.
    """
    joined: list[CopyRun] = []
    for run in sorted(runs, key=lambda run: run.device_slot):
        if joined:
            last = joined[-1]
            distance = run.device_slot - last.device_slot
            if distance - last.count <= most_slots and distance == run.host_slot - last.host_slot:
                joined[-1] = CopyRun(last.host_slot, last.device_slot, distance + run.count)
                continue
        joined.append(run)
    return joined
