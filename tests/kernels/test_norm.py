"""RMS norm and layer norm, alone and behind a residual sum, against plain torch."""

from __future__ import annotations

import pytest
import torch

from pie_async.cuda.kernels.norm import add_norm, add_norm_reference, norm, norm_reference

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}
"""Triton's interpreter rounds to bfloat16 towards zero."""
EPS = 1e-5

dtypes = pytest.mark.parametrize("dtype", TOLERANCE)
kinds = pytest.mark.parametrize(
    ("is_rms", "has_weight", "has_bias"),
    [(True, True, False), (True, False, False), (False, True, True), (False, False, False)],
    ids=["rms", "rms-plain", "layer", "layer-plain"],
)
shapes = pytest.mark.parametrize(("rows", "size"), [(1, 64), (3, 257), (5, 96), (2, 4097)])


def random_rows(rows: int, size: int, dtype: torch.dtype, device: torch.device, apart: int = 0):
    """[rows, size], the rows `apart` numbers further apart than need be."""
    x = 2.0 * torch.randn(rows, size + apart, device=device) + 0.5
    return x.to(dtype)[:, :size]


def parameters(size: int, has_weight: bool, has_bias: bool, dtype, device):
    weight = (1.0 + 0.3 * torch.randn(size, device=device)).to(dtype) if has_weight else None
    bias = torch.randn(size, device=device).to(dtype) if has_bias else None
    return weight, bias


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@dtypes
@kinds
@shapes
def test_norm(rows, size, is_rms, has_weight, has_bias, dtype, device) -> None:
    x = random_rows(rows, size, dtype, device)
    affine = parameters(size, has_weight, has_bias, dtype, device)
    before = x.clone()
    assert_close(
        norm(x, *affine, eps=EPS, is_rms=is_rms),
        norm_reference(x, *affine, eps=EPS, is_rms=is_rms),
    )
    assert torch.equal(x, before)


@dtypes
@kinds
@pytest.mark.parametrize("apart", [0, 3, 64])
def test_add_norm(apart, is_rms, has_weight, has_bias, dtype, device) -> None:
    x = random_rows(4, 200, dtype, device, apart)
    residual = random_rows(4, 200, dtype, device, 2 * apart)
    affine = parameters(200, has_weight, has_bias, dtype, device)
    expected_sum = residual.clone()
    expected = add_norm_reference(x, expected_sum, *affine, eps=EPS, is_rms=is_rms)
    actual = add_norm(x, residual, *affine, eps=EPS, is_rms=is_rms)
    if dtype == torch.bfloat16 and device.type == "cpu":
        assert_close(residual, expected_sum)
    else:
        assert torch.equal(residual, expected_sum)
    assert_close(actual, expected)


@kinds
def test_against_double_precision(is_rms, has_weight, has_bias, device) -> None:
    x = random_rows(3, 321, torch.float32, device)
    affine = parameters(321, has_weight, has_bias, torch.float32, device)
    wide = [None if each is None else each.double() for each in affine]
    expected = norm_reference(x.double(), *wide, eps=EPS, is_rms=is_rms)
    assert_close(norm(x, *affine, eps=EPS, is_rms=is_rms), expected.float())


def test_the_sum_is_rounded_before_the_norm(device) -> None:
    # 2048 + 1 is 2048 in float16, so the norm must not see the 1.
    residual = torch.full((1, 64), 2048.0, dtype=torch.float16, device=device)
    residual[0, 0] = 0.0
    x = torch.ones_like(residual)
    expected = norm_reference(residual + x, None, None, eps=EPS, is_rms=False)
    assert torch.equal((residual + x)[0, 1:], residual[0, 1:])
    assert_close(add_norm(x, residual, None, None, eps=EPS, is_rms=False), expected)


def test_layer_norm_around_a_large_mean(device) -> None:
    x = 1000.0 + torch.randn(2, 500, device=device)
    expected = norm_reference(x.double(), None, None, eps=EPS, is_rms=False).float()
    actual = norm(x, None, None, eps=EPS, is_rms=False)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_no_rows(device) -> None:
    x = torch.empty(0, 64, device=device)
    assert norm(x, None, None, eps=EPS, is_rms=True).shape == (0, 64)
    assert add_norm(x, x.clone(), None, None, eps=EPS, is_rms=True).shape == (0, 64)
