"""The cost model gives DESIGN section 2's numbers back, and its bound never promises more."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pie_async.device.cost_model import (
    CostModel,
    Work,
    gpu_named,
    link_named,
    pooling_bound,
    shape_named,
)
from pie_async.errors import ConfigError

KIB, MIB = 2**10, 2**20
LLAMA = CostModel(
    gpu=gpu_named("h200"), link=link_named("pcie5"), shape=shape_named("llama-3.1-8b")
)
STEP = Work.decode(64, 1024)


def test_llama_8b_has_the_weights_and_the_kv_it_should_have():
    assert LLAMA.shape.weight_bytes == pytest.approx(15e9, rel=0.01)
    assert LLAMA.shape.token_layer_kv_bytes * 32 == 131072


def test_the_roofline_of_the_design_is_reproduced():
    assert LLAMA.roofline_s(STEP) == pytest.approx(5.6e-3, rel=0.01)


def prompts(number: int, tokens: int) -> Work:
    in_all = number * tokens
    return Work(in_all, in_all, in_all * (tokens + 1) / 2, number)


@pytest.mark.parametrize(
    ("model", "work", "measured_ms", "error"),
    [
        ("llama-3.1-8b", Work.decode(1, 1024), 4.219, 0.02),
        ("llama-3.1-8b", Work.decode(64, 1024), 6.82, 0.02),
        ("llama-3.1-8b", Work.decode(256, 512), 11.8, 0.02),
        ("opt-13b", Work.decode(16, 1024), 11.2, 0.03),
        ("qwen2.5-32b", Work.decode(6, 500), 17.33, 0.02),
        ("llama-3.1-8b", prompts(8, 1024), 188, 0.05),
        ("llama-3.1-8b", prompts(8, 2048), 403, 0.08),
        ("llama-3.1-8b", prompts(1, 8192), 237, 0.06),
    ],
)
def test_an_iteration_takes_what_was_measured_with_everything_resident(
    model: str, work: Work, measured_ms: float, error: float
):
    """docs/performance.md and docs/evaluation.md."""
    cost = CostModel(gpu=gpu_named("h200"), link=link_named("pcie5"), shape=shape_named(model))
    assert cost.iteration_s(work) == pytest.approx(measured_ms * 1e-3, rel=error)


@pytest.mark.parametrize(
    ("link", "streamed_gb", "longer_ms"),
    [("pcie5", 0.17, 0.09), ("pcie5", 0.26, 0.13), ("nvlink", 1.65, 0.44)],
)
def test_hidden_staging_slows_a_step_as_measured(link: str, streamed_gb: float, longer_ms: float):
    cost = CostModel(gpu=LLAMA.gpu, link=link_named(link), shape=LLAMA.shape)
    longer_s = cost.iteration_s(STEP, int(streamed_gb * 1e9)) - cost.iteration_s(STEP)
    assert longer_s == pytest.approx(longer_ms * 1e-3, rel=0.15)


@pytest.mark.parametrize(
    ("block_bytes", "num_blocks", "measured_gb_per_s"),
    [(64 * KIB, 1024, 38), (MIB, 256, 53), (256 * MIB, 1, 55)],
)
def test_batched_copies_reach_the_measured_rates(
    block_bytes: int, num_blocks: int, measured_gb_per_s: float
):
    copy_s = LLAMA.copy_s(block_bytes * num_blocks, num_blocks)
    assert block_bytes * num_blocks / copy_s / 1e9 == pytest.approx(measured_gb_per_s, rel=0.03)


def test_a_long_prefill_is_bound_by_flops_and_a_decode_by_bytes():
    prefill = Work(8192, 8192, 8192 * 4096.5, 1)
    flops = 2 * LLAMA.shape.layer_parameters * 32 * 8192
    assert LLAMA.iteration_s(prefill) > flops / 989e12
    assert LLAMA.iteration_s(Work.decode(1, 1)) == pytest.approx(
        LLAMA.iteration_s(Work.decode(8, 1)), rel=0.01
    )


@pytest.mark.parametrize(
    ("link_to_hbm", "kv_share", "ratio", "gain"),
    [
        (0.013, 20, 1.28, 1.25),
        (0.013, 10, 1.15, 1.12),
        (0.013, 5, 1.08, 1.05),
        (0.013, 2, 1.04, 1.01),
        (0.094, 20, 3.4, 2.8),
        (0.094, 10, 2.3, 1.85),
        (0.094, 5, 1.7, 1.37),
        (0.094, 2, 1.35, 1.09),
    ],
)
def test_the_bound_reproduces_the_published_table(
    link_to_hbm: float, kv_share: int, ratio: float, gain: float
):
    bound = pooling_bound(1.0, 1.0 / kv_share, link_to_hbm)
    assert bound.expansion_ratio == pytest.approx(ratio, rel=0.02)
    assert bound.throughput_gain == pytest.approx(gain, rel=0.02)


@given(
    weights=st.floats(1e6, 1e12), kv_share=st.floats(0.01, 1.0), link_to_hbm=st.floats(0.001, 0.4)
)
def test_bytes_at_the_bound_take_the_link_exactly_one_iteration(
    weights: float, kv_share: float, link_to_hbm: float
):
    for is_staged, crossings in ((True, 2), (False, 1)):
        bound = pooling_bound(weights, weights * kv_share, link_to_hbm, is_staged=is_staged)
        iteration = weights * (1 + kv_share) + crossings * bound.streamed_bytes
        assert bound.streamed_bytes == pytest.approx(link_to_hbm * iteration)


def test_reading_the_pool_in_place_moves_the_bound_up():
    staged = pooling_bound(20, 1, 0.094)
    in_place = pooling_bound(20, 1, 0.094, is_staged=False)
    assert in_place.throughput_gain > staged.throughput_gain
    assert in_place.streamed_bytes == pytest.approx(0.094 * 21 / (1 - 0.094))


def test_a_link_as_fast_as_memory_has_no_bound_on_bytes_but_one_on_gain():
    bound = pooling_bound(20, 1, 0.5)
    assert bound.streamed_bytes == math.inf
    assert bound.throughput_gain == pytest.approx(21 / 2)


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"no GPU named 'h900'; known are h200, h100") as refused:
        gpu_named("h900")
    assert refused.value.option == "sim_gpu"
    with pytest.raises(ConfigError, match="pcie5"):
        link_named("usb")
    with pytest.raises(ConfigError, match=r"qwen2\.5-32b"):
        shape_named("gpt-9")
