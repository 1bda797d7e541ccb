"""The measurement of what the first requests after a start meet."""

from __future__ import annotations

import asyncio

import pytest

from pie_async.config import GIB, EngineConfig
from scripts import bench_cold

pytestmark = pytest.mark.realtime


def test_all_requests_of_the_first_moments_are_followed_to_their_ends(monkeypatch) -> None:
    monkeypatch.setattr(bench_cold, "OUTPUT_TOKENS", (3, 6))
    config = EngineConfig(device="sim", model="llama-3.1-8b", device_kv_bytes=GIB)
    run = bench_cold.measure(config, rate=60.0, seconds=0.4, temperature=1.0)
    requests = asyncio.run(run)
    assert len(requests) > 5
    for request in requests:
        assert request.is_complete and 3 <= request.output_tokens < 6
        assert 0 < request.ttft_s <= request.e2e_s
