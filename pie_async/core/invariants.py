"""What must hold between any two messages. Checked at every message in debug mode and tests."""

from __future__ import annotations

from collections.abc import Iterable

from pie_async.core.residency import Block, ResidencyMap
from pie_async.core.schedule import Schedule
from pie_async.core.sequence import Sequence, State
from pie_async.core.slots import SlotPool


class InvariantBroken(AssertionError):
    """The scheduler's books contradict each other: a bug, never load."""


def check(schedule: Schedule) -> None:
    """Raise `InvariantBroken` with a sentence for the first broken invariant. O(blocks)."""
    residency = schedule.residency
    blocks = residency.blocks.values()
    _check_pool(residency, residency.device, (b.device_slot for b in blocks))
    _check_pool(residency, residency.host, (b.host_slot for b in blocks))
    _check_pool(residency, residency.staging, (b.staging_slot for b in blocks))
    for block in blocks:
        _check_block(residency, block)
    for seq in schedule.sequences.values():
        _check_sequence(schedule, seq)
    _check_owners(schedule)
    _check_queues(schedule)


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise InvariantBroken(sentence)


def _check_pool(residency: ResidencyMap, pool: SlotPool, used: Iterable[int | None]) -> None:
    """Every slot is exactly one of: free, mapped by one block, in limbo."""
    mapped = [slot for slot in used if slot is not None]
    limbo = residency.limbo_slots(pool)
    held = mapped + limbo
    _require(len(set(held)) == len(held), f"a {pool.name} slot is held twice: {sorted(held)}")
    both = [slot for slot in held if pool.is_free(slot)]
    _require(not both, f"{pool.name} slots {both} are free and in use")
    _require(
        len(held) + pool.num_free == pool.size,
        f"{pool.name} slots leak: {len(mapped)} mapped + {len(limbo)} in limbo + "
        f"{pool.num_free} free of {pool.size}",
    )


def _check_block(residency: ResidencyMap, block: Block) -> None:
    name = f"block {block.id}"
    _require(block.device_slot is not None or block.host_slot is not None, f"{name} lies nowhere")
    if block.move is not None:
        _require(
            block.device_slot is not None and block.host_slot is not None,
            f"{name} is being copied without both slots",
        )
    _require(
        (block.id in residency.clean_resident) == (block.is_resident and block.is_clean),
        f"{name}: spare-copy list disagrees with its slots",
    )
    _require(
        (block.id in residency.streamed) == block.is_streamed,
        f"{name}: streamed list disagrees with its staging slot",
    )
    _require(bool(block.owners) or block.move is not None, f"{name} has no owner")


def _check_sequence(schedule: Schedule, seq: Sequence) -> None:
    name = f"sequence {seq.id}"
    size = schedule.block_tokens
    _require(seq.num_settled <= seq.num_launched, f"{name} settled more than it launched")
    _require(len(seq.table) * size >= seq.num_launched, f"{name} launched past its table")
    if seq.state is State.WAITING:
        _require(not seq.table, f"{name} waits but holds blocks")
    if seq.state is State.RUNNING:
        pooled = [block.id for block in seq.table if block.read_slot is None]
        _require(not pooled, f"{name} runs but blocks {pooled} cannot be read")
        _require(seq.lane is not None, f"{name} runs without a lane")
        unsealed = [b for b in seq.table[seq.num_sealed :] if not b.is_resident]
        _require(not unsealed, f"{name} writes to blocks that are not resident: {unsealed}")
        open_copies = [b.id for b in seq.table if not b.is_sealed and b.host_slot is not None]
        _require(not open_copies, f"{name} writes to blocks with pooled copies: {open_copies}")


def _check_owners(schedule: Schedule) -> None:
    listed = sum(len(block.owners) for block in schedule.residency.blocks.values())
    held = 0
    for seq in schedule.sequences.values():
        for index, block in enumerate(seq.table):
            held += 1
            _require(
                (seq, index) in block.owners,
                f"sequence {seq.id} holds block {block.id} at {index} without owning it",
            )
    _require(listed == held, f"blocks list {listed} owners, tables hold {held} blocks")


def _check_queues(schedule: Schedule) -> None:
    places = {
        State.RUNNING: schedule.running,
        State.RESUMING: schedule.resuming,
        State.PARKED: schedule.parked,
    }
    for state, queue in places.items():
        for seq in queue:
            _require(seq.state is state, f"sequence {seq.id} is {seq.state} in the {state} queue")
    waiting = [s for s in schedule.sequences.values() if s.state is State.WAITING]
    queued = sum(map(len, places.values())) + len(waiting)
    _require(queued == len(schedule.sequences), f"{queued} queued of {len(schedule.sequences)}")
    _require(
        len(waiting) == schedule.num_waiting,
        f"{len(waiting)} sequences wait, {schedule.num_waiting} counted",
    )
    lanes = schedule.lanes.num_used
    _require(lanes == len(schedule.running), f"{lanes} lanes for {len(schedule.running)} running")
