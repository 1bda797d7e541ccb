from __future__ import annotations

from pie_async.core.layout import KvLayout

LAYOUT = KvLayout(
    num_layers=7, block_tokens=16, kv_heads=2, head_dim=8, item_bytes=2, layer_group=3, ring_depth=2
)


def test_a_blocks_bytes_are_keys_and_values_of_all_layers():
    assert LAYOUT.layer_block_bytes == 2 * 16 * 2 * 8 * 2
    assert LAYOUT.block_bytes == 7 * LAYOUT.layer_block_bytes


def test_groups_cover_every_layer_once_and_the_last_may_be_short():
    groups = [LAYOUT.group(index) for index in range(LAYOUT.num_groups)]
    assert [len(group) for group in groups] == [3, 3, 1]
    assert [layer for group in groups for layer in group] == list(range(7))


def test_layers_of_a_group_have_buffers_of_their_own_and_wait_for_the_ring_to_come_round():
    assert LAYOUT.ring_layers == 6
    buffers = [LAYOUT.ring_buffer(layer) for layer in range(7)]
    assert len(set(buffers[:6])) == 6
    assert buffers[6] == buffers[0]


def test_a_partly_filled_block_counts_whole():
    assert [LAYOUT.blocks_for(n) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]
