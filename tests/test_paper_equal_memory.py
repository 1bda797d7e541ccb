"""The search for the least memory, on curves that are known and on the simulated device."""

from __future__ import annotations

import json

import pytest

from pie_async.config import GIB, MIB
from pie_async.device.cost_model import pooling_bound
from scripts.paper import equal_memory
from scripts.paper.equal_memory import least_kv, least_kv_bound

PRECISION = 0.03


class Concave:
    """A throughput that rises ever more slowly with memory."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, kv_bytes: int) -> float:
        self.asked.append(kv_bytes)
        return self.at(kv_bytes)

    @staticmethod
    def at(kv_bytes: int) -> float:
        return 1000 * kv_bytes / (kv_bytes + 8 * GIB)


@pytest.mark.parametrize("needed", [0.2 * GIB, 3 * GIB, 7.4 * GIB, 11.9 * GIB])
def test_the_least_memory_that_reaches_the_throughput_is_found_in_few_runs(needed):
    curve = Concave()
    found = least_kv(curve, curve.at(round(needed)), 12 * GIB, {}, precision=PRECISION)
    assert needed <= found <= needed * (1 + 2.5 * PRECISION)
    assert len(curve.asked) <= 9
    assert found in curve.asked or found == 12 * GIB


def test_what_was_measured_before_is_not_measured_again():
    curve = Concave()
    known = {size: curve.at(size) for size in (2 * GIB, round(3.05 * GIB), 5 * GIB)}
    found = least_kv(curve, curve.at(3 * GIB), 12 * GIB, known, precision=PRECISION)
    assert 3 * GIB <= found <= round(3.05 * GIB)
    assert len(curve.asked) <= 3
    assert all(2 * GIB < size < round(3.05 * GIB) for size in curve.asked)


def test_nothing_is_saved_where_nothing_less_does():
    assert least_kv(lambda _: 1.0, 2.0, 4 * GIB, {}, precision=PRECISION) == 4 * GIB


def test_at_the_bound_streaming_makes_up_for_the_memory_that_is_missing():
    weights, rate = 60 * GIB, 0.11
    least = least_kv_bound(weights, 0.98, 20 * GIB, rate)
    assert 0 < least < 20 * GIB
    pooled = pooling_bound(weights, least, rate)
    gain = pooled.throughput_gain * (least / (weights + least)) / (20 / (60 + 20))
    assert gain == pytest.approx(0.98)
    assert least_kv_bound(weights, 0.98, 2 * GIB, rate) == 0


def test_pie_does_with_less_memory_what_the_unpooled_engine_does(tmp_path, monkeypatch):
    arguments = [
        "--device", "sim", "--model", "llama-3.1-8b", "--link", "nvlink", "--kv", "96MiB",
        "--host-pool", "1GiB", "--context", "256", "--requests", "16", "--seconds", "0.4",
        "--precision", "0.5", "--results", str(tmp_path),
    ]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["equal_memory", *arguments])
    equal_memory.main()
    (row,) = json.loads((tmp_path / "equal_memory.json").read_text())["rows"]
    assert row["off_kv_bytes"] == 96 * MIB
    assert row["pie_kv_bytes"] < 96 * MIB / 1.3
    assert row["pie_tokens_per_s"] >= 0.98 * row["off_tokens_per_s"]
    assert row["mean_streamed_blocks"] > 0 and row["ring_bytes"] > 0
    saved = row["off_kv_bytes"] - row["pie_kv_bytes"] - row["ring_bytes"]
    assert row["off_total_bytes"] - row["pie_total_bytes"] == saved
