"""Checksums of blocks: right for what came back as it went, wrong for anything else."""

from __future__ import annotations

import pytest
import torch

from pie_async.cuda.checksums import MOST_AT_ONCE, Checksums
from pie_async.messages import CopyRun

LAYERS, SLOTS, HOST_SLOTS = 3, 80, 90


@pytest.fixture
def layers() -> list[torch.Tensor]:
    """Two layers side by side in every slot, and one by itself."""
    torch.manual_seed(1)
    stacked = torch.randn(SLOTS, 2, 2, 2, 4, 8).to(torch.bfloat16)
    return [*stacked.unbind(1), torch.randn(SLOTS, 2, 2, 4, 8).to(torch.bfloat16)]


def wrong(sums: Checksums, layers: range, *runs: CopyRun) -> list[int]:
    return [
        slot
        for slots, is_wrong in sums.compare(layers, runs)
        for slot, wrong in zip(slots, is_wrong, strict=True)
        if wrong
    ]


def test_blocks_that_come_back_elsewhere_are_right_in_every_layer(layers):
    sums = Checksums(layers, host_slots=HOST_SLOTS)
    out = CopyRun(host_slot=3, device_slot=0, count=MOST_AT_ONCE + 2)
    sums.remember(range(LAYERS), [out])
    for layer in layers:
        layer.copy_(layer.roll(7, 0))
    back = CopyRun(host_slot=3, device_slot=7, count=MOST_AT_ONCE + 2)
    assert [wrong(sums, range(number, number + 1), back) for number in range(LAYERS)] == [[]] * 3


@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_number_that_differs_is_found_where_it_is(layers, layer: int):
    sums = Checksums(layers, host_slots=HOST_SLOTS)
    run = CopyRun(host_slot=10, device_slot=20, count=5)
    sums.remember(range(LAYERS), [run])
    layers[layer][22, 1, 0, 3, 5] += 1
    assert wrong(sums, range(LAYERS), run) == [12]
    assert wrong(sums, range(layer, layer + 1), run) == [12]
    others = [number for number in range(LAYERS) if number != layer]
    assert [wrong(sums, range(other, other + 1), run) for other in others] == [[], []]


def test_what_was_shifted_or_belongs_to_another_block_is_found(layers):
    sums = Checksums(layers, host_slots=HOST_SLOTS)
    sums.remember(range(LAYERS), [CopyRun(host_slot=0, device_slot=0, count=3)])
    flat = layers[2][1].flatten()
    layers[2][1] = flat.roll(2).view_as(layers[2][1])
    assert wrong(sums, range(LAYERS), CopyRun(host_slot=0, device_slot=0, count=3)) == [1]
    assert wrong(sums, range(LAYERS), CopyRun(host_slot=0, device_slot=2, count=1)) == [0]


def test_what_never_went_out_is_right_and_the_last_that_went_counts(layers):
    sums = Checksums(layers, host_slots=HOST_SLOTS)
    run = CopyRun(host_slot=5, device_slot=1, count=1)
    assert wrong(sums, range(LAYERS), run) == []
    sums.remember(range(LAYERS), [run])
    sums.remember(range(LAYERS), [CopyRun(host_slot=5, device_slot=2, count=1)])
    assert wrong(sums, range(LAYERS), run) == [5]
