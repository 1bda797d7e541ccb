"""Split, norm per head, rotation and KV write against plain torch."""

from __future__ import annotations

import pytest
import torch

from pie_async.cuda.kernels.qkv import rotate_and_store, rotate_and_store_reference

TOLERANCE = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 5e-2}
"""Triton's interpreter rounds to bfloat16 towards zero."""
EPS = 1e-6
SHAPES = [
    pytest.param(8, 2, 32, 16, id="grouped"),
    pytest.param(3, 3, 80, 4, id="one-head-each"),
    pytest.param(7, 1, 24, 1, id="odd"),
    pytest.param(14, 2, 128, 2, id="wide"),
]

shapes = pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_tokens"), SHAPES)
dtypes = pytest.mark.parametrize("dtype", TOLERANCE)
SLOTS = 9


def random_rotation(rows: int, dim: int, dtype: torch.dtype, device: torch.device):
    """Like `Rotary.factors`, positions and frequencies at random."""
    angles = 6.0 * torch.rand(rows, dim // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    return (
        torch.cat((cos, cos), 1).to(dtype).unsqueeze(1),
        torch.cat((-sin, sin), 1).to(dtype).unsqueeze(1),
    )


def random_places(rows: int, block_tokens: int, device: torch.device) -> torch.Tensor:
    """Distinct, strewn over the slots; every third one padding."""
    places = torch.randperm(SLOTS * block_tokens)[:rows].to(device)
    places[2::3] = -1
    return places


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def check(rows, heads, kv_heads, dim, block_tokens, dtype, device, *, rotated, normed, apart=0):
    width = (heads + 2 * kv_heads) * dim
    qkv = torch.randn(rows, width + 2 * apart, device=device).to(dtype)[:, apart : apart + width]
    # NaN where nothing is written: what is must be exactly that.
    kv = torch.full((SLOTS, 2, kv_heads, block_tokens, dim), torch.nan, device=device).to(dtype)
    expected_kv = kv.clone()
    places = random_places(rows, block_tokens, device)
    q_norm, k_norm = (
        (1.0 + 0.3 * torch.randn(2, dim, device=device)).to(dtype) if normed else (None, None)
    )
    options = {
        "num_heads": heads,
        "rotation": random_rotation(rows, dim, dtype, device) if rotated else None,
        "q_norm": q_norm,
        "k_norm": k_norm,
        "eps": EPS,
    }
    expected = rotate_and_store_reference(qkv, places, expected_kv, **options)
    actual = rotate_and_store(qkv, places, kv, **options)
    assert actual.shape == (rows, heads, dim)
    assert actual.is_contiguous()
    assert_close(actual, expected)
    assert_close(kv, expected_kv)
    # Values are copied, and so is everything that is neither normed nor rotated.
    assert torch.equal(kv[:, 1].nan_to_num(7.0), expected_kv[:, 1].nan_to_num(7.0))
    if not rotated and not normed:
        assert torch.equal(actual, expected)


@shapes
@dtypes
@pytest.mark.parametrize("normed", [False, True], ids=["", "normed"])
@pytest.mark.parametrize("rotated", [False, True], ids=["", "rotated"])
def test_all_parts(heads, kv_heads, dim, block_tokens, dtype, rotated, normed, device) -> None:
    shape = (heads, kv_heads, dim, block_tokens)
    check(5, *shape, dtype, device, rotated=rotated, normed=normed)


@dtypes
@pytest.mark.parametrize("apart", [1, 8])
def test_a_slice_of_something_wider(apart, dtype, device) -> None:
    check(4, 4, 2, 40, 4, dtype, device, rotated=True, normed=True, apart=apart)


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows, device) -> None:
    check(rows, 4, 2, 64, 4, torch.float16, device, rotated=True, normed=False)


def test_rotates_like_the_decoder(device) -> None:
    pytest.importorskip("msgspec")
    from pie_async.model.rope import Rotary, rotate
    from pie_async.model.rope_config import RopeConfig

    rope = RopeConfig(kind="default", theta=1e4, trained_positions=2048)
    positions = torch.tensor([0, 3, 700], device=device)
    rotation = Rotary(rope, 64, torch.float32, device).factors(positions)
    qkv = torch.randn(3, 4 * 64, device=device)
    kv = torch.zeros(3, 2, 1, 16, 64, device=device)
    places = torch.tensor([0, 17, 40], device=device)
    queries = rotate_and_store(
        qkv, places, kv, num_heads=2, rotation=rotation, q_norm=None, k_norm=None, eps=0.0
    )
    expected = rotate(qkv.view(3, 4, 64)[:, :3], *rotation)
    assert_close(queries, expected[:, :2])
    assert_close(kv[[0, 1, 2], 0, 0, [0, 1, 8]], expected[:, 2])
    assert torch.equal(kv[[0, 1, 2], 1, 0, [0, 1, 8]], qkv.view(3, 4, 64)[:, 3])


def test_kv_beyond_32_bits(device) -> None:
    if device.type == "cpu":
        pytest.skip("takes 8 GiB")
    kv = torch.empty(2**31 // 2048 + 2, 2, 4, 16, 16, dtype=torch.float16, device=device)
    place = torch.tensor([len(kv) * 16 - 1], device=device)
    qkv = torch.randn(1, 16 * 16, device=device).half()
    rotate_and_store(qkv, place, kv, num_heads=8, rotation=None, q_norm=None, k_norm=None, eps=0.0)
    assert torch.equal(kv[-1, :, :, -1].reshape(-1), qkv[0, 8 * 16 :])
