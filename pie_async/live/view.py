"""A snapshot of one engine for people: memory, sequences, the governor, the last moments.

Made when somebody looks, and bounded: of many blocks it looks at some, so that looking takes a
millisecond or two of the event loop however large the memories are.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

import msgspec

from pie_async.ids import SequenceId
from pie_async.live.timeline import LimitChange, Span
from pie_async.metrics import EngineStats

if TYPE_CHECKING:  # a server's front has no schedule, and numpy takes it a fifth of a second
    from pie_async.core.layout import KvLayout
    from pie_async.core.residency import Block
    from pie_async.core.schedule import Schedule
    from pie_async.core.sequence import Sequence
    from pie_async.core.slots import SlotPool

CELLS = 96
"""Most cells into which a row of slots is divided."""
MOST_BLOCKS = 1024
"""Of more blocks every second, third ... is looked at: each costs about 0.7 us."""
MOST_SEQUENCES = 40
MOST_TABLE_BLOCKS = 32
"""The same, of a sequence's own blocks."""

FREE, RESIDENT, CACHED, LEAVING, ARRIVING = ".", "r", "c", "o", "i"
STREAMED, PARKED, SPARE, UNPINNED = "s", "p", "k", "_"
STATES = {
    RESIDENT: "resident",
    CACHED: "cached",
    LEAVING: "leaving",
    ARRIVING: "arriving",
    STREAMED: "streamed",
    PARKED: "parked",
    SPARE: "spare copy",
    FREE: "free",
    UNPINNED: "not pinned",
}
"""What the letters of `MemoryMap` mean."""


class MemoryMap(msgspec.Struct, frozen=True, kw_only=True):
    """Where KV is. A letter of `STATES` is a cell: what most of its slots hold.

    A block lies in the same slot in every layer, so a layer's row of the arena and of the pool is
    every layer's. The staging ring alone differs: it holds `ring_depth` layer groups at a time.
    """

    num_layers: int
    groups: tuple[int, ...]
    """The first layer of each layer group."""
    ring_depth: int
    arena: str
    ring: str
    """A streamed block's staging slot, or a free one."""
    pool: str
    arena_slots: int
    ring_slots: int
    pool_slots: int
    """The pool's ceiling; what is not pinned of it counts too."""
    staged_groups: tuple[int, ...] = ()
    """The layer groups whose streamed KV is on the device at this instant, judged by how long the
    iteration under way has run and the last one took; none while nothing is streamed."""


class SequenceView(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence. Tokens of prompt and output are counted, never shown."""

    sequence: SequenceId
    name: str = ""
    """Its request's; empty where it is not known."""
    state: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    max_tokens: int
    blocks: int
    pooled_share: float
    """About how much of its KV is in the pool alone, 0 to 1."""


class EngineView(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine is doing. Times are its own clock, in seconds."""

    now_s: float
    stats: EngineStats
    memory: MemoryMap
    sequences: tuple[SequenceView, ...]
    """The first to have come, at most 40."""
    limits: tuple[LimitChange, ...]
    """The governor's last decisions, newest last."""
    spans: tuple[Span, ...]
    """What ended since the last look."""

    def named(self, names: dict[SequenceId, str]) -> EngineView:
        """The same, with the sequences' names."""
        sequences = tuple(
            msgspec.structs.replace(each, name=names.get(each.sequence, ""))
            for each in self.sequences
        )
        return msgspec.structs.replace(self, sequences=sequences)


def memory_map(schedule: Schedule, layout: KvLayout, *, progress: float | None) -> MemoryMap:
    """
    Args:
        progress: how far the iteration under way has come, 0 to 1; None: none is, or it does not
            stream.
    """
    residency = schedule.residency
    arena, ring = _Cells(residency.device), _Cells(residency.staging)
    pool = _Cells(residency.host, size=max(residency.pool_size.ceiling, residency.host.size))
    blocks = residency.blocks
    step = max(1, -(-len(blocks) // MOST_BLOCKS))
    for block in islice(blocks.values(), 0, None, step):
        _place(block, arena, ring, pool, step)
    groups = [layout.group(index) for index in range(layout.num_groups)]
    return MemoryMap(
        num_layers=layout.num_layers,
        groups=tuple(group.start for group in groups),
        ring_depth=layout.ring_depth,
        arena=arena.letters(taken=RESIDENT),
        ring=ring.letters(taken=STREAMED),
        pool=pool.letters(taken=PARKED),
        arena_slots=arena.size,
        ring_slots=ring.size,
        pool_slots=pool.size,
        staged_groups=_staged(layout, progress) if residency.num_streamed else (),
    )


def _place(block: Block, arena: _Cells, ring: _Cells, pool: _Cells, weight: int) -> None:
    if block.device_slot is not None:
        arena.add(block.device_slot, _arena_state(block), weight)
    if block.staging_slot is not None:
        ring.add(block.staging_slot, STREAMED, weight)
    if block.host_slot is not None:
        pool.add(block.host_slot, _pool_state(block), weight)


def _arena_state(block: Block) -> str:
    if block.move is not None:
        return ARRIVING if block.move == "in" else LEAVING
    return RESIDENT if block.owners else CACHED


def _pool_state(block: Block) -> str:
    if block.move == "out":
        return ARRIVING  # seen from the pool
    if block.staging_slot is not None:
        return STREAMED
    return PARKED if block.device_slot is None else SPARE


def _staged(layout: KvLayout, progress: float | None) -> tuple[int, ...]:
    if progress is None:
        return ()
    computing = min(layout.num_groups - 1, int(progress * layout.num_groups))
    ahead = range(computing, computing + min(layout.ring_depth, layout.num_groups))
    return tuple(sorted(group % layout.num_groups for group in ahead))


class _Cells:
    """A row of slots, divided evenly; counts what the slots of each cell hold."""

    def __init__(self, slots: SlotPool, *, size: int | None = None) -> None:
        self._slots = slots
        self.size = slots.size if size is None else size
        self._held: list[dict[str, int]] = [{} for _ in range(min(self.size, CELLS))]

    def add(self, slot: int, letter: str, weight: int) -> None:
        index = slot - self._slots.first
        if index < self.size:
            held = self._held[index * len(self._held) // self.size]
            held[letter] = held.get(letter, 0) + weight

    def letters(self, *, taken: str) -> str:
        """`taken` is what a slot holds that no block looked at is in."""
        return "".join(self._letter(number, taken) for number in range(len(self._held)))

    def _letter(self, number: int, taken: str) -> str:
        num_cells, slots = len(self._held), self._slots
        start, stop = (-(-at * self.size // num_cells) for at in (number, number + 1))
        if start >= slots.size:
            return UNPINNED
        free = slots.num_free_between(start, stop)
        if free * 2 > stop - start:
            return FREE
        held = self._held[number]
        return max(held, key=lambda letter: held[letter]) if held else taken


def sequence_views(schedule: Schedule) -> Iterator[SequenceView]:
    """The first sequences to have come."""
    for seq in islice(schedule.sequences.values(), MOST_SEQUENCES):
        yield SequenceView(
            sequence=seq.id,
            state=seq.state.value,
            prompt_tokens=seq.prompt_len,
            cached_tokens=min(seq.num_cached_tokens or 0, seq.prompt_len),
            output_tokens=seq.num_outputs,
            max_tokens=seq.max_tokens,
            blocks=len(seq.table),
            pooled_share=_pooled_share(seq),
        )


def _pooled_share(seq: Sequence) -> float:
    table: list[Block] = seq.table
    some = table[:: max(1, -(-len(table) // MOST_TABLE_BLOCKS))]
    return sum(block.device_slot is None for block in some) / len(some) if some else 0.0
