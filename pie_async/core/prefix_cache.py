"""Sealed blocks found by what they hold, and the cached ones among them: those nobody owns.

A cached block stays in its device slot until a sequence adopts it or the slot is wanted, the
least recently used first. So it costs nothing, and wherever room is counted it counts as free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pie_async.ids import BlockId

if TYPE_CHECKING:
    from pie_async.core.residency import Block


class PrefixCache:
    """The index of sealed blocks, and the cached ones in the order of their last use.

    An iteration that was issued while a cached block still had owners may read it for a while:
    until that has settled the block is *cooling*, it can be adopted but not evicted. Blocks
    cool in the order in which they lost their last owners, so both queues are in that order.

    Cost: O(1) everywhere, amortised.
    """

    def __init__(self) -> None:
        self.index: dict[bytes, Block] = {}
        self.evictions = 0
        """Cached blocks that gave their slots away, since the start."""
        self._evictable: OrderedDict[BlockId, Block] = OrderedDict()
        self._cooling: OrderedDict[BlockId, tuple[int, Block]] = OrderedDict()
        """With the newest iteration that may read the block."""

    def __len__(self) -> int:
        """Cached blocks."""
        return len(self._evictable) + len(self._cooling)

    def __contains__(self, block: Block) -> bool:
        """Whether the block is a cached one."""
        return block.id in self._evictable or block.id in self._cooling

    def cached(self) -> Iterator[tuple[Block, int | None]]:
        """The cached blocks, least recently used first, and until when each may be read."""
        yield from ((block, None) for block in self._evictable.values())
        yield from ((block, read_until) for read_until, block in self._cooling.values())

    @property
    def num_evictable(self) -> int:
        return len(self._evictable)

    @property
    def num_cooling(self) -> int:
        return len(self._cooling)

    # --- the index --------------------------------------------------------------------------

    def find(self, digest: bytes) -> Block | None:
        """The block with this content, if a new owner may read it."""
        block = self.index.get(digest)
        return block if block is not None and block.is_shareable else None

    def enter(self, block: Block) -> bool:
        """Let a sealed block be found, unless another one with its content already is.

        Returns: whether it is this block that is found.
        """
        assert block.digest is not None
        known = self.index.get(block.digest)
        if known is None or not known.is_shareable:
            self.index[block.digest] = known = block
        return known is block

    def forget(self, block: Block) -> None:
        """The block is gone or no longer found."""
        if block.digest is not None and self.index.get(block.digest) is block:
            del self.index[block.digest]

    # --- cached blocks ------------------------------------------------------------------------

    def keep(self, block: Block, *, read_until: int | None) -> None:
        """The block lost its last owner; iterations up to `read_until` may still read it."""
        if read_until is None:
            self._evictable[block.id] = block
        else:
            self._cooling[block.id] = (read_until, block)

    def touch(self, digest: bytes) -> None:
        """The content was used until now, in another block: its cached block goes later."""
        block = self.index[digest]
        if block.id in self._evictable:
            self._evictable.move_to_end(block.id)

    def take_up(self, block: Block) -> None:
        """The block gets an owner (again)."""
        if self._evictable.pop(block.id, None) is None:
            self._cooling.pop(block.id, None)

    def settled(self, iteration: int) -> None:
        """This iteration and all before it are over."""
        while self._cooling:
            read_until, block = next(iter(self._cooling.values()))
            if read_until > iteration:
                return
            del self._cooling[block.id]
            self._evictable[block.id] = block

    def evict(self) -> Block | None:
        """Forget the block that has been cached longest; None if all are read or none is left."""
        if not self._evictable:
            return None
        _, block = self._evictable.popitem(last=False)
        self.forget(block)
        self.evictions += 1
        return block
