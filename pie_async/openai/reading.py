"""From a body's bytes to a request, without holding the event loop up."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Generic, TypeVar

import msgspec

from pie_async.errors import InvalidRequest
from pie_async.openai.backend import Prompt
from pie_async.openai.json_errors import wrong_type
from pie_async.openai.outline import (
    OUTLINE_OF_CHAT,
    OUTLINE_OF_COMPLETIONS,
    OUTLINE_OF_RESPONSES,
    OUTLINE_OF_TOKENS,
    Outline,
)
from pie_async.openai.requests import ChatRequest, CompletionRequest
from pie_async.openai.response_request import ResponsesRequest
from pie_async.openai.token_requests import DetokenizeRequest, TokenizeRequest

INLINE_BYTES = 32 * 1024
"""Longer bodies are read in a thread. Each step there holds the interpreter for tens of
milliseconds at most, whatever 4 MiB hold."""

RequestT = TypeVar(
    "RequestT",
    ChatRequest,
    CompletionRequest,
    ResponsesRequest,
    TokenizeRequest,
    DetokenizeRequest,
)


class RequestReader(Generic[RequestT]):
    """Reads one endpoint's bodies."""

    def __init__(self, kind: type[RequestT], outline: Outline) -> None:
        self._decoder: msgspec.json.Decoder[RequestT] = msgspec.json.Decoder(kind)
        self._outline = outline

    async def read(self, body: bytes) -> tuple[RequestT, Sequence[Prompt]]:
        """The request that the body spells, and its prompts.

        Raises:
            InvalidRequest: not JSON, a wrong type, or a field that is not supported.
        """
        if len(body) <= INLINE_BYTES:
            return self.read_now(body)
        return await asyncio.to_thread(self.read_now, body)

    def read_now(self, body: bytes) -> tuple[RequestT, Sequence[Prompt]]:
        """The same, wherever it is called."""
        if not body.strip():
            raise InvalidRequest("the body is empty; send a JSON object")
        try:
            self._outline.check(body)
            request = self._decoder.decode(body)
            request.check()
            return request, request.prompts()
        except msgspec.ValidationError as error:
            raise wrong_type(str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"the body is not JSON: {error}") from error
        except RecursionError as error:
            raise InvalidRequest("the body's JSON is nested too deeply") from error


CHAT_READER = RequestReader(ChatRequest, OUTLINE_OF_CHAT)
COMPLETION_READER = RequestReader(CompletionRequest, OUTLINE_OF_COMPLETIONS)
RESPONSES_READER = RequestReader(ResponsesRequest, OUTLINE_OF_RESPONSES)
TOKENIZE_READER = RequestReader(TokenizeRequest, OUTLINE_OF_TOKENS)
DETOKENIZE_READER = RequestReader(DetokenizeRequest, OUTLINE_OF_TOKENS)
