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
    _check_cache(residency)
    for seq in schedule.sequences.values():
        _check_sequence(schedule, seq)
    _check_damaged(schedule)
    _check_masks(schedule)
    _check_owners(schedule)
    _check_queues(schedule)


def _require(holds: bool, sentence: str) -> None:
    if not holds:
        raise InvariantBroken(sentence)


def _check_pool(residency: ResidencyMap, pool: SlotPool, used: Iterable[int | None]) -> None:
    """Every slot is exactly one of: free, mapped by one block, in limbo.

    The block is owned or cached or, ownerless, still being copied: one of these (`_check_block`).
    """
    mapped = [slot for slot in used if slot is not None]
    limbo = residency.limbo_slots(pool)
    held = mapped + limbo
    _require(len(set(held)) == len(held), f"a {pool.name} slot is held twice: {sorted(held)}")
    both = [slot for slot in held if pool.is_free(slot)]
    _require(not both, f"{pool.name} slots {both} are free and in use")
    retiring = [slot for slot in held if slot >= pool.first + pool.size]
    _require(
        len(retiring) == pool.num_retiring,
        f"{len(retiring)} {pool.name} slots retire, {pool.num_retiring} counted",
    )
    _require(
        len(held) - len(retiring) + pool.num_free == pool.size,
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
    if block.staging_slot is not None:
        _require(
            residency.staged.source(block.staging_slot)
            == (None if block.is_resident else block.host_slot),
            f"{name} is staged while it is resident, or not from where it lies",
        )
    is_cached = block in residency.cache
    _require(bool(block.owners) or block.move is not None or is_cached, f"{name} has no owner")
    _require(not (block.owners and is_cached), f"{name} is cached but has owners")


def _check_cache(residency: ResidencyMap) -> None:
    """Cached are resident sealed blocks that are found by their digests and nobody needs."""
    before = None
    for block, read_until in residency.cache.cached():
        name = f"cached block {block.id}"
        _require(residency.blocks.get(block.id) is block, f"{name} is not in the books")
        _require(block.is_sealed and block.is_resident, f"{name} is not sealed and resident")
        is_alone = block.move is None and block.host_slot is None and not block.is_streamed
        _require(is_alone, f"{name} is copied, pooled or streamed")
        is_found = block.digest is not None and residency.cache.find(block.digest) is block
        _require(is_found, f"{name} is not found by its digest")
        _require(
            residency.is_read(read_until) == (read_until is not None),
            f"{name} waits for iteration {read_until}, which is over",
        )
        _require(
            before is None or (read_until is not None and read_until >= before),
            f"{name} cools behind a later one",
        )
        before = read_until
    for digest, block in residency.cache.index.items():
        _require(
            residency.blocks.get(block.id) is block and block.is_sealed and block.digest == digest,
            f"the prefix index names block {block.id} by another digest or after its end",
        )


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
    if schedule.sharing.is_on:
        _check_digests(schedule, seq)


def _check_digests(schedule: Schedule, seq: Sequence) -> None:
    """Its sealed blocks hold its tenant's KV of its own tokens, whoever computed them."""
    digest = seq.prefix_root
    for index, block in enumerate(seq.table[: seq.num_sealed]):
        digest = schedule.sharing.hasher.digest(digest, seq.tokens, index)
        _require(
            block.digest == digest,
            f"sequence {seq.id} has other tokens than block {block.id} at {index} of its table",
        )


def _check_damaged(schedule: Schedule) -> None:
    """They are set aside and wait for nothing but the end of their worthless iterations."""
    for sequence_id in schedule.damaged:
        seq = schedule.sequences.get(sequence_id)
        _require(seq is not None, f"damaged sequence {sequence_id} has ended")
        is_parked = seq is not None and seq.state is State.PARKED
        _require(is_parked, f"damaged sequence {sequence_id} is not parked")
        waits = seq is not None and seq.launches_in_flight > 0
        _require(waits, f"damaged sequence {sequence_id} waits for no iteration")


def _check_masks(schedule: Schedule) -> None:
    """Every mask slot is free, ordered, ready or read; only those that run have one ready."""
    guidance = schedule.guidance
    read = [row.mask for each in schedule.in_flight for row in each.rows if row.mask is not None]
    ordered = [slot for name, slot in guidance.ordered.items() if name not in guidance.late]
    held = [*ordered, *guidance.ready.values(), *read]
    newest = schedule.in_flight[-1].rows if schedule.in_flight else ()
    late = {row.sequence: row.mask for row in newest if row.sequence in guidance.late}
    _require(late == guidance.late, "a late mask belongs to no row of the newest iteration")
    _require(len(set(held)) == len(held), f"a mask slot is held twice: {sorted(held)}")
    used = guidance.slots.num_used
    _require(used == len(held), f"{used} mask slots are taken, {len(held)} are held")
    for sequence_id in guidance.ready:
        seq = schedule.sequences.get(sequence_id)
        runs = seq is not None and seq.state is State.RUNNING
        _require(runs, f"sequence {sequence_id} has a mask but does not run")
        waits = seq is not None and seq.samples_in_flight == 0
        _require(waits, f"sequence {sequence_id} has a mask for a token that it does not know")


def _check_owners(schedule: Schedule) -> None:
    listed = sum(len(block.owners) for block in schedule.residency.blocks.values())
    held = 0
    for seq in schedule.sequences.values():
        for index, block in enumerate(seq.table):
            held += 1
            _require(
                seq in block.owners and block.index == index,
                f"sequence {seq.id} holds block {block.id} at {index} without owning it",
            )
    _require(listed == held, f"blocks list {listed} owners, tables hold {held} blocks")


def _check_queues(schedule: Schedule) -> None:
    places = {
        State.RUNNING: schedule.running,
        State.RESUMING: schedule.resuming,
        State.PARKED: schedule.parked,
        State.PAUSED: schedule.paused,
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
