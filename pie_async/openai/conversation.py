"""A chat request's messages, as the model's chat template takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec

from pie_async.errors import InvalidRequest

MAX_MESSAGES = 16_384
"""Most messages of a request, and most parts of their contents."""

NotSupported = Annotated[
    msgspec.Raw, msgspec.Meta(description="Not supported: leave it out, or null or [].")
]


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""OpenAI's "developer" takes the place of "system"; templates know only the latter."""
_NULL = msgspec.Raw(b"null")


class ContentPart(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One part of a message's content; only text can be answered."""

    type: Annotated[str, msgspec.Meta(extra_json_schema={"const": "text"})]
    text: str | None = None


class Message(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One turn of a conversation."""

    role: Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(_ROLES)})]
    content: str | list[ContentPart] | None = None
    tool_calls: NotSupported = msgspec.field(default_factory=lambda: _NULL)


def read_conversation(messages: Sequence[Message]) -> list[Mapping[str, str]]:
    """A role and a text per message.

    Raises:
        InvalidRequest: too many, or a role or a content that cannot be rendered, e.g.
            `messages[2].content[0].type`.
    """
    if not messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    parts = sum(len(each.content) for each in messages if isinstance(each.content, list))
    if (most := max(len(messages), parts)) > MAX_MESSAGES:
        raise InvalidRequest(
            f"messages has {most} messages or parts; at most {MAX_MESSAGES} are read",
            param="messages",
        )
    return [_turn(message, index) for index, message in enumerate(messages)]


def _turn(message: Message, index: int) -> dict[str, str]:
    where = f"messages[{index}]"
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequest(
            f"{where}.role is {message.role[:40]!r}; it must be one of {', '.join(_ROLES)}",
            param=f"{where}.role",
        )
    if bytes(message.tool_calls) not in (b"null", b"[]"):
        raise InvalidRequest(
            f"{where}.tool_calls is not supported by this server; leave it out",
            param=f"{where}.tool_calls",
        )
    if message.content is None:
        raise InvalidRequest(f"{where}.content is required", param=f"{where}.content")
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    texts = [
        _part_text(part, f"{where}.content[{number}]")
        for number, part in enumerate(message.content)
    ]
    return {"role": role, "content": "\n".join(texts)}  # joined as vLLM joins them


def _part_text(part: ContentPart, where: str) -> str:
    if part.type != "text":
        raise InvalidRequest(
            f"{where}.type is {part.type[:40]!r}; only text content is supported",
            param=f"{where}.type",
        )
    if part.text is None:
        raise InvalidRequest(f"{where}.text is required", param=f"{where}.text")
    return part.text
