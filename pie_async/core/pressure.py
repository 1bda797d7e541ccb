"""Making room: which blocks leave the device, which come back, who is parked and resumed.

Every block of a running sequence is read once per iteration, so any sealed one is as cheap
to stream as any other. Blocks of paused and parked sequences leave first (no iteration reads
them); then blocks that already have a clean copy; then the newest sequences' oldest blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

from pie_async.core.queues import is_read_by_running, is_readable
from pie_async.core.residency import Block
from pie_async.core.schedule import Schedule
from pie_async.core.sequence import Sequence
from pie_async.messages import BlockMove

MOST_PROMOTIONS_PER_ITERATION = 32
LOOKAHEAD_ITERATIONS = 4
"""How early room is made for a sequence's next block: a copy to the pool takes a while."""
PATIENCE_PLANS = 4
"""Plans in a row with a starved sequence before another one is parked: blocks written by the
iterations in flight may be demoted once those settle."""


def room(schedule: Schedule) -> int:
    """Blocks that may still be taken into use: free ones, and those that demotion may free."""
    residency = schedule.residency
    leaving = min(_paused_resident(schedule), residency.available_host)
    streamable = min(
        schedule.streamed_limit - residency.num_streamed,
        residency.staging.num_free,
        residency.available_host - leaving,
    )
    return residency.free_device + residency.coming_device + leaving + max(0, streamable)


def blocks_to_admit(schedule: Schedule, seq: Sequence, *, promised: int = 0) -> int | None:
    """Blocks that a waiting sequence's tokens need, at most; None if there is no room for them
    beside what runs and its growth.

    Args:
        promised: blocks that others are still to get.
    """
    spare = room(schedule) - schedule.growth_reserve - promised
    blocks = schedule.blocks_for(len(seq.tokens))
    if blocks > spare > 0:
        blocks -= schedule.sharing.num_shared_blocks(seq)
    return blocks if blocks <= spare else None


def wanted_streamed(schedule: Schedule) -> int:
    """Blocks that would be streamed if everything submitted ran at once."""
    held = sum(len(seq.table) for seq in schedule.parked) + schedule.waiting_blocks
    in_use = schedule.residency.used_device + schedule.residency.num_streamed
    in_use -= _paused_resident(schedule)
    growth = len(schedule.running)
    return max(0, in_use + held + growth - schedule.residency.device.size)


def preempt(schedule: Schedule) -> None:
    """Before an iteration is put together: stop what cannot go on.

    A sequence is parked when more is streamed than may be, or when others found no device slot and
    fewer are about to be freed. With the pool full as well, the parked sequence that
    would come back last gives its KV up; before it, and for whoever waits for room, those that
    nobody reads.
    """
    residency = schedule.residency
    if schedule.paused and _is_short(schedule):
        _drop_paused(schedule)
    # First, for every iteration stalls meanwhile; and what is parked gives device slots up too.
    if _is_over_limit(schedule) and _shrink(schedule):
        return
    if schedule.starved_plans > PATIENCE_PLANS or (schedule.num_starved and not schedule.in_flight):
        if residency.free_device + residency.coming_device >= schedule.num_starved:
            return
        leaving = any(map(_holds_device, (*schedule.paused, *schedule.parked)))
        if not leaving and len(schedule.running) > 1:
            schedule.park(schedule.running[-1])
        elif residency.available_host == 0 and not _drop_paused(schedule):
            _drop_last_parked(schedule)


def relieve(schedule: Schedule, next_chunk_blocks: int) -> tuple[list[BlockMove], list[BlockMove]]:
    """Decide the moves that the coming iterations need: (swap-outs, swap-ins)."""
    residency = schedule.residency
    growth = _growth_blocks(schedule)
    wanted = growth + next_chunk_blocks
    wanted += _resume_blocks(schedule) if schedule.parked else _admission_blocks(schedule)
    shortage = wanted - residency.free_device - residency.coming_device
    shortage = max(shortage, schedule.least_streamed - residency.num_streamed)
    swap_out: list[BlockMove] = []
    if shortage > 0:
        # What runs goes on beyond a limit that was lowered; what waits does not start there.
        urgent = growth - residency.free_device - residency.coming_device
        swap_out = _demote(schedule, min(shortage, urgent), most_streamed(schedule))
        swap_out += _demote(schedule, shortage - max(0, urgent), schedule.streamed_limit)
    if shortage > 0 and residency.host.num_free < shortage:
        residency.reclaim_host(shortage)
    swap_in = _resume(schedule) if schedule.parked else []
    if not schedule.parked and schedule.num_waiting == 0:
        swap_in += _promote_streamed(schedule, residency.free_device - wanted - growth)
    return swap_out, swap_in


def _growth_blocks(schedule: Schedule) -> int:
    """Device slots that running sequences will start to write in the next iterations."""
    size = schedule.block_tokens
    return sum(
        seq.num_launched + LOOKAHEAD_ITERATIONS > len(seq.table) * size for seq in schedule.running
    )


def _admission_blocks(schedule: Schedule) -> int:
    """Device slots that the next waiting sequence's first chunk wants, if it may start."""
    seq = schedule.next_waiting()
    if seq is None or not schedule.free_lanes:
        return 0
    blocks: int | None = schedule.blocks_for(len(seq.tokens))
    if schedule.running:
        blocks = (
            None
            if schedule.sharing.awaits_prefix(seq, schedule.running)
            else blocks_to_admit(schedule, seq)
        )
    return min(blocks or 0, schedule.token_budget // schedule.block_tokens + 1)


def _resume_blocks(schedule: Schedule) -> int:
    """Device slots that the first parked sequence wants before it can come back, if the
    parked sequences behind it can give them up."""
    if not schedule.free_lanes:
        return 0
    residency = schedule.residency
    pooled = sum(block.read_slot is None for block in schedule.parked[0].table)
    stageable = max(0, _streamed_room(schedule, schedule.streamed_limit, joining=1))
    wanted = max(0, pooled - stageable) + len(schedule.running) + 1
    behind = sum(len(seq.table) - seq.demote_from for seq in schedule.parked[1:])
    behind += _paused_resident(schedule)
    is_alone = not schedule.running and not schedule.resuming
    supply = residency.free_device + residency.coming_device + behind
    return wanted if is_alone or wanted <= supply else 0


# --- leaving the device -------------------------------------------------------------------


def _demote(schedule: Schedule, wanted: int, limit: int) -> list[BlockMove]:
    """Free up to `wanted` device slots; at once for clean blocks, else when copied.

    Args:
        limit: blocks that may be streamed then.
    """
    residency = schedule.residency
    moves: list[BlockMove] = []
    for block in _leavers(schedule):
        if wanted <= 0:
            break
        is_streamed = is_read_by_running(block)
        if is_streamed and not block.is_streamed and _streamed_room(schedule, limit) <= 0:
            break
        if not residency.can_demote(block, is_streamed=is_streamed):
            continue
        move = residency.demote(block, is_streamed=is_streamed)
        if move is not None:
            moves.append(move)
        wanted -= 1
    return moves


def most_streamed(schedule: Schedule) -> int:
    """Blocks up to which sequences that run already may stream more."""
    return int(schedule.streamed_limit * schedule.shrink_tolerance)


def _streamed_room(schedule: Schedule, limit: int, *, joining: int = 0) -> int:
    """How many more blocks may be streamed, once `joining` parked sequences have come back.

    A sequence alone may use everything: what the memories together can hold is never refused,
    it runs at the link's speed.
    """
    residency = schedule.residency
    if len(schedule.running) + len(schedule.resuming) + joining <= 1:
        return residency.staging.num_free
    return limit - residency.num_streamed


def _leavers(schedule: Schedule) -> Iterator[Block]:
    """Resident blocks in the order in which they should leave."""
    for seq in (*schedule.paused, *reversed(schedule.parked)):
        if seq.launches_in_flight == 0:
            for block in _resident_blocks(seq, len(seq.table)):
                if not is_read_by_running(block):
                    yield block
    clean = [b for b in schedule.residency.clean_resident.values() if is_read_by_running(b)]
    yield from (b for b in clean if b.is_sealed)
    for seq in reversed(schedule.running):
        yield from _resident_blocks(seq, seq.num_sealed)


def _resident_blocks(seq: Sequence, end: int) -> Iterator[Block]:
    """Its blocks before index `end` that could leave, oldest first."""
    for index in range(seq.demote_from, end):
        block = seq.table[index]
        if block.is_resident and block.move is None:
            yield block
        elif not block.is_resident and index == seq.demote_from:
            seq.demote_from += 1


def _holds_device(seq: Sequence) -> bool:
    """Whether a parked sequence has blocks that could leave: what others read, stays."""
    return any(
        block.device_slot is not None and not is_read_by_running(block)
        for block in seq.table[seq.demote_from :]
    )


def _paused_resident(schedule: Schedule) -> int:
    """Device slots that only paused sequences hold, and could give up."""
    return sum(
        block.is_resident and block.move is None and not is_read_by_running(block)
        for seq in schedule.paused
        if seq.launches_in_flight == 0
        for block in seq.table[seq.demote_from :]
    )


def _is_short(schedule: Schedule) -> bool:
    """Whether somebody wants room, and the pool has none for what could leave the device."""
    residency = schedule.residency
    if residency.available_host > 0:
        return False
    wanted = 0
    if schedule.num_starved:
        wanted = 1
    elif schedule.free_lanes and schedule.parked:
        wanted = len(schedule.parked[0].table) + 1
    elif schedule.free_lanes and (seq := schedule.next_waiting()) is not None:
        wanted = schedule.blocks_for(len(seq.tokens)) + schedule.growth_reserve
    return residency.free_device + residency.coming_device < wanted


def _drop_paused(schedule: Schedule) -> bool:
    """Give up the KV of the sequence that has been paused longest; False if none has any."""
    for seq in schedule.paused:
        if seq.table and seq.launches_in_flight == 0:
            schedule.drop(seq)
            return True
    return False


def _drop_last_parked(schedule: Schedule) -> None:
    """Both memories are full: give up the KV of the sequence that would come back last."""
    for seq in reversed(schedule.parked):
        if seq.launches_in_flight == 0:
            schedule.drop(seq)
            return


def _is_over_limit(schedule: Schedule) -> bool:
    """Whether more is streamed than may be."""
    return schedule.residency.num_streamed > most_streamed(schedule) + 1


def _shrink(schedule: Schedule) -> bool:
    """Park the newest sequence that streams; False if there is none, or it is alone."""
    if len(schedule.running) > 1:
        for seq in reversed(schedule.running):
            if any(block.is_streamed for block in seq.table):
                schedule.park(seq)
                return True
    return False


# --- coming back ----------------------------------------------------------------------------


def _resume(schedule: Schedule) -> list[BlockMove]:
    """Bring the first parked sequence back if what it holds fits again."""
    seq = schedule.parked[0]
    is_alone = not schedule.running and not schedule.resuming
    if schedule.free_lanes == 0 or seq.launches_in_flight:
        return []
    if any(block.move is not None for block in seq.table):
        return []
    residency = schedule.residency
    pooled = [block for block in seq.table if block.read_slot is None]
    reserve = len(schedule.running) + 1
    free = residency.free_device - reserve
    stageable = min(
        _streamed_room(schedule, schedule.streamed_limit, joining=1), residency.staging.num_free
    )
    if free + max(0, stageable) < len(pooled):
        if is_alone:
            _make_way(schedule)
        return []
    if residency.free_device == 0:
        if is_alone:
            _make_way(schedule)
        return []
    return _bring_back(schedule, seq, pooled, max(0, free))


def _bring_back(
    schedule: Schedule, seq: Sequence, pooled: list[Block], free: int
) -> list[BlockMove]:
    """Promote the newest pooled blocks into `free` device slots, stream the older ones.

    A tail block will be written, so it is promoted in any case.
    """
    residency = schedule.residency
    num_promoted = min(len(pooled), free)
    if pooled and not pooled[-1].is_sealed:
        num_promoted = max(1, num_promoted)
    schedule.resume(seq)
    swap_in = []
    for index, block in enumerate(pooled):
        if index >= len(pooled) - num_promoted:
            move = residency.begin_promote(block)
            assert move is not None
            swap_in.append(move)
        else:
            residency.stage(block)
    seq.demote_from = 0
    if is_readable(seq):
        schedule.resuming.remove(seq)
        schedule.start(seq)
    return swap_in


def _make_way(schedule: Schedule) -> None:
    """Nothing runs and the first parked sequence finds no room."""
    is_quiet = not schedule.has_moves and not schedule.in_flight
    if is_quiet and schedule.residency.available_host == 0 and not _drop_paused(schedule):
        _drop_last_parked(schedule)


def _promote_streamed(schedule: Schedule, spare: int) -> list[BlockMove]:
    """Bring streamed blocks home while nobody waits for the room."""
    residency = schedule.residency
    moves: list[BlockMove] = []
    surplus = schedule.residency.num_streamed - schedule.least_streamed
    most = min(spare, surplus, MOST_PROMOTIONS_PER_ITERATION)
    if most <= 0 or not residency.streamed:
        return moves
    newest_first = reversed(residency.streamed.values())
    for block in [b for b in newest_first if b.move is None and b.is_clean and not b.is_resident]:
        if len(moves) >= most:
            break
        move = residency.begin_promote(block)
        if move is None:
            break
        moves.append(move)
        for seq in block.owners:
            seq.demote_from = min(seq.demote_from, block.index)
    return moves
