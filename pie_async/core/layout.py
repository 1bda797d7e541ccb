"""KV shapes, their bytes, and the split of layers into groups."""

from __future__ import annotations

import msgspec

BOUNDARY_SHARE = 0.01
"""Part of the shortest iteration that going from group to group may cost."""
FEWEST_GROUPS, MOST_GROUPS = 4, 8
"""Between these the cost decides: with fewer a ring of two takes more than half of what is
streamed; with more a block of a group becomes so small that copying it alone costs twice its bytes
(two H200s: 256 KiB at 196 GB/s, of 385)."""


class KvLayout(msgspec.Struct, frozen=True, kw_only=True):
    """How one model's KV is cut into blocks and layers.

    One layer of one block is a contiguous [2, kv_heads, block_tokens, head_dim]: keys, then
    values. A block has the same slot number in every layer.
    """

    num_layers: int
    block_tokens: int
    kv_heads: int
    head_dim: int
    item_bytes: int
    """Bytes of one number: 4 for float32, 2 for float16 and bfloat16."""
    num_groups: int
    """Groups of adjacent layers, each staged and awaited as one; as equal as can be."""
    ring_depth: int
    """Staging buffers, each holding one layer group's staged blocks."""
    is_stacked: bool = False
    """Whether the layers of a group lie side by side in every slot, so that a block of a group is
    one copy, not one for each layer."""

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of one block in one layer."""
        return 2 * self.block_tokens * self.kv_heads * self.head_dim * self.item_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.num_layers * self.layer_block_bytes

    @property
    def largest_group(self) -> int:
        """Layers of the largest group; the others have one less at most."""
        return -(-self.num_layers // self.num_groups)

    @property
    def ring_layers(self) -> int:
        """Physical one-layer buffers of the staging ring."""
        return self.ring_depth * self.largest_group

    def group(self, index: int) -> range:
        """The layers of a group."""
        layers, groups = self.num_layers, self.num_groups
        return range(index * layers // groups, (index + 1) * layers // groups)

    def group_of(self, layer: int) -> int:
        """The group that a layer belongs to."""
        return ((layer + 1) * self.num_groups - 1) // self.num_layers

    @property
    def stacks(self) -> list[range]:
        """Adjacent layers that lie side by side in every slot: a group's, or each by itself."""
        if self.is_stacked:
            return [self.group(index) for index in range(self.num_groups)]
        return [range(layer, layer + 1) for layer in range(self.num_layers)]

    def ring_buffer(self, layer: int) -> int:
        """The ring buffer through which a layer's streamed blocks pass."""
        group = self.group_of(layer)
        first = group % self.ring_depth * self.largest_group
        return first + layer - self.group(group).start

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_tokens)


def count_groups(num_layers: int, wanted: int, ring_depth: int) -> int:
    """How many layer groups to make: as many as wanted, or one more or less.

    Where the ring's depth leaves 1 of them over, the first group of an iteration shares its buffer
    with the last one of the iteration before and cannot be staged until that is computed: 18 % of
    the throughput, simulated. One group more then, or where every layer is one already, one less.
    """
    groups = min(wanted, num_layers)
    if groups % ring_depth != 1 or num_layers == 1:
        return groups
    return groups + 1 if groups < num_layers else groups - 1


def affordable_groups(boundary_s: float, iteration_s: float) -> int:
    """How many layer groups are worth what they cost: more make the staging ring smaller.

    Args:
        boundary_s: what going from one group to the next takes.
        iteration_s: the shortest iteration.
    """
    affordable = int(BOUNDARY_SHARE * iteration_s / boundary_s)
    return max(FEWEST_GROUPS, min(affordable, MOST_GROUPS))
