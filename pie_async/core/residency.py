"""The residency map: where every KV block is, and the legal moves between places.

Pie's "mapping table" (arXiv 2411.09317, section 4). A block is written once, read many
times and freed when the last iteration or copy that may touch it is over. Moves have two
phases: `begin_...` takes the destination slot and yields the copy to do, `finish_...`, called
when the copy's event has fired, makes the destination count.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pie_async.core.pool_size import PoolSize
from pie_async.core.prefix_cache import PrefixCache
from pie_async.core.slots import SlotPool
from pie_async.core.staged import StagedBlocks
from pie_async.ids import BlockId, DeviceSlot, HostSlot
from pie_async.messages import BlockMove

if TYPE_CHECKING:
    from pie_async.core.sequence import Sequence


@dataclass(slots=True, eq=False)
class Block:
    """KV of `block_tokens` consecutive tokens, in all layers.

    Readable where: in its device slot unless a swap-in into it is under way; otherwise in
    its host slot, through its staging slot.
    """

    id: BlockId
    index: int
    """In its owners' tables. It is the same in all: they share what is before it, too."""
    device_slot: DeviceSlot | None = None
    host_slot: HostSlot | None = None
    """The pooled copy; complete unless a swap-out into it is under way."""
    staging_slot: DeviceSlot | None = None
    """Where every iteration finds this block while it is streamed."""
    is_sealed: bool = False
    """All its tokens are written and their iterations have finished."""
    move: Literal["in", "out"] | None = None
    """The copy that is under way."""
    owners: tuple[Sequence, ...] = ()
    """Sequences that share the block. Neighbours of one sequence have one tuple: there are many
    blocks, and collections of garbage go through every object."""
    digest: bytes | None = None
    """Names what it holds, once it is sealed; None if prefixes are not shared."""

    @property
    def is_resident(self) -> bool:
        return self.device_slot is not None and self.move != "in"

    @property
    def is_clean(self) -> bool:
        """The pooled copy is complete."""
        return self.host_slot is not None and self.move != "out"

    @property
    def is_streamed(self) -> bool:
        return self.staging_slot is not None

    @property
    def is_leaving(self) -> bool:
        """It is being copied out and will then be only pooled: nobody new may read it."""
        return self.move == "out" and self.staging_slot is None

    @property
    def is_shareable(self) -> bool:
        """A new owner can read it, now and later."""
        return self.read_slot is not None and not self.is_leaving

    @property
    def read_slot(self) -> DeviceSlot | None:
        """The slot that a block table holds for it; None while it is only pooled."""
        return self.device_slot if self.is_resident else self.staging_slot


class ResidencyMap:
    """All blocks of one engine and the three pools of slots that hold them.

    A slot is freed when no issued iteration can touch it any more: it waits in limbo,
    stamped with the newest launch, until that launch has settled.
    """

    def __init__(
        self,
        *,
        device_slots: int,
        host_slots: int,
        staging_slots: int,
        first_staging_slot: int,
        most_host_slots: int = 0,
        chunk_slots: int = 0,
    ) -> None:
        """
        Args:
            host_slots: that can be used from the start.
            most_host_slots: that there may be later, with `chunk_slots`.
            chunk_slots: by which the host pool grows and shrinks with its use; 0: it does not.
        """
        self.device = SlotPool("device", device_slots)
        self.host = SlotPool("host", host_slots)
        self.pool_size = PoolSize(self.host, ceiling=most_host_slots, chunk_slots=chunk_slots)
        self.staging = SlotPool("staging", staging_slots, first=first_staging_slot)
        self.blocks: dict[BlockId, Block] = {}
        self.streamed: dict[BlockId, Block] = {}
        self.staged = StagedBlocks(staging_slots, first=first_staging_slot)
        """Of the streamed blocks those that have left the device."""
        self.clean_resident: OrderedDict[BlockId, Block] = OrderedDict()
        """Resident blocks that also have a pooled copy: free to demote, and their host slots
        can be taken back."""
        self.moving_out = 0
        self.moving_in = 0
        self.cache = PrefixCache()
        self._limbo: deque[tuple[int, SlotPool, int]] = deque()
        self._device_in_limbo = 0
        self._last_launch = 0
        self._last_settled = 0
        self._next_id = 1

    # --- time ---------------------------------------------------------------------------

    def launched(self, iteration: int) -> None:
        """An iteration that may touch any slot mapped now has been issued."""
        self._last_launch = iteration

    def settled(self, iteration: int) -> None:
        """That iteration and all before it are over."""
        self._last_settled = iteration
        while self._limbo and self._limbo[0][0] <= iteration:
            _, pool, slot = self._limbo.popleft()
            pool.give_back(slot)
            self._device_in_limbo -= pool is self.device
        self.cache.settled(iteration)

    @property
    def _read_until(self) -> int | None:
        """The newest iteration that may touch any slot mapped now; None if all are over."""
        return self._last_launch if self._last_launch > self._last_settled else None

    def _retire(self, pool: SlotPool, slot: int) -> None:
        read_until = self._read_until
        if read_until is None:
            pool.give_back(slot)
        else:
            self._limbo.append((read_until, pool, slot))
            self._device_in_limbo += pool is self.device

    def is_read(self, until: int | None) -> bool:
        """Whether an iteration up to `until` may still touch what it was issued with."""
        return until is not None and until > self._last_settled

    def limbo_slots(self, pool: SlotPool) -> list[int]:
        return [slot for _, owner, slot in self._limbo if owner is pool]

    # --- capacity -------------------------------------------------------------------------

    @property
    def free_device(self) -> int:
        """Device slots to be had at once: free ones and those of cached blocks."""
        return self.device.num_free + self.cache.num_evictable

    @property
    def coming_device(self) -> int:
        """Device slots that become free without another decision."""
        return self.moving_out + self._device_in_limbo + self.cache.num_cooling

    @property
    def used_device(self) -> int:
        """Device slots that sequences, copies or issued iterations need."""
        return self.device.num_used - len(self.cache)

    @property
    def num_streamed(self) -> int:
        return len(self.streamed)

    @property
    def available_host(self) -> int:
        """Host slots free now, still to be had, or holding spare copies of resident blocks."""
        return self.host.num_free + self.pool_size.growable + len(self.clean_resident)

    # --- blocks -----------------------------------------------------------------------------

    def allocate(self, index: int, owners: tuple[Sequence, ...] = ()) -> Block | None:
        """A new resident block, not sealed; None if no slot is free."""
        slot = self._take_device()
        if slot is None:
            return None
        block = Block(BlockId(self._next_id), index, device_slot=slot, owners=owners)
        self._next_id += 1
        self.blocks[block.id] = block
        return block

    def _take_device(self) -> DeviceSlot | None:
        """A free slot, or else that of the cached block which was used least recently."""
        slot = self.device.take()
        if slot is not None:
            return DeviceSlot(slot)
        evicted = self.cache.evict()
        if evicted is None:
            return None
        del self.blocks[evicted.id]
        return evicted.device_slot

    def adopt(self, block: Block, owner: Sequence) -> None:
        """`owner` shares a block that `cache.find` found."""
        self.cache.take_up(block)
        block.owners = (*block.owners, owner)

    def release(self, block: Block, owner: Sequence) -> None:
        """`owner` no longer needs the block; without owners it is let go, or, while a copy of
        it is under way, when that copy ends."""
        others = [each for each in block.owners if each is not owner]
        block.owners = tuple(others)
        if not block.owners and block.move is None:
            self._let_go(block)

    def _let_go(self, block: Block) -> None:
        """Nobody owns it: it becomes a cached block where it is, or is freed."""
        if block.digest is None or not block.is_resident:
            self._free(block)
            return
        if not self.cache.enter(block):
            self.cache.touch(block.digest)
            self._free(block)
            return
        self._unstage(block)
        self._drop_copy(block)
        self.cache.keep(block, read_until=self._read_until)

    def _free(self, block: Block) -> None:
        self.cache.forget(block)
        self._unstage(block)
        self.clean_resident.pop(block.id, None)
        if block.device_slot is not None:
            self._retire(self.device, block.device_slot)
        if block.host_slot is not None:
            self._retire(self.host, block.host_slot)
        del self.blocks[block.id]

    def reopen(self, block: Block) -> None:
        """A tail block will be written again: a pooled copy of it would lag, so it goes."""
        assert not block.is_sealed and block.move is None
        self._drop_copy(block)

    def _drop_copy(self, block: Block) -> None:
        if block.host_slot is not None:
            self.clean_resident.pop(block.id, None)
            self._retire(self.host, block.host_slot)
            block.host_slot = None

    # --- moves ----------------------------------------------------------------------------------

    def demote(self, block: Block, *, is_streamed: bool) -> BlockMove | None:
        """Move a block's home to the pool; as a streamed block it gets a staging slot.

        A clean block moves at once and for free. Otherwise returns the copy to do; until
        `finish_demote` the block stays readable in its device slot. The caller has checked
        `can_demote`.
        """
        is_clean = block.is_clean
        if not is_clean:
            block.host_slot = self._take_host(is_streamed=is_streamed)
        if is_streamed and block.staging_slot is None:
            self._stage(block)
        if is_clean:
            self._leave_device(block)
            return None
        assert block.host_slot is not None and block.device_slot is not None
        block.move = "out"
        self.moving_out += 1
        return BlockMove(block.id, block.device_slot, block.host_slot)

    def can_demote(self, block: Block, *, is_streamed: bool) -> bool:
        if block.move is not None or not block.is_resident:
            return False
        if is_streamed and self.staging.num_free == 0:
            return False
        return block.is_clean or self._can_take_host()

    def finish_demote(self, block_id: BlockId) -> None:
        """The copy out is complete."""
        block = self.blocks[block_id]
        block.move = None
        self.moving_out -= 1
        if block.owners:
            self._leave_device(block)
        else:
            self._let_go(block)

    def fail_demote(self, block_id: BlockId) -> None:
        """The copy out came to nothing: the block stays where it is."""
        block = self.blocks[block_id]
        block.move = None
        self.moving_out -= 1
        self._unstage(block)
        self._drop_copy(block)
        if not block.owners:
            self._let_go(block)

    def _leave_device(self, block: Block) -> None:
        assert block.device_slot is not None
        self.clean_resident.pop(block.id, None)
        self._retire(self.device, block.device_slot)
        block.device_slot = None
        self._note_staged(block)
        self._mark_moved(block)

    def begin_promote(self, block: Block) -> BlockMove | None:
        """Start moving a pooled block back to stay; None if no device slot is free."""
        assert block.is_clean and block.device_slot is None and block.host_slot is not None
        slot = self._take_device()
        if slot is None:
            return None
        block.device_slot = slot
        block.move = "in"
        self.moving_in += 1
        return BlockMove(block.id, block.device_slot, block.host_slot)

    def finish_promote(self, block_id: BlockId) -> None:
        """The copy in is complete; the pooled copy stays, as a clean one."""
        block = self.blocks[block_id]
        block.move = None
        self.moving_in -= 1
        if not block.owners:
            self._let_go(block)
            return
        self._unstage(block)
        self.clean_resident[block.id] = block
        self._mark_moved(block)

    def fail_promote(self, block_id: BlockId) -> None:
        """The copy in came to nothing: the block stays in the pool."""
        block = self.blocks[block_id]
        block.move = None
        self.moving_in -= 1
        assert block.device_slot is not None
        self._retire(self.device, block.device_slot)
        block.device_slot = None
        if not block.owners:
            self._let_go(block)

    def _mark_moved(self, block: Block) -> None:
        for seq in block.owners:
            if seq.dirty_from is None or block.index < seq.dirty_from:
                seq.dirty_from = block.index

    # --- staging ------------------------------------------------------------------------------

    def stage(self, block: Block) -> bool:
        """Make a pooled block streamed; False if the staging ring is full."""
        if self.staging.num_free == 0:
            return False
        self._stage(block)
        self._note_staged(block)
        self._mark_moved(block)
        return True

    def unstage(self, block: Block) -> None:
        """Stop streaming a pooled block (its sequences do not run)."""
        self._unstage(block)

    def _stage(self, block: Block) -> None:
        """If it is free, into the staging slot of its host slot's number: neighbours in the
        pool are then neighbours in the ring, and one copy. Else into the highest one, whose own
        host slot is the last to be handed out: from the lowest it would drive the next block."""
        assert block.host_slot is not None
        slot = self.staging.take(preferred=self.staging.first + block.host_slot, is_highest=True)
        assert slot is not None
        block.staging_slot = DeviceSlot(slot)
        self.streamed[block.id] = block

    def _note_staged(self, block: Block) -> None:
        """It is on the device no more: if it is streamed, iterations have to stage it."""
        if block.staging_slot is not None:
            assert block.host_slot is not None
            self.staged.add(block.id, block.host_slot, block.staging_slot)

    def _unstage(self, block: Block) -> None:
        if block.staging_slot is not None:
            self.staged.remove(block.staging_slot)
            self._retire(self.staging, block.staging_slot)
            block.staging_slot = None
            del self.streamed[block.id]

    # --- host slots -----------------------------------------------------------------------------

    def _can_take_host(self) -> bool:
        return self.host.num_free > 0 or bool(self.clean_resident and self._read_until is None)

    def _take_host(self, *, is_streamed: bool) -> HostSlot:
        """A slot at the low end of the pool for what every iteration copies, at the high end
        for what only waits there. The caller has checked that there is one."""
        if self.host.num_free == 0:
            self._drop_copy(next(iter(self.clean_resident.values())))
        slot = self.host.take(is_highest=not is_streamed)
        assert slot is not None
        return HostSlot(slot)

    def reclaim_host(self, wanted: int) -> None:
        """Drop spare copies of resident blocks until `wanted` host slots are or become free."""
        wanted -= self.pool_size.growable
        while self.clean_resident and self.host.num_free < wanted:
            self._drop_copy(next(iter(self.clean_resident.values())))
            wanted -= 1
