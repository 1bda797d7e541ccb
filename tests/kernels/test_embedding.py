"""The embedding, with and without learned positions, against plain torch."""

from __future__ import annotations

import pytest
import torch

from pie_async.cuda.kernels.embedding import embed, embed_reference

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


def table_of(rows: int, hidden: int, dtype: torch.dtype, device: torch.device, apart: int = 0):
    return torch.randn(rows, hidden + apart, device=device).to(dtype)[:, :hidden]


@dtypes
@pytest.mark.parametrize(
    ("rows", "hidden", "apart"), [(1, 64, 0), (7, 100, 0), (5, 1025, 3), (2, 2048, 16)]
)
def test_rows_of_the_table(rows, hidden, apart, dtype, device) -> None:
    table = table_of(50, hidden, dtype, device, apart)
    token_ids = torch.randint(50, (rows,), device=device)
    assert torch.equal(embed(token_ids, table), embed_reference(token_ids, table))


@dtypes
@pytest.mark.parametrize(("hidden", "apart"), [(64, 0), (77, 5)])
def test_learned_positions(hidden, apart, dtype, device) -> None:
    table = table_of(50, hidden, dtype, device)
    learned = table_of(34, hidden, dtype, device, apart)
    token_ids = torch.randint(50, (6,), device=device)
    positions = torch.tensor([0, 31, 7, -1, 8, -1], dtype=torch.int32, device=device)
    actual = embed(token_ids, table, positions, learned, 2)
    expected = embed_reference(token_ids, table, positions, learned, 2)
    if dtype == torch.bfloat16 and device.type == "cpu":  # where rounding is towards zero
        torch.testing.assert_close(actual, expected)
    else:
        assert torch.equal(actual, expected)


def test_ids_anywhere_in_a_buffer(device) -> None:
    table = table_of(9, 32, torch.float16, device)
    buffer = torch.randint(9, (11,), device=device)
    assert torch.equal(embed(buffer[3:], table), table[buffer[3:]])


def test_no_tokens(device) -> None:
    table = table_of(9, 32, torch.float16, device)
    assert embed(torch.empty(0, dtype=torch.int64, device=device), table).shape == (0, 32)
