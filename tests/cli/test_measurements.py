"""Latency statistics mean what the glossary says."""

import pytest

from pie_async.measurements import (
    Distribution,
    LatencyLimits,
    RequestTimes,
    percentile,
    summarize,
)


def request(submitted_s, arrivals, *, prompt_tokens=10):
    """`arrivals`: (time, tokens) in order; the request ends with the last."""
    times = RequestTimes(submitted_s=submitted_s, prompt_tokens=prompt_tokens)
    for at_s, tokens in arrivals:
        times.arrived(at_s, tokens)
    times.finished_s = arrivals[-1][0]
    return times


def test_ttft_tpot_itl_and_end_to_end_of_one_request():
    times = request(1.0, [(1.5, 1), (1.7, 1), (2.1, 2)])
    assert times.ttft_s == pytest.approx(0.5)
    assert times.e2e_s == pytest.approx(1.1)
    assert times.tpot_s == pytest.approx((1.1 - 0.5) / 3)
    assert times.itl_s == pytest.approx([0.2, 0.4, 0.0])


def test_a_single_token_has_no_time_per_output_token():
    assert request(0.0, [(1.0, 1)]).tpot_s is None


def test_percentiles_are_interpolated():
    values = [0.0, 1.0, 2.0, 10.0]
    assert percentile(values, 50) == 1.5
    assert percentile(values, 99) == pytest.approx(2 + 8 * 0.97)
    assert percentile([3.0], 99) == 3.0
    assert Distribution.of([]) is None


def test_rates_count_complete_requests_over_the_whole_run():
    failed = RequestTimes(submitted_s=0.0, prompt_tokens=99, error="refused")
    done = [request(0.0, [(1.0, 1), (2.0, 9)]), request(0.0, [(4.0, 10)])]
    summary = summarize([*done, failed], duration_s=4.0)
    assert (summary.requests, summary.failed) == (3, 1)
    assert summary.output_tokens_per_s == 5.0
    assert summary.total_tokens_per_s == 10.0
    assert summary.requests_per_s == 0.5
    assert summary.errors == {"refused": 1}
    assert summary.goodput_requests_per_s is None


def test_goodput_counts_requests_within_both_limits():
    requests = [
        request(0.0, [(0.5, 1), (1.0, 1)]),  # within both
        request(0.0, [(2.0, 1), (2.1, 1)]),  # late first token
        request(0.0, [(0.5, 1), (3.0, 1)]),  # slow after it
        request(0.0, [(0.5, 1)]),  # one token: no TPOT to break
    ]
    limits = LatencyLimits(ttft_s=1.0, tpot_s=1.0)
    summary = summarize(requests, duration_s=2.0, limits=limits)
    assert summary.goodput_requests_per_s == 1.0
    assert summary.goodput_share == 0.5


def test_a_run_without_a_complete_request_has_no_latencies():
    summary = summarize([RequestTimes(submitted_s=0.0, prompt_tokens=1)], duration_s=0.0)
    assert summary.ttft_s is None
    assert summary.failed == 1
    assert summary.errors == {"ended without output": 1}
