"""One handler per endpoint: decode, submit, answer; whoever goes away is cancelled."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec
from aiohttp import web

import pie_async
from pie_async.api.body import BodyRoom, read_body
from pie_async.api.in_flight import InFlight
from pie_async.api.liveness import is_stuck
from pie_async.api.sse import send_body, send_events
from pie_async.errors import EngineStopped
from pie_async.openai.answer import Answer
from pie_async.openai.backend import Backend
from pie_async.openai.openapi import openapi_document
from pie_async.openai.responses import Health, Readiness, Version
from pie_async.openai.service import OpenAIService

T = TypeVar("T")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one request may take of the server."""

    max_body_bytes: int
    bodies: int = 64
    """Room for so many of the largest bodies; smaller ones are more."""
    body_timeout_s: float = 60.0
    stall_timeout_s: float = 60.0
    """How long a client may take nothing of its stream."""


class Handlers:
    """The endpoints of one engine."""

    def __init__(
        self, backend: Backend, service: OpenAIService, in_flight: InFlight, limits: Limits
    ) -> None:
        self._backend = backend
        self._service = service
        self._in_flight = in_flight
        self._limits = limits
        self._room = BodyRoom(limits.bodies * limits.max_body_bytes)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/chat/completions"""
        return await self._answer(request, self._service.chat)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/completions"""
        return await self._answer(request, self._service.completion)

    async def respond(self, request: web.Request) -> web.StreamResponse:
        """POST /v1/responses"""
        return await self._answer(request, self._service.respond)

    async def tokenize(self, request: web.Request) -> web.Response:
        """POST /tokenize"""
        return _json(await self._read(request, self._service.tokenize))

    async def detokenize(self, request: web.Request) -> web.Response:
        """POST /detokenize"""
        return _json(await self._read(request, self._service.detokenize))

    async def models(self, _request: web.Request) -> web.Response:
        """GET /v1/models"""
        return _json(self._service.models())

    async def model(self, request: web.Request) -> web.Response:
        """GET /v1/models/{model}"""
        return _json(self._service.model(request.match_info["model"]))

    async def version(self, _request: web.Request) -> web.Response:
        """GET /version"""
        return _json(Version(version=pie_async.__version__))

    async def openapi(self, _request: web.Request) -> web.Response:
        """GET /openapi.json"""
        return web.Response(
            body=openapi_document(pie_async.__version__), content_type="application/json"
        )

    async def health(self, _request: web.Request) -> web.Response:
        """GET /health: liveness alone; a full or draining server is healthy."""
        if not self._backend.is_running:
            raise EngineStopped("the engine is not running")
        if is_stuck(self._backend.stats()):
            raise EngineStopped("the engine makes no progress")
        return _json(Health())

    async def ready(self, _request: web.Request) -> web.Response:
        """GET /ready: whether requests are admitted; not while draining or restarting."""
        if not self._backend.is_accepting or self._in_flight.is_draining:
            raise EngineStopped("the engine admits no requests now")
        return _json(Readiness())

    async def _answer(
        self, request: web.Request, accept: Callable[[bytes], Awaitable[Answer]]
    ) -> web.StreamResponse:
        with self._in_flight.admit():
            answer = await self._read(request, accept)
            try:
                with self._in_flight.answering(answer):
                    return await self._send(request, answer)
            finally:
                await answer.aclose()

    async def _read(self, request: web.Request, accept: Callable[[bytes], Awaitable[T]]) -> T:
        """What becomes of the body, for which there is room until then."""
        with self._room.share() as share:
            body = await read_body(
                request,
                share,
                max_bytes=self._limits.max_body_bytes,
                timeout_s=self._limits.body_timeout_s,
            )
            return await accept(body)

    async def _send(self, request: web.Request, answer: Answer) -> web.StreamResponse:
        send = send_events if answer.is_streamed else send_body
        return await send(request, answer, stall_timeout_s=self._limits.stall_timeout_s)


def _json(content: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(content), content_type="application/json")
