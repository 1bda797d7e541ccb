"""OpenTelemetry spans of requests, where the extra `otel` is installed and asked for.

A span for each request under /v1, a child of the caller's (`traceparent`), with the attributes of
the GenAI conventions that are known here; its events are the first token and the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import web

from pie_async.errors import ConfigError
from pie_async.openai.latency import LatencySink
from pie_async.outputs import FinishReason, SequenceTimes

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler, Middleware

_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}


def tracer_from_environment() -> Any:
    """A tracer that exports as OTEL_EXPORTER_OTLP_ENDPOINT and the other usual variables say.

    Raises:
        ConfigError: the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"spans need OpenTelemetry ({error}): pip install 'pie_async[otel]'", option="otel"
        ) from error
    # The variables' service name wins over this one.
    provider = TracerProvider(resource=Resource.create({"service.name": "pie_async"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("pie_async")


def trace_requests(tracer: Any, model: Callable[[], str]) -> Middleware:
    """Surrounds every request under /v1 with a span; `model` says what its name is by then."""
    from opentelemetry.propagate import extract
    from opentelemetry.trace import SpanKind, Status, StatusCode

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        operation = _OPERATIONS.get(request.path)
        if operation is None:
            return await handler(request)
        with tracer.start_as_current_span(
            f"{operation} {model()}",
            context=extract(request.headers),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.request.model": model(),
                "http.request.method": request.method,
                "url.path": request.path,
            },
        ) as span:
            response = await handler(request)
            span.set_attribute("http.response.status_code", response.status)
            if response.status >= 500:
                span.set_status(Status(StatusCode.ERROR))
            return response

    return middleware


class SpanSink:
    """Notes on the current request's span what another sink is told too."""

    def __init__(self, inner: LatencySink) -> None:
        from opentelemetry.trace import get_current_span

        self._inner = inner
        self._span = get_current_span

    def observe_ttft(self, ttft_s: float) -> None:
        self._inner.observe_ttft(ttft_s)
        self._span().add_event("first token", {"gen_ai.server.time_to_first_token": ttft_s})

    def observe_itl(self, itl_s: float) -> None:
        self._inner.observe_itl(itl_s)

    def observe_e2e(self, e2e_s: float) -> None:
        self._inner.observe_e2e(e2e_s)
        self._span().set_attribute("gen_ai.server.request.duration", e2e_s)

    def observe_times(self, times: SequenceTimes) -> None:
        self._inner.observe_times(times)
        self._span().add_event("times", msgspec.structs.asdict(times))

    def count_finished(self, reason: FinishReason) -> None:
        self._inner.count_finished(reason)
        self._span().add_event("done", {"gen_ai.response.finish_reason": reason})
