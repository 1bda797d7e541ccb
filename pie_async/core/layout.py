"""KV shapes, their bytes, and the split of layers into groups."""

from __future__ import annotations

import msgspec


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
    layer_group: int = 1
    """Adjacent layers that are staged and awaited as one."""
    ring_depth: int = 3
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
    def num_groups(self) -> int:
        return -(-self.num_layers // self.layer_group)

    @property
    def ring_layers(self) -> int:
        """Physical one-layer buffers of the staging ring."""
        return self.ring_depth * self.layer_group

    def group(self, index: int) -> range:
        """The layers of a group; the last group may be shorter."""
        first = index * self.layer_group
        return range(first, min(first + self.layer_group, self.num_layers))

    @property
    def stacks(self) -> list[range]:
        """Adjacent layers that lie side by side in every slot: a group's, or each by itself."""
        if self.is_stacked:
            return [self.group(index) for index in range(self.num_groups)]
        return [range(layer, layer + 1) for layer in range(self.num_layers)]

    def ring_buffer(self, layer: int) -> int:
        """The ring buffer through which a layer's streamed blocks pass."""
        return layer % self.ring_layers

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_tokens)
