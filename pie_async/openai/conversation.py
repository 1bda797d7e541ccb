"""A chat request's messages, as the model's chat template takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from pie_async.errors import InvalidRequest

MAX_MESSAGES = 16_384
"""Most messages of a request, and most parts of their contents."""

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}
"""OpenAI's "developer" takes the place of "system"; templates know only the latter."""


_TEXT_PARTS = ("text", "input_text", "output_text")
"""The latter two are those of /v1/responses."""


class ContentPart(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One part of a message's content; only text can be answered."""

    type: Annotated[str, msgspec.Meta(extra_json_schema={"const": "text"})]
    text: str | None = None


class CalledFunction(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What was called."""

    name: str
    arguments: str = ""
    """A JSON object, as text."""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A call that the assistant made."""

    id: str = ""
    type: str = "function"
    function: CalledFunction


class Message(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One turn of a conversation."""

    role: Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(_ROLES)})]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    """Of the assistant."""
    tool_call_id: str | None = None
    """Of a tool: which call this is the outcome of."""
    reasoning_content: str | None = None
    """Of the assistant: what it thought."""


def read_conversation(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    """A role and a text per message, and what belongs to calls of tools.

    Raises:
        InvalidRequest: too many, or a role or a content that cannot be rendered, e.g.
            `messages[2].content[0].type`.
    """
    if not messages:
        raise InvalidRequest("messages must hold at least one message", param="messages")
    parts = sum(
        len(each.tool_calls or ()) + (len(each.content) if isinstance(each.content, list) else 0)
        for each in messages
    )
    if (most := max(len(messages), parts)) > MAX_MESSAGES:
        raise InvalidRequest(
            f"messages has {most} messages or parts; at most {MAX_MESSAGES} are read",
            param="messages",
        )
    return [read_turn(each, f"messages[{index}]") for index, each in enumerate(messages)]


def read_turn(message: Message, where: str) -> dict[str, Any]:
    """As templates read it; `where` is what the client calls it."""
    role = _ROLES.get(message.role)
    if role is None:
        raise InvalidRequest(
            f"{where}.role is {message.role[:40]!r}; it must be one of {', '.join(_ROLES)}",
            param=f"{where}.role",
        )
    turn: dict[str, Any] = {"role": role, "content": _text(message, where)}
    if role == "assistant":
        if message.tool_calls:
            turn["tool_calls"] = [
                _call(call, f"{where}.tool_calls[{number}]")
                for number, call in enumerate(message.tool_calls)
            ]
        if message.reasoning_content:
            turn["reasoning_content"] = message.reasoning_content
    elif message.tool_calls:
        raise InvalidRequest(
            f"{where}.tool_calls is for messages of the assistant", param=f"{where}.tool_calls"
        )
    if role == "tool":
        if message.tool_call_id is None:
            raise InvalidRequest(f"{where}.tool_call_id is required", param=f"{where}.tool_call_id")
        turn["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            turn["name"] = message.name
    return turn


def _text(message: Message, where: str) -> str:
    if message.content is None:
        if message.role == "assistant" and message.tool_calls:
            return ""
        raise InvalidRequest(f"{where}.content is required", param=f"{where}.content")
    if isinstance(message.content, str):
        return message.content
    texts = [
        _part_text(part, f"{where}.content[{number}]")
        for number, part in enumerate(message.content)
    ]
    return "\n".join(texts)  # joined as vLLM joins them


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    """As templates read it: with the arguments as an object."""
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        raise InvalidRequest(
            f"{where}.function.arguments must be the text of a JSON object",
            param=f"{where}.function.arguments",
        ) from None
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _part_text(part: ContentPart, where: str) -> str:
    if part.type not in _TEXT_PARTS:
        raise InvalidRequest(
            f"{where}.type is {part.type[:40]!r}; only text content is supported",
            param=f"{where}.type",
        )
    if part.text is None:
        raise InvalidRequest(f"{where}.text is required", param=f"{where}.text")
    return part.text
