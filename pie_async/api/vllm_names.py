"""The project's metrics under vLLM's names, so that its dashboards and its tools work unchanged.

Only what means the same is there. vLLM's histograms of a request's times are of each of its `n`
outputs, and so are these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

_HISTOGRAMS = {
    "pie:ttft_seconds": "vllm:time_to_first_token_seconds",
    "pie:itl_seconds": "vllm:inter_token_latency_seconds",
    "pie:e2e_seconds": "vllm:e2e_request_latency_seconds",
    "pie:queue_seconds": "vllm:request_queue_time_seconds",
    "pie:prefill_seconds": "vllm:request_prefill_time_seconds",
    "pie:decode_seconds": "vllm:request_decode_time_seconds",
    "pie:inference_seconds": "vllm:request_inference_time_seconds",
}
_DIRECTIONS = {"h2d": "CPU_to_GPU", "d2h": "GPU_to_CPU"}

Samples = Mapping[str, list[tuple[Mapping[str, str], float]]]


def with_vllm_names(own: CollectorRegistry, model: Callable[[], str]) -> CollectorRegistry:
    """A registry that has everything twice: as it is, and under vLLM's names."""
    both = CollectorRegistry()
    both.register(_Forward(own))
    both.register(VllmNames(own, model))
    return both


class _Forward(Collector):
    def __init__(self, own: CollectorRegistry) -> None:
        self._own = own

    def collect(self) -> Iterable[Metric]:
        return self._own.collect()

    def describe(self) -> Iterable[Metric]:
        return ()


class VllmNames(Collector):
    """Reads another registry when asked; keeps nothing."""

    def __init__(self, own: CollectorRegistry, model: Callable[[], str]) -> None:
        self._own = own
        self._name = model
        self._model: Mapping[str, str] = {}

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        self._model = {"model_name": self._name()}
        families = {family.name: family for family in self._own.collect()}
        found: dict[str, list[tuple[Mapping[str, str], float]]] = {}
        for family in families.values():
            for sample in family.samples:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
        yield from self._gauges(found)
        yield from self._counters(found)
        for name, alias in _HISTOGRAMS.items():
            yield self._renamed(families[name], alias)

    def _gauges(self, found: Samples) -> Iterator[Metric]:
        device, resident = _sum(found, "pie:device_slots"), _sum(found, "pie:blocks", "resident")
        host = _sum(found, "pie:host_slots")
        waiting = _sum(found, "pie:sequences", "waiting", "parked", "paused")
        for name, text, value in (
            ("num_requests_running", "Sequences that run", _sum(found, "pie:sequences", "running")),
            ("num_requests_waiting", "Sequences that wait, preempted ones too", waiting),
            ("kv_cache_usage_perc", "Device KV in use, 0 to 1", resident / max(1, device)),
            (
                "kv_offload_cpu_cache_usage_perc",
                "Pool in use, 0 to 1",
                _sum(found, "pie:pooled_blocks") / max(1, host),
            ),
        ):
            yield self._one(GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"]), value)
        sizes = {
            "block_size": _sum(found, "pie:block_tokens"),
            "num_gpu_blocks": device,
            "num_cpu_blocks": host,
        }
        info = GaugeMetricFamily(
            "vllm:cache_config_info", "Sizes of the caches", labels=["model_name", *sizes]
        )
        info.add_metric([self._model["model_name"], *(f"{each:.0f}" for each in sizes.values())], 1)
        yield info

    def _counters(self, found: Samples) -> Iterator[Metric]:
        prompts = _sum(found, "pie:prompt_tokens_total") + _sum(found, "pie:cached_tokens_total")
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens, cached ones too", prompts),
            ("generation_tokens", "Tokens generated", _sum(found, "pie:output_tokens_total")),
            ("num_preemptions", "Preempted sequences", _sum(found, "pie:preemptions_total")),
            ("prefix_cache_queries", "Looked for", _sum(found, "pie:prefix_query_tokens_total")),
            ("prefix_cache_hits", "Tokens found", _sum(found, "pie:prefix_hit_tokens_total")),
        ):  # fmt: skip
            yield self._one(CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"]), value)
        yield self._by_label(
            found, "pie:choices_finished_total", "request_success", "finished_reason", {}
        )
        for name, own in (
            ("kv_offload_total_bytes", "pie:link_bytes_total"),
            ("kv_offload_total_time", "pie:link_busy_seconds_total"),
        ):
            yield self._by_label(found, own, name, "transfer_type", _DIRECTIONS)

    def _one(
        self, family: GaugeMetricFamily | CounterMetricFamily, value: float
    ) -> GaugeMetricFamily | CounterMetricFamily:
        family.add_metric([self._model["model_name"]], value)
        return family

    def _by_label(
        self, found: Samples, own: str, name: str, label: str, words: Mapping[str, str]
    ) -> CounterMetricFamily:
        family = CounterMetricFamily(f"vllm:{name}", f"As {own}", labels=["model_name", label])
        for labels, value in found.get(own, ()):
            (word,) = labels.values()
            family.add_metric([self._model["model_name"], words.get(word, word)], value)
        return family

    def _renamed(self, family: Metric, alias: str) -> Metric:
        renamed = Metric(alias, family.documentation, family.type)
        for sample in family.samples:
            suffix = sample.name.removeprefix(family.name)
            renamed.add_sample(alias + suffix, {**sample.labels, **self._model}, sample.value)
        return renamed


def _sum(found: Samples, name: str, *words: str) -> float:
    """Of a metric's values, or of those whose one label is one of the words."""
    return sum(
        value
        for labels, value in found.get(name, ())
        if not words or set(labels.values()) <= set(words)
    )
