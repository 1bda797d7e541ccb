"""Errors as OpenAI spells them: the JSON body, the HTTP status and when to try again."""

from __future__ import annotations

import math
from typing import NamedTuple

import msgspec

from pie_async.errors import (
    DeviceFault,
    EngineStopped,
    GuideFailed,
    InvalidRequest,
    Overloaded,
    SequenceLost,
)

RETRY_AFTER_STOPPED_S = 5.0
"""What a client is told when the engine is closed or draining: time for a restart."""


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's error object: all four keys are always present."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every response with a status of 400 and above, and of an error event."""

    error: ErrorDetail


class ErrorReply(msgspec.Struct, frozen=True, kw_only=True):
    """All that a server says when a request fails."""

    status: int
    detail: ErrorDetail
    retry_after_s: float | None = None

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(self.detail))

    @property
    def event(self) -> bytes:
        """The same as a server-sent event, for failures after the headers are out."""
        return b"data: " + self.body + b"\n\n"

    @property
    def headers(self) -> dict[str, str]:
        """Headers by which OpenAI's clients decide whether and when to try again."""
        if self.retry_after_s is not None:
            return {"Retry-After": str(max(1, math.ceil(self.retry_after_s)))}
        return {"x-should-retry": "false"} if self.status >= 500 else {}


class ModelNotFound(InvalidRequest):
    """The request names a model that is not served here."""

    def __init__(self, name: str, *, served: str) -> None:
        shown = name if len(name) <= 200 else name[:200] + "..."
        super().__init__(
            f"the model {shown!r} is not served here; use {served!r}",
            param="model",
            code="model_not_found",
        )


class WrongApiKey(InvalidRequest):
    """The request carries no API key, or not one that this server knows."""

    def __init__(self) -> None:
        super().__init__(
            "no valid API key: send the header 'Authorization: Bearer KEY' with a key of this "
            "server",
            code="invalid_api_key",
        )


class HostNotAllowed(InvalidRequest):
    """The request was sent to a name, or from a page, that this server does not answer."""


class BodyTooLarge(InvalidRequest):
    """The request's body exceeds what the server reads."""

    def __init__(self, *, limit_bytes: int) -> None:
        super().__init__(
            f"the request's body exceeds {limit_bytes} bytes; shorten it, or have the server's "
            "operator raise max_body_bytes",
            code="body_too_large",
        )


class NotJson(InvalidRequest):
    """The Content-Type says that the body is not JSON in UTF-8."""


class BodyTimeout(InvalidRequest):
    """The request's body did not arrive in time."""


class EngineStarting(EngineStopped):
    """There is no engine yet."""

    code = "engine_starting"

    def __init__(self) -> None:
        super().__init__("the model is being loaded; try again soon")


class _Row(NamedTuple):
    kind: type[BaseException]
    status: int
    type: str
    code: str | None = None
    """Used where the error itself has none."""


_BAD = "invalid_request_error"
_ROWS = (  # most specific first
    _Row(ModelNotFound, 404, _BAD),
    _Row(WrongApiKey, 401, _BAD),
    _Row(HostNotAllowed, 403, _BAD),
    _Row(BodyTooLarge, 413, _BAD),
    _Row(NotJson, 415, _BAD, "unsupported_media_type"),
    _Row(BodyTimeout, 408, _BAD, "body_timeout"),
    _Row(InvalidRequest, 400, _BAD),
    _Row(Overloaded, 429, "rate_limit_error", "engine_overloaded"),
    _Row(EngineStopped, 503, "server_error", "engine_stopped"),
    _Row(DeviceFault, 503, "server_error", "engine_stopped"),
    _Row(SequenceLost, 503, "server_error", "sequence_lost"),
    _Row(GuideFailed, 422, _BAD, "guide_failed"),
)
_INTERNAL = _Row(BaseException, 500, "server_error", "internal_error")


def error_reply(error: BaseException) -> ErrorReply:
    """What the client is told about `error`.

    Errors that were not raised for a client's eyes (everything outside the table) get a
    generic text: an exception's own may hold addresses, paths or prompts.
    """
    row = next((row for row in _ROWS if isinstance(error, row.kind)), _INTERNAL)
    detail = ErrorDetail(
        message=_message(error, row),
        type=row.type,
        param=getattr(error, "param", None),
        code=getattr(error, "code", None) or row.code,
    )
    return ErrorReply(
        status=row.status, detail=detail, retry_after_s=_retry_after_s(error, row.status)
    )


def _message(error: BaseException, row: _Row) -> str:
    if row is _INTERNAL:
        return "internal error; see the server's log"
    if row.kind is DeviceFault:  # its text may quote the driver
        return "the device failed and the engine has to restart; try again later"
    return str(error)


def _retry_after_s(error: BaseException, status: int) -> float | None:
    if isinstance(error, Overloaded):
        return error.retry_after_s
    return RETRY_AFTER_STOPPED_S if status == 503 else None
