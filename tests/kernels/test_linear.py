"""Linear layers for few tokens: every implementation against float64."""

from __future__ import annotations

import pytest
import torch

from pie_async.cuda.kernels.linear import (
    MAX_TOKENS,
    TORCH,
    candidates,
    linear,
    linear_reference,
)

TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SHAPES = [(1, 64, 256), (1, 37, 301), (3, 200, 304), (16, 65, 129), (33, 96, 512), (70, 300, 640)]
CHOICES = [
    ("rows", 4, 128, 4, 1),
    ("rows", 8, 64, 4, 3),
    ("split", 16, 64, 64, 4, 3, 1),
    ("split", 16, 64, 64, 4, 3, 4),
    ("split", 32, 64, 128, 4, 3, 3),
    ("split", 64, 64, 64, 4, 3, 100),
]

on_interpreter = not torch.cuda.is_available()


def operands(m: int, n: int, k: int, dtype, device, *, apart: int = 0, has_bias: bool = False):
    """x [m, k] with its rows `apart` numbers further apart than need be, weight, bias."""
    x = torch.randn(m, k + apart, device=device).to(dtype)[:, :k]
    weight = torch.randn(n, k, device=device).to(dtype)
    bias = torch.randn(n, device=device).to(dtype) if has_bias else None
    if x.is_cuda:
        torch.cuda.synchronize()  # a weight must not be in the making
    return x, weight, bias


def relative_error(actual: torch.Tensor, x, weight, bias) -> float:
    wide = [None if each is None else each.double() for each in (x, weight, bias)]
    expected = linear_reference(*wide)
    return ((actual.double() - expected).norm() / expected.norm()).item()


def supported(choice, dtype) -> bool:
    # The interpreter's dot reads bfloat16 as the integers it keeps it in.
    return not (on_interpreter and choice[0] == "split" and dtype == torch.bfloat16)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_product(m, n, k, choice, dtype, device) -> None:
    if not supported(choice, dtype):
        pytest.skip("not in the interpreter")
    given = operands(m, n, k, dtype, device, apart=8 if m % 2 else 0, has_bias=n % 2 == 0)
    assert relative_error(linear(*given, choice=choice), *given) < TOLERANCE[dtype]


@pytest.mark.parametrize("m", [1, 2, 40, 64, 200])
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_candidate_gives_the_product_and_the_same_bits_again(m, has_bias, device) -> None:
    dtype = torch.float16
    n, k = (768, 2048) if device.type == "cuda" else (80, 256)
    given = operands(m, n, k, dtype, device, apart=64, has_bias=has_bias)
    for choice in candidates(m, n, k, dtype):
        product = linear(*given, choice=choice)
        assert relative_error(product, *given) < TOLERANCE[dtype], choice
        assert torch.equal(product, linear(*given, choice=choice)), choice


@pytest.mark.parametrize(
    "choice", [("rows", 4, 128, 4, 1), ("split", 16, 64, 64, 4, 3, 2), ("lt", "00" * 64)], ids=str
)
def test_a_choice_that_does_not_fit_is_torchs(choice, device) -> None:
    x, weight, _ = operands(3, 40, 64, torch.float32, device)
    transposed = weight.t().contiguous().t()
    expected = torch.nn.functional.linear(x, transposed)
    assert torch.equal(linear(x, transposed, choice=choice), expected)
    assert linear(x[:0], transposed, choice=choice).shape == (0, 40)


def test_candidates_begin_with_torch_and_are_few() -> None:
    for m in (1, 7, 64, MAX_TOKENS):
        proposed = candidates(m, 4096, 4096, torch.bfloat16)
        assert proposed[0] == TORCH
        assert len(set(proposed)) == len(proposed) <= 40
    assert candidates(MAX_TOKENS + 1, 4096, 4096, torch.bfloat16) == [TORCH]
    assert candidates(1, 4096, 4096, torch.float32) == [TORCH]


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 16, 64])
def test_candidates_replay_within_a_graph(m) -> None:
    device = torch.device("cuda")
    x, weight, _ = operands(m, 768, 2048, torch.bfloat16, device)
    for choice in candidates(m, 768, 2048, torch.bfloat16):
        linear(x, weight, choice=choice)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            product = linear(x, weight, choice=choice)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert relative_error(product, x, weight, None) < TOLERANCE[torch.bfloat16], choice
