"""What the simulated device's memory holds, and whether every read finds what it should.

No tensors: a location (one layer of one slot) holds a tag, the hash of the layer and of all
tokens from the start of the sequence to the last one written there. Equal tags mean equal
KV, whoever wrote it, so shared prefixes need no special case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pie_async.device.happens_before import Clock, HappensBefore, Locations
from pie_async.device.protocol import MemoryPlan
from pie_async.errors import DeviceFault

STREAMS = ("compute", "h2d", "d2h")

_TOKEN_BITS, _BLOCK_BITS, _LAYER_BITS = 10, 18, 8
_SEQUENCE_SHIFT = _TOKEN_BITS + _BLOCK_BITS + _LAYER_BITS


class CorruptKv(DeviceFault):
    """A read found other KV than it needed, or KV that was not there yet, or no longer."""


class Operation(NamedTuple):
    """A piece of one stream's work."""

    stream: int
    """Index into STREAMS."""
    label: str
    start_s: float
    end_s: float


def pack_owner(sequence: int, layer: int, block: int, num_tokens: int) -> int:
    """Who wrote a location last, for errors: 27, 8, 18 and 10 bits."""
    packed = sequence << _LAYER_BITS | layer
    return (packed << _BLOCK_BITS | block) << _TOKEN_BITS | num_tokens


def sequence_of(owner: int) -> int:
    """The sequence in what `pack_owner` packed."""
    return owner >> _SEQUENCE_SHIFT


def describe_contents(owner: int) -> str:
    """What `pack_owner` packed, for people."""
    if owner == 0:
        return "nothing"
    num_tokens = owner & ((1 << _TOKEN_BITS) - 1)
    block = (owner >> _TOKEN_BITS) & ((1 << _BLOCK_BITS) - 1)
    layer = (owner >> (_TOKEN_BITS + _BLOCK_BITS)) & ((1 << _LAYER_BITS) - 1)
    return f"{num_tokens} tokens of block {block} of sequence {sequence_of(owner)} in layer {layer}"


class SimMemory:
    """Contents of all locations by virtual time, and the order of accesses to them.

    Locations are numbered through: [layer, resident slot], then [ring buffer, staging slot],
    then [layer, host slot].
    """

    def __init__(self, plan: MemoryPlan, *, is_order_checked: bool = True) -> None:
        layers = plan.layout.num_layers
        self._plan = plan
        self._ring_at = layers * plan.device_slots
        self._host_at = self._ring_at + plan.layout.ring_layers * plan.staging_slots
        count = self._host_at + layers * plan.host_slots
        self._tags = np.zeros(count, np.int64)
        self._owners = np.zeros(count, np.int64)
        self._tags_before = np.zeros(count, np.int64)
        self._owners_before = np.zeros(count, np.int64)
        self._written_at_s = np.zeros(count)
        self._read_until_s = np.zeros((len(STREAMS), count))
        self.order = HappensBefore(STREAMS, count, self.describe) if is_order_checked else None

    # --- where things are -------------------------------------------------------------------

    def device(self, slots: Locations, layer: int) -> Locations:
        """Locations of resident or staging slots in a layer.

        Raises:
            CorruptKv: a number that is neither.
        """
        plan = self._plan
        staging = slots - plan.first_staging_slot
        is_staging = staging >= 0
        is_valid = np.where(
            is_staging, staging < plan.staging_slots, (slots >= 0) & (slots < plan.device_slots)
        )
        if not is_valid.all():
            raise CorruptKv(
                f"there is no device slot {slots[~is_valid][0]}: resident slots are 0 to "
                f"{plan.device_slots - 1}, staging slots {plan.first_staging_slot} to "
                f"{plan.first_staging_slot + plan.staging_slots - 1}"
            )
        ring_at = self._ring_at + plan.layout.ring_buffer(layer) * plan.staging_slots
        located: Locations = np.where(
            is_staging, ring_at + staging, layer * plan.device_slots + slots
        )
        return located

    def host(self, slots: Locations, layer: int) -> Locations:
        """Locations of host slots in a layer; raises CorruptKv as `device`."""
        is_valid = (slots >= 0) & (slots < self._plan.host_slots)
        if not is_valid.all():
            raise CorruptKv(
                f"there is no host slot {slots[~is_valid][0]}: the pool has {self._plan.host_slots}"
            )
        return self._host_at + layer * self._plan.host_slots + slots

    def is_staging(self, slot: int) -> bool:
        return slot >= self._plan.first_staging_slot

    def describe(self, location: int) -> str:
        """A location for people."""
        plan = self._plan
        if location >= self._host_at:
            layer, slot = divmod(location - self._host_at, plan.host_slots)
            return f"layer {layer} of host slot {slot}"
        if location >= self._ring_at:
            ring, slot = divmod(location - self._ring_at, plan.staging_slots)
            return f"ring buffer {ring} of staging slot {plan.first_staging_slot + slot}"
        layer, slot = divmod(location, plan.device_slots)
        return f"layer {layer} of device slot {slot}"

    # --- what happens to them ---------------------------------------------------------------

    def begin(self, operation: Operation) -> None:
        """Start an operation; its reads and writes follow."""
        if self.order is not None:
            self.order.begin(
                operation.stream, operation.label, (operation.start_s, operation.end_s)
            )

    def read(self, operation: Operation, locations: Locations) -> Locations:
        """Read; returns the tags found by virtual time, whatever they are.

        Raises:
            UnorderedAccess: nothing orders it after the last write.
        """
        if self.order is not None:
            self.order.read(operation.stream, locations)
        is_early = operation.start_s < self._written_at_s[locations]
        found: Locations = np.where(is_early, self._tags_before[locations], self._tags[locations])
        self._read_until_s[operation.stream, locations] = operation.end_s
        return found

    def found_owner(self, operation: Operation, location: int) -> str:
        """What a read of that operation finds there, for people."""
        written_at_s = float(self._written_at_s[location])
        if operation.start_s < written_at_s:
            old = describe_contents(int(self._owners_before[location]))
            new = describe_contents(int(self._owners[location]))
            return (
                f"{old}: {new} will be there at {written_at_s:.9f} s, but the read starts at "
                f"{operation.start_s:.9f} s"
            )
        return describe_contents(int(self._owners[location]))

    def owner(self, location: int) -> int:
        return int(self._owners[location])

    def tag(self, location: int) -> int:
        return int(self._tags[location])

    def write(
        self, operation: Operation, locations: Locations, tags: Locations, owners: Locations
    ) -> None:
        """Write; readers from `operation.end_s` on find the new tags.

        Raises:
            UnorderedAccess: nothing orders it after the last accesses.
            CorruptKv: it starts before an earlier access has ended.
        """
        if self.order is not None:
            self.order.write(operation.stream, locations)
        busy_until_s = self._written_at_s[locations]
        for other in range(len(STREAMS)):
            if other != operation.stream:  # a stream's own reads end before its next write
                busy_until_s = np.maximum(busy_until_s, self._read_until_s[other, locations])
        is_early = operation.start_s < busy_until_s
        if is_early.any():
            at = int(is_early.argmax())
            location = int(locations[at])
            raise CorruptKv(
                f"{operation.label} overwrites {self.describe(location)} at "
                f"{operation.start_s:.9f} s with {describe_contents(int(owners[at]))}, while it "
                f"is in use until {float(busy_until_s[at]):.9f} s for "
                f"{describe_contents(self.owner(location))}"
            )
        self._tags_before[locations] = self._tags[locations]
        self._owners_before[locations] = self._owners[locations]
        self._tags[locations] = tags
        self._owners[locations] = owners
        self._written_at_s[locations] = operation.end_s

    def copy(self, operation: Operation, sources: Locations, destinations: Locations) -> None:
        """Copy location by location.

        Raises:
            UnorderedAccess, CorruptKv: as `write`; a source is not written yet.
        """
        tags = self.read(operation, sources)
        is_early = operation.start_s < self._written_at_s[sources]
        if is_early.any():
            location = int(sources[is_early.argmax()])
            raise CorruptKv(
                f"{operation.label} copies {self.describe(location)} too early: it finds "
                f"{self.found_owner(operation, location)}"
            )
        self.write(operation, destinations, tags, self._owners[sources])

    def spoil(self, locations: Locations, by: np.int64) -> None:
        """What was just written there is another thing than it should be."""
        self._tags[locations] += by

    # --- order ------------------------------------------------------------------------------

    def record(self, stream: int) -> Clock:
        return () if self.order is None else self.order.record(stream)

    def wait(self, stream: int, recorded: Clock) -> None:
        if self.order is not None:
            self.order.wait(stream, recorded)

    def observe(self, recorded: Clock) -> None:
        if self.order is not None:
            self.order.observe(recorded)

    def host_issues(self) -> None:
        if self.order is not None:
            self.order.host_issues()


def slots_array(slots: Sequence[int]) -> Locations:
    """Slot numbers as the arrays that `SimMemory` works on."""
    return np.array(slots, np.int64)
