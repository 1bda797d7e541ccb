from __future__ import annotations

import pytest

from pie_async.core.layout import KvLayout, affordable_groups, count_groups


def layout_of(num_layers: int, num_groups: int, ring_depth: int = 2) -> KvLayout:
    return KvLayout(
        num_layers=num_layers,
        block_tokens=16,
        kv_heads=2,
        head_dim=8,
        item_bytes=2,
        num_groups=num_groups,
        ring_depth=ring_depth,
    )


LAYOUT = layout_of(7, 3)


def test_a_blocks_bytes_are_keys_and_values_of_all_layers():
    assert LAYOUT.layer_block_bytes == 2 * 16 * 2 * 8 * 2
    assert LAYOUT.block_bytes == 7 * LAYOUT.layer_block_bytes


@pytest.mark.parametrize("num_layers", [1, 3, 7, 28, 32, 40, 61])
def test_groups_cover_every_layer_once_and_are_as_equal_as_can_be(num_layers: int):
    for num_groups in range(1, num_layers + 1):
        layout = layout_of(num_layers, num_groups)
        groups = [layout.group(index) for index in range(num_groups)]
        assert [layer for group in groups for layer in group] == list(range(num_layers))
        sizes = {len(group) for group in groups}
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == layout.largest_group
        for index, group in enumerate(groups):
            assert {layout.group_of(layer) for layer in group} == {index}


@pytest.mark.parametrize(("num_layers", "num_groups", "ring_depth"), [(7, 3, 2), (28, 8, 3)])
def test_layers_share_a_buffer_only_where_their_groups_are_a_ring_apart(
    num_layers: int, num_groups: int, ring_depth: int
):
    layout = layout_of(num_layers, num_groups, ring_depth)
    buffers = [layout.ring_buffer(layer) for layer in range(num_layers)]
    assert set(buffers) <= set(range(layout.ring_layers))
    for layer, buffer in enumerate(buffers):
        for other in range(layer):
            apart = layout.group_of(layer) - layout.group_of(other)
            if buffers[other] == buffer:
                assert apart % ring_depth == 0
                assert apart > 0


@pytest.mark.parametrize("ring_depth", [2, 3, 4])
def test_no_number_of_groups_leaves_the_ring_a_remainder_of_one(ring_depth: int):
    for num_layers in range(2, 100):
        for wanted in (1, 3, 7, 8, 9, num_layers):
            groups = count_groups(num_layers, wanted, ring_depth)
            assert groups % ring_depth != 1
            assert abs(groups - min(wanted, num_layers)) <= 1
            assert 2 <= groups <= num_layers


def test_more_groups_are_preferred_to_larger_ones():
    assert count_groups(28, 7, 2) == 8
    assert count_groups(64, 4, 3) == 5
    assert count_groups(64, 64, 3) == 63
    assert count_groups(28, 8, 2) == 8


def test_a_single_layer_is_a_group():
    assert count_groups(1, 8, 2) == 1


def test_a_partly_filled_block_counts_whole():
    assert [LAYOUT.blocks_for(n) for n in (0, 1, 16, 17, 32)] == [0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("boundary_s", "iteration_s", "groups"),
    [
        (4.3e-6, 3.3e-3, 7),  # 8B on an H200: 8, once the ring's depth has had its say
        (4.3e-6, 2.4e-3, 5),
        (4.3e-6, 13.4e-3, 8),  # 32B
        (40e-6, 3.3e-3, 4),
        (1e-9, 1.0, 8),
    ],
)
def test_more_groups_are_made_where_they_cost_little(
    boundary_s: float, iteration_s: float, groups: int
):
    assert affordable_groups(boundary_s, iteration_s) == groups
