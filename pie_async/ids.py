"""Names for the integers that cross actor boundaries, so that none is taken for another."""

from typing import NewType

RequestId = NewType("RequestId", int)
SequenceId = NewType("SequenceId", int)
IterationId = NewType("IterationId", int)
BlockId = NewType("BlockId", int)

Lane = NewType("Lane", int)
"""A running sequence's row in the device's persistent tables (block table, sampling state)."""

DeviceSlot = NewType("DeviceSlot", int)
"""Index into a layer's address range [resident slots | staging slots]."""

HostSlot = NewType("HostSlot", int)
"""Index into the host pool, the same in every layer."""

MaskSlot = NewType("MaskSlot", int)
"""Index into the table of masks that say which tokens may be sampled."""
