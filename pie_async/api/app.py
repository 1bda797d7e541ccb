"""The aiohttp application: routes and what surrounds them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from aiohttp import web
from prometheus_client.aiohttp import make_aiohttp_handler

from pie_async.api.auth import ApiKeys
from pie_async.api.handlers import Handlers, Limits
from pie_async.api.hosts import ANY_HOST, AllowedHosts
from pie_async.api.in_flight import InFlight
from pie_async.api.middlewares import (
    PAGE_ROUTE,
    UNGUARDED_ROUTE,
    as_response,
    errors_as_json,
    expect_body,
    name_response,
    require_api_key,
    require_known_host,
)
from pie_async.api.prometheus import ServerMetrics
from pie_async.api.tracing import SpanSink, trace_requests
from pie_async.api.vllm_names import with_vllm_names
from pie_async.api.watching import Watching
from pie_async.openai.backend import Backend
from pie_async.openai.errors import EngineStarting, error_reply
from pie_async.openai.service import OpenAIService

if TYPE_CHECKING:
    from aiohttp.typedefs import Middleware

DEFAULT_MAX_BODY_BYTES = 4 * 2**20

IN_FLIGHT = web.AppKey("in_flight", InFlight)


def create_app(
    engine: Backend,
    *,
    served_model_name: str | None = None,
    api_keys: ApiKeys | Iterable[str] = (),
    allowed_hosts: AllowedHosts | None = None,
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES,
    body_timeout_s: float = 60.0,
    keepalive_s: float = 10.0,
    stall_timeout_s: float = 60.0,
    vllm_metrics: bool = False,
    tracer: Any = None,
) -> web.Application:
    """OpenAI's API over an engine, to run alone or mounted in another application.

    The engine stays the caller's: it is neither started nor closed. When the application
    shuts down, answers that are still being sent end with an error event. Run it with
    `AppRunner(app, handler_cancellation=True)`, or a client that goes away before a
    non-streamed answer is noticed only at its end.

    Args:
        served_model_name: what clients call the model; the engine's name for it if None.
        api_keys: if any, all routes but /health and the page at / ask for one of them as a
            bearer token.
        allowed_hosts: names that requests may be sent to; None: any, for whoever mounts or
            forwards to this knows better.
        max_body_bytes: larger request bodies are refused with status 413.
        body_timeout_s: how long a request's body may take.
        keepalive_s: longest silence of a stream before a comment is sent.
        stall_timeout_s: how long a client may take nothing of its stream before it is cut off.
        vllm_metrics: have /metrics under vLLM's names too.
        tracer: OpenTelemetry's, to get a span for each request; None: no spans.
    """
    metrics = ServerMetrics(engine)
    in_flight = InFlight()

    def model() -> str:  # once somebody asks: the engine may be started later
        return served_model_name or engine.model.name

    service = OpenAIService(
        engine,
        served_model_name=served_model_name,
        keepalive_s=keepalive_s,
        sink=metrics if tracer is None else SpanSink(metrics),
    )
    limits = Limits(
        max_body_bytes=max_body_bytes,
        body_timeout_s=body_timeout_s,
        stall_timeout_s=stall_timeout_s,
    )
    handlers = Handlers(engine, service, in_flight, limits)
    watching = Watching(engine, stall_timeout_s=stall_timeout_s)

    app = web.Application(
        middlewares=[
            errors_as_json(metrics.count_response),
            *_guards(ApiKeys.of(api_keys), allowed_hosts),
            *([] if tracer is None else [trace_requests(tracer, model)]),
        ]
    )
    app[IN_FLIGHT] = in_flight
    registry = metrics.registry
    if vllm_metrics:
        registry = with_vllm_names(registry, model)
    expose = make_aiohttp_handler(registry)

    async def tell_metrics(request: web.Request) -> web.StreamResponse:
        await metrics.time_loop()
        return await expose(request)

    app.add_routes(
        [
            web.post("/v1/chat/completions", handlers.chat, expect_handler=expect_body),
            web.post("/v1/completions", handlers.completion, expect_handler=expect_body),
            web.post("/v1/responses", handlers.respond, expect_handler=expect_body),
            web.post("/tokenize", handlers.tokenize, expect_handler=expect_body),
            web.post("/detokenize", handlers.detokenize, expect_handler=expect_body),
            web.get("/v1/models", handlers.models),
            web.get("/v1/models/{model:.+}", handlers.model),
            web.get("/health", handlers.health, name=UNGUARDED_ROUTE),
            web.get("/ready", handlers.ready),
            web.get("/metrics", tell_metrics),
            web.get("/version", handlers.version),
            web.get("/openapi.json", handlers.openapi),
            web.get("/", watching.page, name=PAGE_ROUTE),
            web.get("/view", watching.view),
            web.get("/trace", watching.trace),
        ]
    )
    app.on_response_prepare.append(name_response)
    app.on_shutdown.append(_end_answers)

    async def end_watching(_app: web.Application) -> None:
        watching.feed.close()

    app.on_shutdown.append(end_watching)
    return app


def pie_app(engine: Backend, **options: Any) -> web.Application:
    """The same under a name that reads well where it is mounted: `app.add_subapp("/llm",
    pie_app(engine))`. The engine may be started later, before the first request.

    Args:
        options: those of `create_app`.
    """
    return create_app(engine, **options)


def create_waiting_app(
    *, api_keys: ApiKeys | Iterable[str] = (), allowed_hosts: AllowedHosts | None = None
) -> web.Application:
    """What answers until there is an engine: 503, and when to come again, to whoever may ask."""
    app = web.Application(
        middlewares=[errors_as_json(), *_guards(ApiKeys.of(api_keys), allowed_hosts)]
    )
    app.router.add_get("/health", _not_yet, name=UNGUARDED_ROUTE)
    app.router.add_route("*", "/{path:.*}", _not_yet)
    app.on_response_prepare.append(name_response)
    return app


async def _not_yet(_request: web.Request) -> web.Response:
    # Returned, not raised: probes come every second, and what is raised is logged.
    return as_response(error_reply(EngineStarting()))


def _guards(keys: ApiKeys, hosts: AllowedHosts | None) -> tuple[Middleware, ...]:
    return require_known_host(hosts or AllowedHosts([ANY_HOST])), require_api_key(keys)


async def _end_answers(app: web.Application) -> None:
    app[IN_FLIGHT].end()
