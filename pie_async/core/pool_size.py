"""How many slots the host pool should have: what is in use, room to grow, and no more.

Pinned memory is lost to everybody else on the machine. The pool grows as soon as its free slots
run short, beside everything else, and shrinks once it has needed less for a whole period and
nothing runs: unpinning holds up the launches of a GPU. Either is done chunk by chunk, one change
at a time, so what the device tells of is never out of date.
"""

from __future__ import annotations

from pie_async.core.slots import SlotPool


class PoolSize:
    """Adjusts a pool's slots to its use.

    Attributes:
        ceiling: most slots there may be; lower than configured once memory was refused.
        present: slots that there are, as the device said last; those at the end may be waiting
            for their last blocks to leave.
        target: what the device was told to make it.
    """

    def __init__(self, pool: SlotPool, *, ceiling: int, chunk_slots: int) -> None:
        """
        Args:
            pool: its slots are there; more, up to `ceiling`, are coming by themselves.
            chunk_slots: by which the device takes and gives back memory; 0: it does neither.
        """
        self._pool = pool
        self._chunk_slots = chunk_slots
        self.ceiling = ceiling if chunk_slots else pool.size
        self.present = pool.size
        self.target = self.ceiling
        self._peak = 0

    @property
    def is_changing(self) -> bool:
        """The device is at it: what finds no room has something to wait for."""
        return self.present != self.target

    @property
    def is_short(self) -> bool:
        """More slots are wanted and can be had."""
        return self._wanted(self._pool.num_used) > self._pool.size

    @property
    def growable(self) -> int:
        """Slots that are not there but would come."""
        pool = self._pool
        return max(0, self.ceiling - pool.size - pool.num_retiring)

    def told(self, slots: int, *, is_all: bool) -> bool:
        """There are so many slots now.

        Args:
            is_all: no more will come, wanted or not.

        Returns: whether the change goes on.
        """
        if not self._chunk_slots:
            self._pool.resize(max(slots, self._pool.size))
            self.ceiling = self.present = self.target = self._pool.size
            return not is_all
        if slots > self.present:
            self._pool.resize(max(slots, self._pool.size))
        self.present = slots
        if is_all and slots < self.target:
            self.ceiling = self.target = slots
        return self.is_changing

    def grow(self) -> int | None:
        """Take back into use what is still there; returns what the device is to make it, if that
        is not enough. After everything that takes slots."""
        pool = self._pool
        self._peak = max(self._peak, pool.num_used)
        if self.is_changing or not self.is_short:
            return None
        wanted = self._wanted(pool.num_used)
        pool.resize(min(wanted, self.present))
        if wanted <= self.present:
            return None
        self.target = wanted
        return wanted

    def review(self) -> int:
        """A period is over: let go of what it did not need.

        Returns: what the device is to make it.
        """
        pool = self._pool
        if not self.is_changing:
            needed = max(self._peak, pool.num_used)
            pool.resize(min(pool.size, self._wanted(needed)))
        self._peak = pool.num_used
        return self.shrink()

    def shrink(self) -> int:
        """Give one chunk more back of what was let go of, as far as nothing lies there: whoever
        comes meanwhile waits for no more than that.

        Returns: what the device is to make it.
        """
        pool = self._pool
        if not self.is_changing:
            least = self._chunks(max(pool.size, pool.end_used))
            one_less = (self.present - 1) // self._chunk_slots * self._chunk_slots
            self.target = min(self.present, max(least, one_less))
        return self.target

    def _wanted(self, used: int) -> int:
        """A quarter more than is used, by whole chunks, at least one: pinning takes a while."""
        if not self._chunk_slots:
            return self.ceiling
        return self._chunks(used + max(self._chunk_slots, used // 4))

    def _chunks(self, slots: int) -> int:
        return min(self.ceiling, -(-slots // self._chunk_slots) * self._chunk_slots)
