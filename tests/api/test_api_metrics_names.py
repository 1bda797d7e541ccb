"""Metrics under vLLM's names, and OpenTelemetry's spans."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pie_async.engine import Engine
from pie_async.metrics import EngineStats
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.realtime
STATS = EngineStats(
    running=3, waiting=2, parked=1, device_blocks=100, resident_blocks=25, host_blocks=50,
    pooled_blocks=10, block_tokens=16, prompt_tokens=70, cached_tokens=30, output_tokens=11,
    preemptions_parked=4, preemptions_recomputed=1, prefix_query_tokens=9, prefix_hit_tokens=8,
    h2d_bytes=512, d2h_bytes=256, h2d_busy_s=1.5,
)  # fmt: skip


async def scraped(server) -> dict[str, list[tuple[dict[str, str], float]]]:
    async with server.http.get("/metrics") as reply:
        text = await reply.text()
    found: dict = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


async def test_vllms_names_are_there_on_request_and_mean_the_same(start) -> None:
    server = await start(FakeEngine(snapshot=STATS), vllm_metrics=True, served_model_name="m")
    await server.events("/v1/completions", {"prompt": "p"})
    found = await scraped(server)
    model = {"model_name": "m"}
    for name, value in {
        "num_requests_running": 3,
        "num_requests_waiting": 3,
        "kv_cache_usage_perc": 0.25,
        "kv_offload_cpu_cache_usage_perc": 0.2,
        "prompt_tokens_total": 100,
        "generation_tokens_total": 11,
        "num_preemptions_total": 5,
        "prefix_cache_queries_total": 9,
        "prefix_cache_hits_total": 8,
    }.items():
        assert found[f"vllm:{name}"] == [(model, value)], name
    sizes = {"block_size": "16", "num_gpu_blocks": "100", "num_cpu_blocks": "50"}
    assert found["vllm:cache_config_info"] == [(model | sizes, 1)]
    assert (model | {"finished_reason": "stop"}, 1) in found["vllm:request_success_total"]
    assert (model | {"transfer_type": "CPU_to_GPU"}, 512) in found[
        "vllm:kv_offload_total_bytes_total"
    ]
    assert (model | {"transfer_type": "CPU_to_GPU"}, 1.5) in found[
        "vllm:kv_offload_total_time_total"
    ]
    for own, alias in (("pie:ttft_seconds", "vllm:time_to_first_token_seconds"),
                       ("pie:e2e_seconds", "vllm:e2e_request_latency_seconds"),
                       ("pie:itl_seconds", "vllm:inter_token_latency_seconds")):  # fmt: skip
        for suffix in ("_count", "_sum"):
            assert found[own + suffix][0][1] == found[alias + suffix][0][1]
        assert len(found[own + "_bucket"]) == len(found[alias + "_bucket"])
    assert found["vllm:time_to_first_token_seconds_count"] == [(model, 1)]


async def test_without_being_asked_for_they_are_not(server) -> None:
    found = await scraped(server)
    assert found and not [name for name in found if name.startswith("vllm:")]


async def test_a_loop_that_is_held_up_is_seen(server) -> None:
    is_over = asyncio.Event()

    async def hold_up() -> None:
        while not is_over.is_set():
            time.sleep(0.05)  # noqa: ASYNC251 - that is what it is to see
            await asyncio.sleep(0)

    assert (await scraped(server))["pie:event_loop_lag_seconds"][0][1] < 0.05
    holding = asyncio.create_task(hold_up())
    await asyncio.sleep(0)
    found = await scraped(server)
    is_over.set()
    await holding
    assert 0.05 <= found["pie:event_loop_lag_seconds"][0][1] < 5


# --- spans ----------------------------------------------------------------------------------


@pytest.fixture
def spans():
    sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs the extra otel")
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return exporter, provider.get_tracer("test")


async def only_span(exporter):
    """The client may have its answer before the server has ended the span."""
    for _ in range(500):
        if spans := exporter.get_finished_spans():
            (span,) = spans
            return span
        await asyncio.sleep(0.01)
    raise AssertionError("no span ended")


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_a_request_is_a_span_of_its_callers_trace(start, spans, is_streamed) -> None:
    exporter, tracer = spans
    engine = FakeEngine(hold_at=2)
    server = await start(engine, tracer=tracer)

    async def let_pass() -> None:
        """Late enough for a clock that counts in milliseconds."""
        await engine.holding.wait()
        await asyncio.sleep(0.01)
        engine.gate.set()

    letting = asyncio.create_task(let_pass())
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{parent}-01"}
    body = {"messages": [{"role": "user", "content": "secret words"}], "stream": is_streamed}
    async with server.http.post("/v1/chat/completions", json=body, headers=headers) as reply:
        assert reply.status == 200
        await reply.read()
    await letting
    async with server.http.get("/health"):
        pass
    span = await only_span(exporter)
    assert span.name == "chat fake-model"
    assert f"{span.context.trace_id:032x}" == trace_id and f"{span.parent.span_id:016x}" == parent
    assert span.attributes["gen_ai.operation.name"] == "chat"
    assert span.attributes["http.response.status_code"] == 200
    assert span.attributes["gen_ai.server.request.duration"] > 0
    events = {event.name: dict(event.attributes) for event in span.events}
    assert events["done"] == {"gen_ai.response.finish_reason": "stop"}
    assert ("first token" in events) == is_streamed
    assert "secret" not in json.dumps(json.loads(span.to_json()))


async def test_a_span_says_where_the_time_went(start, spans) -> None:
    exporter, tracer = spans
    async with Engine(device="sim") as engine:
        server = await start(engine, tracer=tracer)
        status, _ = await server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 3})
        assert status == 200
    events = {event.name: event.attributes for event in (await only_span(exporter)).events}
    assert events["times"].keys() == {"queued_s", "prefill_s", "decode_s"}
    assert events["times"]["decode_s"] > 0


async def test_a_refused_request_is_a_span_with_the_refusal(start, spans) -> None:
    exporter, tracer = spans
    server = await start(tracer=tracer)
    async with server.http.post("/v1/completions", json={"prompt": ""}) as reply:
        assert reply.status == 400
    span = await only_span(exporter)
    assert span.name == "text_completion fake-model"
    assert any(event.name == "exception" for event in span.events)
