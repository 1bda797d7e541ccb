"""OpenAI's API in a FastAPI application: the engine's layer makes the bytes, FastAPI sends them.

    uvicorn fastapi_app:app --port 8080          # in examples/fastapi_app
    curl -N localhost:8080/v1/chat/completions -d '{"stream": true,
      "messages": [{"role": "user", "content": "Who goes there?"}]}'

`OpenAIService` knows nothing of HTTP. The same three calls serve from Ray Serve or anything else
that can send an async iterator of bytes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from pie_async import Engine
from pie_async.openai.answer import Answer, log_failure
from pie_async.openai.errors import error_reply
from pie_async.openai.service import OpenAIService


def create_app(engine: Engine) -> FastAPI:
    """The application around an engine that it starts and closes."""
    service = OpenAIService(engine)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine:
            yield

    app = FastAPI(title="An application with an engine inside", lifespan=lifespan)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _answered(request, service.chat)

    @app.post("/v1/completions")
    async def completion(request: Request) -> Response:
        return await _answered(request, service.completion)

    @app.post("/v1/responses")
    async def respond(request: Request) -> Response:
        return await _answered(request, service.respond)

    return app


async def _answered(request: Request, accept: Callable[[bytes], Awaitable[Answer]]) -> Response:
    """What `accept` makes of the request's body, or the error that it raises: each has a status.

    Starlette does not say when a client leaves before it is answered whole: only a stream ends
    with its client.
    """
    try:
        answer = await accept(await request.body())
        if answer.is_streamed:
            return StreamingResponse(_events(answer), media_type="text/event-stream")
        return Response(await answer.body(), media_type="application/json")
    except Exception as error:  # of any kind: the table of statuses has a row for all others
        log_failure(error, str(request.url.path))
        reply = error_reply(error)
        return Response(
            reply.body, reply.status, headers=reply.headers, media_type="application/json"
        )


async def _events(answer: Answer) -> AsyncIterator[bytes]:
    """Left early, when the client goes away, this cancels the request."""
    async with aclosing(answer.events()) as events:
        async for data in events:
            yield data


app = create_app(Engine())
"""For uvicorn: the built-in model on the CPU."""
