"""The API described for machines: OpenAPI, made from the structs that are read and sent."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import msgspec

from pie_async.openai.errors import ErrorBody
from pie_async.openai.requests import ChatRequest, CompletionRequest
from pie_async.openai.response_items import ResponseObject, StreamEvent
from pie_async.openai.response_request import ResponsesRequest
from pie_async.openai.responses import (
    ChatChunk,
    ChatResponse,
    CompletionResponse,
    Health,
    ModelCard,
    ModelList,
    Readiness,
    Text,
    Tokens,
    Version,
)
from pie_async.openai.token_requests import DetokenizeRequest, TokenizeRequest


class Operation(NamedTuple):
    """One method of one path."""

    path: str
    method: str
    summary: str
    answer: type | str
    """A struct as JSON, or a media type."""
    body: type | None = None
    event: type | None = None
    """What the events of a stream hold."""
    is_open: bool = False
    """Needs no API key."""
    is_endless: bool = False
    """A stream that ends with the server."""


OPERATIONS = (
    Operation(
        "/v1/chat/completions",
        "post",
        "Go on with a conversation",
        ChatResponse,
        body=ChatRequest,
        event=ChatChunk,
    ),
    Operation(
        "/v1/completions",
        "post",
        "Go on with texts or token ids",
        CompletionResponse,
        body=CompletionRequest,
        event=CompletionResponse,
    ),
    Operation(
        "/v1/responses",
        "post",
        "Go on with a conversation, in items; nothing is kept",
        ResponseObject,
        body=ResponsesRequest,
        event=StreamEvent,
    ),
    Operation("/tokenize", "post", "The tokens of a prompt", Tokens, body=TokenizeRequest),
    Operation("/detokenize", "post", "The text of tokens", Text, body=DetokenizeRequest),
    Operation("/v1/models", "get", "The models served here", ModelList),
    Operation("/v1/models/{model}", "get", "One of them", ModelCard),
    Operation("/health", "get", "Whether the server is alive", Health, is_open=True),
    Operation("/ready", "get", "Whether requests are admitted", Readiness),
    Operation("/metrics", "get", "Figures for Prometheus", "text/plain"),
    Operation("/version", "get", "The server's version", Version),
    Operation("/openapi.json", "get", "This document", "application/json"),
    Operation("/", "get", "The live page", "text/html", is_open=True),
    Operation(
        "/view",
        "get",
        "What the engine is doing, as events",
        "text/event-stream",
        is_endless=True,
    ),
    Operation("/trace", "get", "The last iterations, for Perfetto", "application/json"),
)

_REFUSALS = {
    "400": "Something in the request is wrong; `param` names the field",
    "401": "No valid API key",
    "404": "Another model is served",
    "413": "The body is too large",
    "415": "The body is not declared as JSON",
    "429": "Too much is queued; come back after `Retry-After` seconds",
    "503": "The engine is stopped, draining or restarting; come back after `Retry-After` seconds",
    "default": "Every other refusal",
}


@functools.cache
def openapi_document(version: str) -> bytes:
    """An OpenAPI 3.1 document in JSON; `version` is the server's."""
    kinds = {kind for each in OPERATIONS for kind in (each.answer, each.body, each.event)}
    structs = [kind for kind in kinds if isinstance(kind, type)]
    _, schemas = msgspec.json.schema_components(
        [*structs, ErrorBody], ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _described(operation)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {
                "title": "pie_async",
                "version": version,
                "description": "OpenAI's API over an engine whose KV cache pools host memory.",
            },
            "paths": paths,
            "components": {
                "schemas": schemas,
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
        },
        order="sorted",
    )


def _described(operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "Success", "content": _content(operation)},
            **{status: _refusal(text) for status, text in _REFUSALS.items()},
        },
        "security": [] if operation.is_open else [{}, {"key": []}],
    }
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _reference(operation.body)}},
        }
    if "{model}" in operation.path:
        described["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return described


def _content(operation: Operation) -> dict[str, Any]:
    if isinstance(operation.answer, str):
        return {operation.answer: {"schema": {}}}
    content: dict[str, Any] = {"application/json": {"schema": _reference(operation.answer)}}
    if operation.event is not None:
        content["text/event-stream"] = {
            "schema": {
                "type": "object",
                "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
                "required": ["data"],
                "description": f"Events with a {operation.event.__name__} each, but in "
                "/v1/responses then [DONE]; an ErrorBody, there an event of type error, where it "
                "fails",
            }
        }
    return content


def _refusal(text: str) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference(ErrorBody)}}
    return {"description": text, "content": content}


def _reference(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}
