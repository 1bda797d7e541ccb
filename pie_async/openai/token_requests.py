"""Requests of /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from pie_async.errors import InvalidRequest
from pie_async.openai.conversation import MAX_MESSAGES, Message, read_conversation
from pie_async.openai.prompts import MAX_TOKEN_IDS

TokenId = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class TokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /tokenize: a text or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[Message], msgspec.Meta(extra_json_schema={"maxItems": MAX_MESSAGES})] | None
    ) = None

    def check(self) -> None:
        """Raises InvalidRequest unless there is one of the two."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("one of prompt and messages is required", param="prompt")

    def prompts(self) -> list[str] | list[list[Mapping[str, Any]]]:
        """The one there is. Raises: see `read_conversation`."""
        if self.prompt is not None:
            return [self.prompt]
        return [read_conversation(self.messages or [])]


class DetokenizeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /detokenize."""

    tokens: Annotated[list[TokenId], msgspec.Meta(extra_json_schema={"maxItems": MAX_TOKEN_IDS})]
    model: str | None = None

    def check(self) -> None:
        """Raises InvalidRequest if there are too many."""
        if len(self.tokens) > MAX_TOKEN_IDS:
            raise InvalidRequest(
                f"tokens has {len(self.tokens)} ids; at most {MAX_TOKEN_IDS} are read",
                param="tokens",
            )

    def prompts(self) -> list[list[int]]:
        """The tokens."""
        return [self.tokens]
