"""An application with an engine inside: it continues a text and sends what comes, line by line.

    python examples/continuation/continuation_app.py --port 8080
    curl -N localhost:8080/continue -d '{"text": "ROMEO:", "tokens": 60}'

Every line of the reply is JSON: {"text": ...} while it is written, then {"end": "length"} or
{"error": ...}. `test_continuation_app.py` shows how such an application is tested while clients
vanish, copies fail and the engine stops.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncIterator
from contextlib import aclosing

from aiohttp import web

from pie_async import Engine, EngineConfig, PieError, SamplingParams
from pie_async.errors import EngineStopped, InvalidRequest, Overloaded

ENGINE = web.AppKey("engine", Engine)
MOST_TOKENS = 500


def create_app(engine: Engine) -> web.Application:
    """The application around an engine that somebody else starts and closes."""
    app = web.Application()
    app[ENGINE] = engine
    app.router.add_post("/continue", continue_text)
    app.router.add_get("/health", health)
    return app


async def health(request: web.Request) -> web.Response:
    """Whether texts are continued at all."""
    engine = request.app[ENGINE]
    if engine.is_accepting:
        return web.json_response({"is_running": True, "requests": engine.stats().running})
    reason = str(engine.failure or "the engine is closed")
    return web.json_response({"is_running": False, "reason": reason}, status=503)


async def continue_text(request: web.Request) -> web.StreamResponse:
    """Send the continuation as it comes. A client that leaves ends its request: aiohttp cancels
    the handler, and leaving `aclosing` cancels the request."""
    engine = request.app[ENGINE]
    try:
        prompt, params = _read(await request.text())
        stream = await engine.submit(prompt, params)
    except PieError as error:
        return _refusal(error)
    reply = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    async with aclosing(stream):
        await reply.prepare(request)
        async for line in _lines(stream):
            await reply.write(json.dumps(line).encode() + b"\n")
    await reply.write_eof()
    return reply


async def _lines(stream: AsyncIterator) -> AsyncIterator[dict[str, str]]:
    """What the client is told; an error comes as the last line, for the status is long out."""
    try:
        async for output in stream:
            (out,) = output.outputs
            if out.text:
                yield {"text": out.text}
            if out.finish_reason is not None:
                yield {"end": out.finish_reason}
    except PieError as error:
        yield {"error": str(error)}


def _read(body: str) -> tuple[str, SamplingParams]:
    try:
        asked = json.loads(body)
        text, tokens = asked["text"], int(asked.get("tokens", 100))
        seed = int(asked.get("seed", 0))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidRequest('send {"text": "...", "tokens": 100, "seed": 0}') from error
    if not isinstance(text, str) or not 1 <= tokens <= MOST_TOKENS:
        raise InvalidRequest(f"text must be a string and tokens 1 to {MOST_TOKENS}")
    return text, SamplingParams(max_tokens=tokens, seed=seed, output_kind="delta")


def _refusal(error: PieError) -> web.Response:
    headers = {}
    match error:
        case InvalidRequest():
            status = 400
        case Overloaded():
            status, headers["Retry-After"] = 429, str(round(error.retry_after_s) or 1)
        case EngineStopped():
            status = 503
        case _:
            status = 500
    return web.json_response({"error": str(error)}, status=status, headers=headers)


async def _serve(config: EngineConfig) -> web.Application:
    engine = Engine(config)
    app = create_app(engine)

    async def run_engine(_: web.Application) -> AsyncIterator[None]:
        async with engine:
            yield

    app.cleanup_ctx.append(run_engine)
    return app


def main() -> None:
    """Serve the built-in model, or on a machine without time for that a simulated one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "sim"])
    chosen = parser.parse_args()
    app = _serve(EngineConfig(device=chosen.device))
    web.run_app(app, host="127.0.0.1", port=chosen.port, handler_cancellation=True)


if __name__ == "__main__":
    main()
