"""Holds every block table, copy and token of a simulated run against what it should be."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec
import numpy as np

from pie_async.core.layout import KvLayout
from pie_async.device.attempts import Outcome
from pie_async.device.happens_before import Locations
from pie_async.device.protocol import MemoryPlan
from pie_async.device.sim_memory import (
    CorruptKv,
    Operation,
    SimMemory,
    describe_contents,
    pack_owner,
    sequence_of,
    slots_array,
)
from pie_async.errors import DeviceFault
from pie_async.ids import IterationId, Lane, SequenceId
from pie_async.messages import BlockMove, CopyRun, LaneBinding, Row, TableUpdate

DAMAGED, _CORRUPTED = np.int64(-0x5AD), np.int64(1)
"""The tag of what a copy that went wrong for good left behind; what corruption adds to a tag."""


class FedRow(NamedTuple):
    """A row with the tokens that the device feeds for it."""

    row: Row
    tokens: tuple[int, ...]


class _Expectation(msgspec.Struct):
    """What an iteration reads and writes in every layer, all rows one after the other."""

    reads: Locations
    """Device slots."""
    tags: Locations
    writes: Locations
    new_tags: Locations
    new_owners: Locations
    row_ends: list[int]
    """Where each row's reads end in `reads`."""
    write_ends: list[int]
    """Where its writes end in `writes`."""


class CheckedPass(msgspec.Struct):
    """The checker's part of a forward pass."""

    iteration: IterationId
    rows: tuple[FedRow, ...]
    expectation: _Expectation | None = None


class KvChecker:
    """Follows tokens, block tables and copies; raises at the first thing that is wrong.

    For every sequence ever seen it keeps the hash of each prefix, so memory grows with the
    tokens fed: a tool for tests. A block that holds other tokens than the sequence's own
    prefix is an error whatever its history; a sequence that starts behind all that it ever had
    adopts the prefix it finds, if that is one unbroken prefix and no other than its own.

    Attributes:
        damaged: sequences that read what a copy which went wrong for good left behind. The
            engine is told of that and must begin them anew; until then they read and write
            what they like, and sample wrong tokens.
    """

    def __init__(self, plan: MemoryPlan, *, is_order_checked: bool = True) -> None:
        self.memory = SimMemory(plan, is_order_checked=is_order_checked)
        self._layout: KvLayout = plan.layout
        self._lanes: dict[Lane, SequenceId] = {}
        self._tables: dict[Lane, list[int]] = {}
        self._prefixes: dict[SequenceId, list[int | None]] = {}
        self.damaged: set[SequenceId] = set()

    # --- the compute stream -----------------------------------------------------------------

    def bind(self, binding: LaneBinding) -> None:
        self._lanes[binding.lane] = binding.sequence
        self._tables[binding.lane] = []
        self.damaged.discard(binding.sequence)

    def update_table(self, update: TableUpdate) -> None:
        """Apply one table update.

        Raises:
            CorruptKv: the lane is free, or the update leaves a gap.
        """
        table = self._tables.get(update.lane)
        if table is None or update.first > len(table):
            entries = "is bound to no sequence" if table is None else f"has {len(table)} entries"
            raise CorruptKv(
                f"a table update of lane {update.lane} starts at entry {update.first}, but the "
                f"lane {entries}"
            )
        table[update.first : update.first + len(update.slots)] = update.slots

    def run_layers(self, checked: CheckedPass, layers: range, start_s: float, end_s: float) -> None:
        """Check and apply what these layers read and write.

        Raises:
            CorruptKv: names iteration, layer, sequence, block, slot, and both contents.
            UnorderedAccess: names both accesses.
        """
        if checked.expectation is None:
            checked.expectation = self._expect(checked.rows)
        expected = checked.expectation
        for layer in layers:
            label = f"iteration {checked.iteration}, layer {layer}"
            operation = Operation(0, label, start_s, end_s)
            self.memory.begin(operation)
            locations = self.memory.device(expected.reads, layer)
            found = self.memory.read(operation, locations)
            tags = found - _layer_salt(layer)
            for at in np.flatnonzero(tags != expected.tags).tolist():
                if tags[at] == DAMAGED:
                    self._damage(checked, at)
                else:
                    self._require_more(checked, operation, layer, at, int(tags[at]))
            written = self.memory.device(expected.writes, layer)
            self.memory.write(
                operation,
                written,
                expected.new_tags + _layer_salt(layer),
                expected.new_owners + pack_owner(0, layer, 0, 0),
            )

    # --- the copy streams -------------------------------------------------------------------

    def stage_layer(
        self,
        layer: int,
        runs: Sequence[CopyRun],
        start_s: float,
        end_s: float,
        outcome: Outcome = "arrives",
    ) -> None:
        """Copy one layer of these runs; raises as `SimMemory.copy`."""
        operation = Operation(1, f"staging of layer {layer}", start_s, end_s)
        self.memory.begin(operation)
        if not runs:
            return
        pooled, staged = self._ends(operation, layer, runs)
        if outcome == "fails":
            tags = np.full(len(staged), DAMAGED + _layer_salt(layer))
            self.memory.write(operation, staged, tags, np.zeros_like(tags))
        else:
            self._copy(operation, pooled, staged, outcome)

    def write_layer_back(
        self, layer: int, runs: Sequence[CopyRun], start_s: float, end_s: float
    ) -> None:
        """The same, the other way; raises as `SimMemory.copy`."""
        operation = Operation(2, f"write-back of layer {layer}", start_s, end_s)
        self.memory.begin(operation)
        if runs:
            pooled, staged = self._ends(operation, layer, runs)
            self.memory.copy(operation, staged, pooled)

    def _ends(
        self, operation: Operation, layer: int, runs: Sequence[CopyRun]
    ) -> tuple[Locations, Locations]:
        """Locations in the pool and in the staging ring."""
        host = np.concatenate([np.arange(r.host_slot, r.host_slot + r.count) for r in runs])
        device = np.concatenate([np.arange(r.device_slot, r.device_slot + r.count) for r in runs])
        for slot in (int(device.min()), int(device.max())):
            if not self.memory.is_staging(slot):
                raise CorruptKv(f"{operation.label} uses slot {slot}, which is no staging slot")
        return self.memory.host(host, layer), self.memory.device(device, layer)

    def _copy(
        self, operation: Operation, sources: Locations, destinations: Locations, outcome: Outcome
    ) -> None:
        self.memory.copy(operation, sources, destinations)
        if outcome == "corrupted":
            self.memory.spoil(destinations, _CORRUPTED)

    def move(
        self,
        moves: Sequence[BlockMove],
        start_s: float,
        end_s: float,
        outcome: Outcome = "arrives",
        *,
        is_demotion: bool,
    ) -> None:
        """Copy all layers of these blocks; raises as `SimMemory.copy`."""
        if not moves:
            return
        name = "demotion" if is_demotion else "promotion"
        blocks = ", ".join(str(move.block) for move in moves[:8])
        label = f"{name} of blocks {blocks}{' ...' if len(moves) > 8 else ''}"
        operation = Operation(2 if is_demotion else 1, label, start_s, end_s)
        for move in moves:
            if self.memory.is_staging(move.device_slot):
                raise CorruptKv(f"{label} uses staging slot {move.device_slot}")
        host_slots = slots_array([move.host_slot for move in moves])
        device_slots = slots_array([move.device_slot for move in moves])
        layers = range(self._layout.num_layers)
        host = np.concatenate([self.memory.host(host_slots, layer) for layer in layers])
        device = np.concatenate([self.memory.device(device_slots, layer) for layer in layers])
        self.memory.begin(operation)
        sources, destinations = (device, host) if is_demotion else (host, device)
        self._copy(operation, sources, destinations, outcome)

    # --- what should be where ---------------------------------------------------------------

    def _expect(self, rows: Sequence[FedRow]) -> _Expectation:
        block_tokens = self._layout.block_tokens
        reads: list[int] = []
        tags: list[int | None] = []
        writes: list[int] = []
        new_tags: list[int | None] = []
        new_owners: list[int] = []
        row_ends: list[int] = []
        write_ends: list[int] = []
        for fed in rows:
            row, end = fed.row, fed.row.start + len(fed.tokens)
            table = self._table(row, self._layout.blocks_for(end))
            if self._adopts(row) and self._finds_damage(row, table):
                self.damaged.add(row.sequence)
            if row.sequence in self.damaged:
                for block in range(row.start // block_tokens, self._layout.blocks_for(end)):
                    writes.append(table[block])
                    new_tags.append(int(DAMAGED))
                    new_owners.append(0)
                row_ends.append(len(reads))
                write_ends.append(len(writes))
                continue
            prefix = self._prefix(row, table)
            self._extend(fed, prefix)
            reads += table[: self._layout.blocks_for(row.start)]
            tags += prefix[block_tokens - 1 : row.start : block_tokens]
            if row.start % block_tokens:
                tags.append(prefix[row.start - 1])
            for block in range(row.start // block_tokens, self._layout.blocks_for(end)):
                until = min(end, (block + 1) * block_tokens)
                self._check_tail(row, block, table[block])
                writes.append(table[block])
                new_tags.append(prefix[until - 1])
                new_owners.append(pack_owner(row.sequence, 0, block, until - block * block_tokens))
            row_ends.append(len(reads))
            write_ends.append(len(writes))
        return _Expectation(
            slots_array(reads),
            np.array(tags, np.int64),
            slots_array(writes),
            np.array(new_tags, np.int64),
            slots_array(new_owners),
            row_ends,
            write_ends,
        )

    def _table(self, row: Row, needed: int) -> list[int]:
        if self._lanes.get(row.lane) != row.sequence:
            raise CorruptKv(
                f"sequence {row.sequence} runs in lane {row.lane}, which is bound to "
                f"sequence {self._lanes.get(row.lane)}"
            )
        table = self._tables[row.lane]
        if len(table) < needed:
            raise CorruptKv(
                f"sequence {row.sequence} needs {needed} blocks, but the table of lane "
                f"{row.lane} has {len(table)}"
            )
        return table

    def _adopts(self, row: Row) -> bool:
        """Whether it starts on KV that others computed: it is new, or lost its own and begins
        anew on more than it ever had."""
        return row.start > len(self._prefixes.get(row.sequence, ()))

    def _finds_damage(self, row: Row, table: list[int]) -> bool:
        """Whether staging has just failed for a block that it starts on, which the engine knows."""
        staged = [
            s for s in table[: row.start // self._layout.block_tokens] if self.memory.is_staging(s)
        ]
        locations = self.memory.device(slots_array(staged), 0).tolist()
        return any(self.memory.tag(location) == DAMAGED for location in locations)

    def _prefix(self, row: Row, table: list[int]) -> list[int | None]:
        """The prefix hashes of a sequence, adopted from the blocks it was given if it is behind."""
        prefix = self._prefixes.setdefault(row.sequence, [])
        if row.start <= len(prefix):
            return prefix
        block_tokens = self._layout.block_tokens
        if row.start % block_tokens:
            raise CorruptKv(
                f"sequence {row.sequence} starts at position {row.start}, but only the KV of "
                f"its first {len(prefix)} tokens was ever written"
            )
        blocks = row.start // block_tokens
        locations = self.memory.device(slots_array(table[:blocks]), 0).tolist()
        found = [self.memory.tag(location) for location in locations]
        owners = [self.memory.owner(location) for location in locations]
        writer = self._prefixes.get(SequenceId(sequence_of(owners[-1])), [])
        if 0 in found or writer[block_tokens - 1 : row.start : block_tokens] != found:
            contents = "; ".join(describe_contents(owner) for owner in owners[:8])
            raise CorruptKv(
                f"sequence {row.sequence} starts at position {row.start} on a prefix that is "
                f"not one: its blocks hold {contents}"
            )
        known = prefix[block_tokens - 1 :: block_tokens]
        if any(own not in (None, tag) for own, tag in zip(known, found, strict=False)):
            raise CorruptKv(
                f"sequence {row.sequence} begins anew at position {row.start} on other tokens "
                "than its own"
            )
        prefix += [None] * (row.start - len(prefix))
        prefix[block_tokens - 1 :: block_tokens] = found
        return prefix

    def _extend(self, fed: FedRow, prefix: list[int | None]) -> None:
        """Add the fed tokens; tokens fed again (a recomputation) must be the same."""
        position = fed.row.start
        tag = prefix[position - 1] if position else 0
        for token in fed.tokens:
            tag = hash((tag, token))
            if position == len(prefix):
                prefix.append(tag)
            elif prefix[position] is None:
                prefix[position] = tag
            elif prefix[position] != tag:
                raise CorruptKv(
                    f"sequence {fed.row.sequence} is fed token {token} at position {position}, "
                    "but it, or a token before it, was another one earlier"
                )
            position += 1

    def _check_tail(self, row: Row, block: int, slot: int) -> None:
        if self.memory.is_staging(slot):
            raise CorruptKv(
                f"sequence {row.sequence} writes block {block} in staging slot {slot}; "
                "only sealed blocks may be streamed"
            )

    def _damage(self, checked: CheckedPass, at: int) -> None:
        """The row of this read has read what is known to be wrong: so is what it writes."""
        expected = checked.expectation
        assert expected is not None
        index = bisect_right(expected.row_ends, at)
        first = expected.write_ends[index - 1] if index else 0
        expected.new_tags[first : expected.write_ends[index]] = DAMAGED
        self.damaged.add(checked.rows[index].row.sequence)

    def _require_more(
        self, checked: CheckedPass, operation: Operation, layer: int, at: int, found: int
    ) -> None:
        """A tail may hold more of its own sequence than is needed: tokens fed again."""
        assert checked.expectation is not None
        ends = checked.expectation.row_ends
        index = bisect_right(ends, at)
        row = checked.rows[index].row
        block = at - (ends[index - 1] if index else 0)
        block_tokens = self._layout.block_tokens
        if found in self._prefixes[row.sequence][row.start : (block + 1) * block_tokens]:
            return
        num_tokens = min(row.start - block * block_tokens, block_tokens)
        needed = describe_contents(pack_owner(row.sequence, layer, block, num_tokens))
        location = int(self.memory.device(checked.expectation.reads[at : at + 1], layer)[0])
        raise CorruptKv(
            f"{operation.label}, sequence {row.sequence}, block {block}: slot "
            f"{checked.expectation.reads[at]} ({self.memory.describe(location)}) should hold "
            f"{needed}, but holds {self.memory.found_owner(operation, location)}"
        )


def _layer_salt(layer: int) -> np.int64:
    """What tells one layer's KV of the same tokens from another's; 0 for layer 0."""
    return np.int64(layer * 0x9E3779B97F4A7C1 % (1 << 62))


def check_rows(rows: Sequence[FedRow]) -> None:
    """No lane and no sequence twice in one iteration.

    Raises:
        DeviceFault: naming both rows.
    """
    lanes = sorted((fed.row.lane, fed.row.sequence) for fed in rows)
    for (lane, one), (other_lane, other) in pairwise(lanes):
        if lane == other_lane:
            raise DeviceFault(f"sequences {one} and {other} share lane {lane} in one iteration")
