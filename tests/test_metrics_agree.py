"""What an engine under pressure says of swapping is the same wherever it is said."""

from __future__ import annotations

import json
import re
from typing import get_args

import pytest
from prometheus_client import CollectorRegistry

from pie_async.__main__ import main
from pie_async.api.prometheus import EngineCollector
from pie_async.cli import load
from pie_async.messages import LimitCause
from pie_async.metrics import EngineStats, LinkUse

pytestmark = pytest.mark.realtime  # the command starts a loop of its own

COUNTERS = {
    "compute_s": ("pie:compute_seconds_total", {}),
    "stall_s": ("pie:stall_seconds_total", {}),
    "mask_wait_s": ("pie:mask_wait_seconds_total", {}),
    "demotions": ("pie:demotions_total", {}),
    "promotions": ("pie:promotions_total", {}),
    "iterations": ("pie:iterations_total", {}),
    "h2d_bytes": ("pie:link_bytes_total", {"direction": "h2d"}),
    "d2h_bytes": ("pie:link_bytes_total", {"direction": "d2h"}),
    "preemptions_parked": ("pie:preemptions_total", {"kind": "parked"}),
    "preemptions_recomputed": ("pie:preemptions_total", {"kind": "recomputed"}),
    "h2d_busy_s": ("pie:link_busy_seconds_total", {"direction": "h2d"}),
    "d2h_busy_s": ("pie:link_busy_seconds_total", {"direction": "d2h"}),
}
GAUGES = {
    "expansion_ratio": ("pie:expansion_ratio", {}),
    "stall_share": ("pie:stall_share", {}),
    "streamed_blocks": ("pie:blocks", {"state": "streamed"}),
    "parked_blocks": ("pie:blocks", {"state": "parked"}),
    "h2d_busy_share": ("pie:link_busy_share", {"direction": "h2d"}),
    "d2h_busy_share": ("pie:link_busy_share", {"direction": "d2h"}),
}
UNITS = {"seconds": "in seconds", "bytes": "bytes", "share": "0 to 1"}


class Stated:
    """A backend that has these statistics."""

    def __init__(self, stats: EngineStats) -> None:
        self._stats = stats

    def stats(self) -> EngineStats:
        return self._stats


def scraped(stats: EngineStats) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(EngineCollector(Stated(stats)))
    return registry


@pytest.fixture
def run(monkeypatch, tmp_path, capsys) -> tuple[dict, list[EngineStats], str]:
    """(the report, every snapshot that the bench took, the printed tables) of a run that swaps."""
    taken: list[EngineStats] = []

    class Watch(load.PoolWatch):
        def __init__(self, engine, clock) -> None:
            stats = engine.stats

            def kept() -> EngineStats:
                taken.append(stats())
                return taken[-1]

            monkeypatch.setattr(engine, "stats", kept)
            super().__init__(engine, clock)

    monkeypatch.setattr(load, "PoolWatch", Watch)
    path = tmp_path / "result.json"
    flags = ["--device", "sim", "--device-kv", "1MiB", "--host-pool", "32MiB", "-n", "24"]
    lengths = ["--workload", "fixed", "--prompt-tokens", "90", "--output-tokens", "60"]
    assert main(["bench", "tiny", *flags, *lengths, "--json", str(path)]) == 0
    return json.loads(path.read_text()), taken, capsys.readouterr().out


def test_metrics_statistics_and_bench_agree(run):
    report, taken, printed = run
    first, last = taken[0], taken[-1]
    assert last.demotions > 0 and last.d2h_bytes > 0, "nothing was swapped: nothing is tested"
    told = report["pool"] | report["link"]
    registry = scraped(last)
    for name, (metric, labels) in (COUNTERS | GAUGES).items():
        assert registry.get_sample_value(metric, labels) == getattr(last, name), name
    for name in COUNTERS:
        assert told[name] == pytest.approx(getattr(last, name) - getattr(first, name)), name
    for name in ("expansion_ratio", "streamed_blocks", "parked_blocks"):
        assert told[f"{name}_peak"] == max(getattr(stats, name) for stats in taken)
    assert f"{told['stall_s']:.3f} s" in printed
    shares = f"{told['h2d_busy_share']:.1%} / {told['d2h_busy_share']:.1%}"
    assert re.search(rf"link busy in / out\D*{re.escape(shares)}", printed)


def test_busy_shares_are_of_the_time_between_two_snapshots():
    first = EngineStats(uptime_s=10.0, h2d_busy_s=1.0, d2h_busy_s=2.0)
    last = EngineStats(uptime_s=14.0, h2d_busy_s=3.0, d2h_busy_s=3.0)
    use = LinkUse.between(first, last)
    assert (use.h2d_busy_share, use.d2h_busy_share) == (0.5, 0.25)
    assert LinkUse.between(first, first).h2d_busy_share == 0.0


def test_help_texts_name_the_unit_that_the_name_has():
    families = list(EngineCollector(Stated(EngineStats())).collect())
    with_unit = [(f, unit) for f in families for unit in UNITS if f.name.endswith(f"_{unit}")]
    assert len(with_unit) >= 6
    for family, unit in with_unit:
        assert UNITS[unit] in family.documentation.lower(), family.name


PHASES = ("decode", "prefill")
PHASE_METRICS = {
    "iterations": "pie:phase_iterations_total",
    "compute_s": "pie:phase_compute_seconds_total",
    "stall_s": "pie:phase_stall_seconds_total",
    "staging_s": "pie:phase_staging_seconds_total",
}


def test_the_two_kinds_of_iterations_are_told_apart_and_together_are_all(run):
    _, taken, _ = run
    last = taken[-1]
    registry = scraped(last)
    for name, metric in PHASE_METRICS.items():
        for phase in PHASES:
            told = registry.get_sample_value(metric, {"phase": phase})
            assert told == getattr(last, f"{phase}_{name}"), (phase, name)
    for name in ("iterations", "compute_s", "stall_s"):
        both = sum(getattr(last, f"{phase}_{name}") for phase in PHASES)
        assert both == pytest.approx(getattr(last, name)), name
    assert last.decode_iterations > last.prefill_iterations > 0
    assert last.decode_staging_s > 0


def test_the_limits_cause_is_one_of_few(run):
    _, taken, _ = run
    assert taken[-1].governor_cause == "fits", "it has ended: nothing is wanted"
    registry = scraped(taken[-1])
    told = {
        cause: registry.get_sample_value("pie:streamed_limit_cause", {"cause": cause})
        for cause in get_args(LimitCause)
    }
    assert told == {cause: float(cause == taken[-1].governor_cause) for cause in told}
    assert taken[-1].governor_reason
