"""Activations, plain and gated, against plain torch."""

from __future__ import annotations

import pytest
import torch

from pie_async.cuda.kernels.activation import activate, activate_reference

TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}
"""Triton's interpreter rounds to bfloat16 towards zero."""

activations = pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "gelu_tanh"])
gates = pytest.mark.parametrize("is_gated", [False, True], ids=["plain", "gated"])


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@activations
@gates
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "inner", "apart"), [(1, 8, 0), (3, 65, 0), (2, 1023, 7), (4, 200, 16)]
)
def test_activate(rows, inner, apart, dtype, activation, is_gated, device) -> None:
    width = inner * (2 if is_gated else 1)
    x = (3.0 * torch.randn(rows, width + apart, device=device)).to(dtype)[:, :width]
    before = x.clone()
    actual = activate(x, activation, is_gated)
    assert actual.shape == (rows, inner)
    assert_close(actual, activate_reference(x, activation, is_gated))
    assert torch.equal(x, before)


@activations
def test_against_double_precision_to_the_ends(activation, device) -> None:
    x = torch.linspace(-60.0, 60.0, 2001, device=device).unsqueeze(0)
    expected = activate_reference(x.double(), activation, False).float()
    torch.testing.assert_close(activate(x, activation, False), expected, rtol=2e-6, atol=2e-6)


def test_the_gate_is_rounded_before_the_product(device) -> None:
    gates = torch.linspace(-4.0, 4.0, 512, device=device).half()
    ups = torch.full_like(gates, 1.0009765625)  # 1 + an ulp
    x = torch.cat((gates, ups)).unsqueeze(0)
    expected = torch.nn.functional.silu(gates) * ups
    # exp may differ by an ulp, which now and then turns a rounding.
    different = (activate(x, "silu", True)[0] != expected).float().mean()
    assert different < 0.01


def test_many_rows_use_larger_blocks(device) -> None:
    if device.type == "cpu":
        pytest.skip("takes too long in the interpreter")
    x = torch.randn(300, 2 * 14336, device=device).bfloat16()
    assert_close(activate(x, "silu", True), activate_reference(x, "silu", True))


@gates
def test_no_rows(is_gated, device) -> None:
    x = torch.empty(0, 64, device=device)
    assert activate(x, "silu", is_gated).shape == (0, 32 if is_gated else 64)


@pytest.mark.parametrize("activation", ["silu", "relu", "gelu", "gelu_tanh"])
def test_nan_stays(activation, device) -> None:
    x = torch.full((1, 16), torch.nan, device=device)
    assert activate(x, activation, False).isnan().all()
