"""Block-table updates, token ids and places, and remembered tokens, against plain torch."""

from __future__ import annotations

import pytest
import torch

from pie_async.cuda.kernels.inputs import (
    apply_updates,
    apply_updates_reference,
    remember,
    remember_reference,
    resolve,
    resolve_reference,
)

LANES, MAX_BLOCKS = 12, 7
counts = pytest.mark.parametrize("count", [0, 1, 5, 130])


def int32(values, device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def random_tables(device: torch.device) -> torch.Tensor:
    return torch.randint(1000, (LANES + 1, MAX_BLOCKS), dtype=torch.int32, device=device)


@pytest.mark.parametrize("count", [0, 1, 5, 84])
@pytest.mark.parametrize("padding", [0, 1, 200])
def test_updates(count, padding, device) -> None:
    tables = random_tables(device)
    where = torch.randperm(LANES * MAX_BLOCKS)[:count].tolist() + [-1] * padding
    slots = torch.randint(1000, 2000, (len(where),)).tolist()
    # As in an upload buffer: behind other numbers.
    buffer = int32([9, 9, 9, *(n for pair in zip(where, slots, strict=True) for n in pair)], device)
    updates = buffer[3:].view(-1, 2)
    expected = tables.clone()
    apply_updates_reference(expected, updates)
    apply_updates(tables, updates)
    assert torch.equal(tables, expected)
    for index, slot in zip(where[:count], slots, strict=False):
        assert tables.view(-1)[index] == slot


@counts
@pytest.mark.parametrize("block_tokens", [1, 16])
def test_resolve(count, block_tokens, device) -> None:
    tables = random_tables(device)
    last_tokens = torch.randint(10**6, (LANES + 1,), device=device)
    fed = torch.randint(10**5, (count,))
    is_last, is_padding = torch.rand(2, count) < 0.3
    lanes = torch.randint(LANES, (count,)).masked_fill(is_padding, LANES)
    positions = torch.randint(MAX_BLOCKS * block_tokens, (count,)).masked_fill(is_padding, -1)
    buffer = torch.stack((fed.masked_fill(is_last, -1), positions, lanes)).int().to(device)
    tokens, positions, lanes = buffer.unbind(0)
    actual = resolve(tokens, lanes, positions, last_tokens, tables, block_tokens)
    expected = resolve_reference(tokens, lanes, positions, last_tokens, tables, block_tokens)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == torch.int64
        assert torch.equal(mine, theirs)


def test_resolve_by_hand(device) -> None:
    tables = torch.zeros(3, 4, dtype=torch.int32, device=device)
    tables[0] = int32([5, 9, 2, 0], device)
    tables[1] = int32([7, 2**30, 1, 0], device)
    last_tokens = torch.tensor([70, 71, 72], device=device)
    token_ids, places = resolve(
        int32([40, -1, 41, 0, -1], device),
        int32([0, 1, 0, 2, 2], device),
        int32([16, 31, 0, -1, -1], device),
        last_tokens,
        tables,
        16,
    )
    assert token_ids.tolist() == [40, 71, 41, 0, 0]
    assert places.tolist() == [9 * 16, 2**30 * 16 + 15, 5 * 16, -1, -1]


@counts
def test_remember(count, device) -> None:
    real = min(count, LANES)
    lanes = torch.randperm(LANES)[:real].tolist() + [LANES] * (count - real)
    lanes_there = int32([3, *lanes], device)[1:]
    tokens = torch.randint(10**6, (count,), device=device)
    last_tokens = torch.arange(LANES + 1, device=device)
    expected = last_tokens.clone()
    remember_reference(expected, lanes_there, tokens)
    remember(last_tokens, lanes_there, tokens)
    assert torch.equal(last_tokens, expected)
    assert last_tokens[LANES] == LANES
    assert all(last_tokens[lane] == tokens[i] for i, lane in enumerate(lanes[:real]))
