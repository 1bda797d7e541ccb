"""FP8 weights: quantising, and products of few tokens against float64."""

from __future__ import annotations

import pytest
import torch

from pie_async.cuda.kernels.fp8 import (
    FP8,
    SCALED,
    WIDENED,
    candidates_fp8,
    linear_fp8,
    linear_fp8_reference,
    quantize_rows,
    quantize_rows_reference,
)
from pie_async.cuda.kernels.linear import MAX_TOKENS

SHAPES = [(1, 64, 256), (1, 40, 304), (5, 80, 192), (20, 48, 512)]
CHOICES = [
    WIDENED,
    ("rows", 4, 128, 4, 1),
    ("split", 16, 64, 64, 4, 3, 1),
    ("split", 32, 64, 64, 4, 3, 3),
]


def operands(m: int, n: int, k: int, device, dtype=torch.float16):
    """x, weight and scale of a layer, and a bias."""
    x = torch.randn(m, k + 16, device=device).to(dtype)[:, :k]
    weight, scale = quantize_rows_reference(torch.randn(n, k, device=device))
    return x, weight, scale[:, 0].contiguous(), torch.randn(n, device=device).to(dtype)


def relative_error(actual: torch.Tensor, x, weight, scale, bias) -> float:
    expected = linear_fp8_reference(x.double(), weight, scale, bias.double())
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_product(m, n, k, choice, device) -> None:
    given = operands(m, n, k, device)
    assert relative_error(linear_fp8(*given, choice=choice), *given) < 2e-3


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 100), (7, 512)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_are_quantised_with_their_own_scale(rows, size, dtype, device) -> None:
    x = (torch.randn(rows, size + 8, device=device) * 100).to(dtype)[:, :size]
    x[0] = 0
    numbers, scales = quantize_rows(x)
    expected = quantize_rows_reference(x)
    assert numbers.dtype == FP8 and scales.shape == (rows, 1)
    torch.testing.assert_close(scales, expected[1])
    # A number in the middle of two may go either way: FP8 has steps of an eighth. And what
    # rounds up to a power of two, Triton's interpreter makes half of it.
    far = (numbers.float() - expected[0].float()).abs() > 0.13 * expected[0].float().abs() + 2e-3
    assert far.float().mean() <= (0.04 if device.type == "cpu" else 0.0)
    assert (numbers[0].float() == 0).all()


def test_candidates_begin_with_what_any_number_of_tokens_can_have() -> None:
    assert candidates_fp8(1, 4096, 4096)[0] == SCALED
    assert candidates_fp8(64, 4096, 4096, quantizes_activations=False)[0] == WIDENED
    assert candidates_fp8(MAX_TOKENS + 1, 4096, 4096) == [SCALED]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 16, 64, 600])
def test_every_candidate_is_near_the_product(m, dtype) -> None:
    given = operands(m, 768, 2048, torch.device("cuda"), dtype)
    for choice in candidates_fp8(m, 768, 2048):
        # Activations of three bits behind the point, when they are quantised.
        allowed = 0.05 if choice == SCALED else 6e-3
        assert relative_error(linear_fp8(*given, choice=choice), *given) < allowed, choice
