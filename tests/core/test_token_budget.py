"""Token budgets from an ITL target."""

import pytest

from pie_async.core.token_budget import (
    ATTENTION_SHARE,
    LEAST_PREFILL_TOKENS,
    UNLIMITED_TOKENS,
    IterationCost,
    tokens_within,
)
from pie_async.errors import ConfigError

H200_8B = IterationCost(
    weight_bytes=15_000_000_000,
    kv_bytes=8_600_000_000,
    flops_per_token=16e9,
    read_bytes_per_s=4.2e12,
    flops_per_s=790e12,
)


def test_a_busy_decode_iteration_takes_what_it_reads():
    assert H200_8B.decode_s == pytest.approx(5.62e-3, rel=1e-2)


def test_what_is_left_beside_decoding_is_prefill():
    budget = tokens_within(0.05, H200_8B, decode_rows=64)
    left_s = 0.05 - H200_8B.decode_s
    assert budget - 64 == pytest.approx((1 - ATTENTION_SHARE) * left_s * 790e12 / 16e9, abs=1)


def test_a_longer_target_never_gives_fewer_tokens_and_there_is_a_most():
    budgets = [tokens_within(ms / 1e3, H200_8B, decode_rows=256) for ms in range(5, 500, 5)]
    assert budgets == sorted(budgets)
    assert budgets[-1] == UNLIMITED_TOKENS


def test_prompts_get_on_even_where_decoding_alone_takes_the_target():
    assert tokens_within(0.005, H200_8B, decode_rows=64) == 64 + LEAST_PREFILL_TOKENS


def test_a_target_below_the_time_to_read_the_weights_is_refused():
    with pytest.raises(ConfigError, match=r"reading the weights takes 0\.0036 s") as caught:
        tokens_within(0.003, H200_8B, decode_rows=64)
    assert caught.value.option == "itl_target_s"
