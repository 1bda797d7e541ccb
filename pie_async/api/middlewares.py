"""What every request passes through: an id, errors as OpenAI's JSON, the API key, a count."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

from aiohttp import web

from pie_async.api.auth import ApiKeys
from pie_async.api.hosts import AllowedHosts
from pie_async.api.listener import Connection
from pie_async.openai.answer import log_failure
from pie_async.openai.errors import ErrorDetail, ErrorReply, error_reply

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler, Middleware

REQUEST_ID_HEADER = "X-Request-Id"
UNGUARDED_ROUTE = "health"
"""Name of the route that tells probes, which carry no API key, that the server is alive."""
PAGE_ROUTE = "page"
"""Of the live page: a browser opens it without a key, and it asks for one to show anything."""

_REQUEST_ID = web.RequestKey("request_id", str)
_HARMLESS_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def request_id(request: web.Request) -> str:
    """The client's id for the request if it is harmless in logs and headers, else our own."""
    if _REQUEST_ID not in request:
        sent = request.headers.get(REQUEST_ID_HEADER, "")
        is_harmless = _HARMLESS_ID.fullmatch(sent) is not None
        request[_REQUEST_ID] = sent if is_harmless else f"req_{uuid.uuid4().hex}"
    return request[_REQUEST_ID]


async def name_response(request: web.Request, response: web.StreamResponse) -> None:
    """A signal handler: every response carries its request's id."""
    response.headers[REQUEST_ID_HEADER] = request_id(request)


def errors_as_json(count: Callable[[str, int], None] | None = None) -> Middleware:
    """Turns whatever is raised into a response, and has all responses counted: route, status."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        connection = request.protocol
        if isinstance(connection, Connection):
            connection.begin()
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = _http_error(request, error)
        except Exception as error:  # the HTTP edge: nothing may reach the client unexplained
            response = _error_response(request, error)
        finally:
            if isinstance(connection, Connection):
                connection.end()
        if count is not None:
            count(_route(request), response.status)
        _leave_compressed(request, response)
        return response

    return middleware


def _leave_compressed(request: web.Request, response: web.StreamResponse) -> None:
    """What was not read of a compressed body stays compressed, and the connection ends.

    aiohttp reads to the end what a handler left, so that the client sees the answer; it would
    decompress it, gigabytes at worst, without a pause.
    """
    if not request.content.is_eof() and "Content-Encoding" in request.headers:
        request.protocol.close()  # from here on it throws away what comes
        response.force_close()


def require_known_host(hosts: AllowedHosts) -> Middleware:
    """Guards every route against pages of other sites."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        hosts.check(request.headers.get("Host"), request.headers.get("Origin"))
        return await handler(request)

    return middleware


def require_api_key(keys: ApiKeys) -> Middleware:
    """Guards every route but the liveness probe and the page, unknown ones included."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.match_info.route.name not in (UNGUARDED_ROUTE, PAGE_ROUTE):
            keys.check(request.headers.get("Authorization"))
        return await handler(request)

    return middleware


async def expect_body(request: web.Request) -> web.StreamResponse | None:
    """An `expect_handler`: aiohttp's own, with its refusal in JSON."""
    if request.headers.get("Expect", "").lower() != "100-continue":
        return _http_error(request, web.HTTPExpectationFailed(text=""))
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # it is no part of the answer
    return None


def _error_response(request: web.Request, error: Exception) -> web.Response:
    reply = error_reply(error)
    log_failure(error, request_id(request))
    return as_response(reply)


def _http_error(request: web.Request, error: web.HTTPException) -> web.StreamResponse:
    """aiohttp's own refusals: unknown paths, wrong methods."""
    if error.status < 400:
        raise error
    messages = {
        404: f"there is nothing at {request.path[:200]}; the API is under /v1",
        405: f"{request.method} is not possible at {request.path[:200]}",
        417: "the Expect header asks for something other than 100-continue",
    }
    detail = ErrorDetail(
        message=messages.get(error.status, error.reason),
        type="invalid_request_error" if error.status < 500 else "server_error",
        code={404: "unknown_url", 405: "method_not_allowed"}.get(error.status),
    )
    response = as_response(ErrorReply(status=error.status, detail=detail))
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


def as_response(reply: ErrorReply) -> web.Response:
    """What HTTP makes of it."""
    response = web.Response(
        status=reply.status,
        body=reply.body,
        headers=reply.headers,
        content_type="application/json",
    )
    if reply.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    if reply.status == 503:  # a load balancer should find another server
        response.force_close()
    return response


def _route(request: web.Request) -> str:
    """A label with few values, whatever clients ask for."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "unknown"
