"""Metrics for Prometheus, in the project's own names, on a registry of the application's own."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from pie_async.messages import LimitCause
from pie_async.metrics import EngineStats
from pie_async.openai.backend import Backend
from pie_async.outputs import FinishReason, SequenceTimes

_TTFT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ITL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 5)
_E2E_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SPENT = {
    "queued_s": ("pie:queue_seconds", "From a choice's arrival at the engine until it ran first"),
    "prefill_s": ("pie:prefill_seconds", "From a choice's first run to its first token"),
    "decode_s": ("pie:decode_seconds", "From a choice's first token to its end"),
    "inference_s": ("pie:inference_seconds", "From a choice's first run to its end"),
}
"""Histograms of `SequenceTimes`."""


class Durations(Collector):
    """A histogram that is told of every token: prometheus_client's takes ten times as long, for it
    locks for threads that there are not."""

    def __init__(self, name: str, what: str, buckets_s: Sequence[float]) -> None:
        self._name = name
        self._what = what
        self._bounds_s = tuple(buckets_s)
        self._counts = [0] * (len(self._bounds_s) + 1)
        self._sum_s = 0.0

    def observe(self, duration_s: float) -> None:
        """Count one; on the event loop."""
        self._counts[bisect_left(self._bounds_s, duration_s)] += 1
        self._sum_s += duration_s

    def collect(self) -> Iterable[Metric]:
        """See `Collector`."""
        names = [*map(floatToGoString, self._bounds_s), "+Inf"]
        buckets = list(zip(names, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._what, buckets, self._sum_s)


class ServerMetrics:
    """What the HTTP side counts, and the engine's own statistics, read at every scrape."""

    def __init__(self, backend: Backend) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(backend))
        self._ttft = Durations(
            "pie:ttft_seconds",
            "From reading a streamed request to its first output token",
            _TTFT_BUCKETS_S,
        )
        self._itl = Durations(
            "pie:itl_seconds",
            "Gap between two consecutive output tokens of a streamed choice",
            _ITL_BUCKETS_S,
        )
        self._e2e = Durations(
            "pie:e2e_seconds",
            "From reading a request to its last output token",
            _E2E_BUCKETS_S,
        )
        self._spent = {
            field: Durations(name, text, _TTFT_BUCKETS_S + _E2E_BUCKETS_S[-3:])
            for field, (name, text) in _SPENT.items()
        }
        for durations in (self._ttft, self._itl, self._e2e, *self._spent.values()):
            self.registry.register(durations)
        self.observe_ttft = self._ttft.observe
        self.observe_itl = self._itl.observe
        self.observe_e2e = self._e2e.observe
        self._finished = Counter(
            "pie:choices_finished",
            "Choices by the reason for their end",
            ["finish_reason"],
            registry=self.registry,
        )
        self._responses = Counter(
            "pie:http_responses",
            "HTTP responses by route and status",
            ["route", "status"],
            registry=self.registry,
        )
        self._lag = Gauge(
            "pie:event_loop_lag_seconds",
            "How long a turn of the server's event loop took when this was asked, in seconds",
            registry=self.registry,
        )
        Gauge(
            "pie:event_loop_tasks", "Tasks of the server's event loop", registry=self.registry
        ).set_function(lambda: len(asyncio.all_tasks()))

    async def time_loop(self) -> None:
        """Let everything that is ready run once, and note how long that took."""
        began_s = time.perf_counter()  # a loop's own clock may stand still during a turn
        await asyncio.sleep(0)
        self._lag.set(time.perf_counter() - began_s)

    def observe_times(self, times: SequenceTimes) -> None:
        for field, durations in self._spent.items():
            durations.observe(getattr(times, field))

    def count_finished(self, reason: FinishReason) -> None:
        self._finished.labels(reason).inc()

    def count_response(self, route: str, status: int) -> None:
        self._responses.labels(route, str(status)).inc()


class EngineCollector(Collector):
    """Reads `EngineStats` when asked; keeps nothing."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def collect(self) -> Iterator[Metric]:
        stats = self._backend.stats()
        for name, (text, value) in _gauges(stats).items():
            yield GaugeMetricFamily(f"pie:{name}", text, value)
        for name, (text, value) in _counters(stats).items():
            yield CounterMetricFamily(f"pie:{name}", text, value)
        yield from _labelled(stats)

    def describe(self) -> Iterable[Metric]:
        return ()  # spares registration a look at an engine that may not have started


def _gauges(stats: EngineStats) -> dict[str, tuple[str, float]]:
    return {
        "block_bytes": ("Size of a KV block over all layers, in bytes", stats.block_bytes),
        "block_tokens": ("Tokens whose KV a block holds", stats.block_tokens),
        "device_slots": ("Resident slots of the device arena", stats.device_blocks),
        "host_slots": ("Slots of the host pool that can be used now", stats.host_blocks),
        "pooled_blocks": ("Host slots in use, clean copies included", stats.pooled_blocks),
        "streamed_limit_blocks": (
            "Blocks that the expansion governor allows to be streamed",
            stats.streamed_limit_blocks,
        ),
        "expansion_ratio": (
            "Device and streamed blocks by device blocks; 1 is no pooling",
            stats.expansion_ratio,
        ),
        "stall_share": (
            "Part of the compute time spent waiting for swaps, 0 to 1",
            stats.stall_share,
        ),
        "uptime_seconds": ("Time since the engine started, in seconds", stats.uptime_s),
    }


def _counters(stats: EngineStats) -> dict[str, tuple[str, float]]:
    return {
        "iterations": ("Forward passes", stats.iterations),
        "prompt_tokens": ("Prompt tokens computed", stats.prompt_tokens),
        "cached_tokens": ("Prompt tokens whose KV was found instead", stats.cached_tokens),
        "prefix_query_tokens": (
            "Tokens of sequences that looked for their leading blocks",
            stats.prefix_query_tokens,
        ),
        "prefix_hit_tokens": ("Tokens that they found", stats.prefix_hit_tokens),
        "cache_evictions": ("Cached blocks whose slots were taken", stats.cache_evictions),
        "output_tokens": ("Tokens generated", stats.output_tokens),
        "sequences_finished": ("Sequences that ended, for any reason", stats.sequences_finished),
        "sequences_cancelled": (
            "Sequences cancelled, by a client or us",
            stats.sequences_cancelled,
        ),
        "pauses": ("Sequences taken off because nobody read them", stats.pauses),
        "demotions": ("Blocks copied to the pool", stats.demotions),
        "promotions": ("Blocks copied back to stay", stats.promotions),
        "copy_attempts_failed": ("Attempts to copy that went wrong", stats.copy_attempts_failed),
        "copies_lost": ("Copies of a block that went wrong for good", stats.copies_lost),
        "sequences_begun_anew": (
            "Sequences computed again because a copy lost their KV",
            stats.sequences_begun_anew,
        ),
        "sequences_lost": ("Sequences that a copy's failures ended", stats.sequences_lost),
        "compute_seconds": ("Time the compute stream worked, in seconds", stats.compute_s),
        "stall_seconds": ("Time compute waited for staged blocks, in seconds", stats.stall_s),
        "mask_wait_seconds": (
            "Time compute stood still until masks of guided sequences were made, in seconds",
            stats.mask_wait_s,
        ),
    }


def _labelled(stats: EngineStats) -> Iterator[Metric]:
    yield _by_label(
        GaugeMetricFamily("pie:sequences", "Sequences by state", labels=["state"]),
        running=stats.running,
        waiting=stats.waiting,
        parked=stats.parked,
        paused=stats.paused,
    )
    yield _by_label(
        GaugeMetricFamily("pie:blocks", "KV blocks by where they are", labels=["state"]),
        resident=stats.resident_blocks,
        cached=stats.cached_blocks,
        streamed=stats.streamed_blocks,
        parked=stats.parked_blocks,
    )
    yield _by_label(
        CounterMetricFamily("pie:preemptions", "Preempted sequences", labels=["kind"]),
        parked=stats.preemptions_parked,
        recomputed=stats.preemptions_recomputed,
    )
    yield _by_label(
        CounterMetricFamily("pie:link_bytes", "Bytes over the link", labels=["direction"]),
        h2d=stats.h2d_bytes,
        d2h=stats.d2h_bytes,
    )
    yield _by_label(
        CounterMetricFamily(
            "pie:link_busy_seconds", "Time spent copying, in seconds", labels=["direction"]
        ),
        h2d=stats.h2d_busy_s,
        d2h=stats.d2h_busy_s,
    )
    yield _by_label(
        GaugeMetricFamily(
            "pie:link_busy_share",
            "Part of the uptime spent copying, 0 to 1",
            labels=["direction"],
        ),
        h2d=stats.h2d_busy_share,
        d2h=stats.d2h_busy_share,
    )

    yield _by_label(
        GaugeMetricFamily(
            "pie:streamed_limit_cause",
            "1 for why the expansion governor allows what it does, 0 for the other causes",
            labels=["cause"],
        ),
        **{cause: float(cause == stats.governor_cause) for cause in get_args(LimitCause)},
    )
    for name, text in (
        ("iterations", "Forward passes"),
        ("compute_s", "Time the compute stream worked, in seconds,"),
        ("stall_s", "Time compute waited for staged blocks, in seconds,"),
        ("staging_s", "Time the link was busy staging, in seconds,"),
    ):
        yield _by_label(
            CounterMetricFamily(
                f"pie:phase_{name.replace('_s', '_seconds')}",
                f"{text} by whether prompts are computed",
                labels=["phase"],
            ),
            decode=getattr(stats, f"decode_{name}"),
            prefill=getattr(stats, f"prefill_{name}"),
        )


def _by_label(
    family: GaugeMetricFamily | CounterMetricFamily, **values: float
) -> GaugeMetricFamily | CounterMetricFamily:
    for label, value in values.items():
        family.add_metric([label], value)
    return family
