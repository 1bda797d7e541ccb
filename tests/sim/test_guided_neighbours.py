"""Who is not guided notices nothing of those who are."""

from __future__ import annotations

from pie_async.config import GIB
from scripts.bench_guides import measure


async def test_a_tenth_of_guided_sequences_does_not_slow_the_others() -> None:
    found = await measure(sequences=16, tokens=48, device="sim", device_kv_bytes=4 * GIB)
    none, a_tenth, everyone = found.values()
    alone, beside = none.others, a_tenth.others
    guided, together = a_tenth.guided, everyone.guided
    assert 0 < beside.median_ms <= 1.1 * alone.median_ms
    assert beside.p99_ms <= 1.1 * alone.p99_ms
    assert guided.p99_ms < 2.5 * alone.median_ms, "it gets a token in every other iteration"
    assert 0 < together.median_ms < guided.p99_ms, "together they need not wait for others"
