"""The cases of scripts/bench_kernels: each is right at small sizes, and can be timed on a GPU."""

from __future__ import annotations

import pytest
import torch

from pie_async.cuda.kernels.decode_attention import DecodeConfig
from pie_async.cuda.kernels.prefill_attention import PrefillConfig
from scripts._bench_kernels import attention, elementwise, linear, timing

SIZES = elementwise.Sizes(hidden=64, inner=48, heads=4, kv_heads=2, head_dim=16, vocab=300)
LAYER = attention.Heads(4, 2, 16)
DTYPE = torch.float16
"""Triton's interpreter multiplies the bits of bfloat16 as integers."""


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(attention, "_DTYPE", DTYPE)
    for module in (attention, elementwise):
        monkeypatch.setattr(module, "num_copies", lambda num_bytes: 2)


def _check(case: timing.Case, device: torch.device) -> None:
    torch.manual_seed(0)
    assert case.error() < 1e-2
    if device.type == "cuda":
        row = timing.measure(case, replays=2)
        assert row.us is not None and not row.note


@pytest.mark.parametrize("name", elementwise.MAKERS)
def test_elementwise_cases_agree_with_their_references(name, device):
    data = elementwise.Data(SIZES, device, DTYPE)
    case = elementwise.case(name, elementwise.MAKERS[name], data, 5)
    assert case.num_bytes > 0 and len(case.works) == 2
    _check(case, device)


@pytest.mark.parametrize("contexts", [[40] * 3, [70, 3]])
def test_decode_cases_agree_with_the_reference(contexts, device):
    paged = attention.Paged(LAYER, contexts, device)
    config = DecodeConfig(16, 2, 2, 1)
    _check(attention.decode_case(LAYER, contexts, config, paged, num_programs=4), device)


@pytest.mark.parametrize("parts", [((40, 0),) * 2, ((9, 37),)])
def test_prefill_cases_agree_with_the_reference(parts, device):
    paged = attention.Paged(LAYER, [tokens + start for tokens, start in parts], device)
    _check(attention.prefill_case(LAYER, parts, PrefillConfig(16, 16, 4, 2), paged), device)


def test_every_candidate_of_a_product_is_a_case(device):
    weights = [torch.randn(96, 64, device=device, dtype=DTYPE) for _ in range(2)]
    cases = list(linear.shape_cases("small", weights, 3))
    kinds = {case.config.split()[0] for case in cases}
    assert kinds >= {"torch", "split"}
    for case in cases:
        _check(case, device)
