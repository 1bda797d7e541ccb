"""What /v1/responses sends: the response, its items, and the events of a stream."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from pie_async.openai.responses import Response

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Response, frozen=True, kw_only=True, tag_field="type", tag="output_text"):
    """Text for the user."""

    text: str
    annotations: tuple[Any, ...] = ()
    logprobs: tuple[Any, ...] = ()


class ReasoningText(Response, frozen=True, kw_only=True, tag_field="type", tag="reasoning_text"):
    """Text that the model wrote for itself."""

    text: str


class MessageItem(Response, frozen=True, kw_only=True, tag_field="type", tag="message"):
    """What the model said."""

    id: str
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class ReasoningItem(Response, frozen=True, kw_only=True, tag_field="type", tag="reasoning"):
    """What it thought."""

    id: str
    status: Status
    summary: tuple[Any, ...] = ()
    content: list[ReasoningText]


class CallItem(Response, frozen=True, kw_only=True, tag_field="type", tag="function_call"):
    """A tool that it wants called."""

    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


Item = MessageItem | ReasoningItem | CallItem


class InputDetails(Response, frozen=True, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(Response, frozen=True, kw_only=True):
    reasoning_tokens: int = 0
    """Not counted: thoughts are told from the text, not from tokens."""


class ResponseUsage(Response, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails = OutputDetails()
    total_tokens: int


class Incomplete(Response, frozen=True, kw_only=True):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(Response, frozen=True, kw_only=True):
    """Body of a response, and part of the first and last events of a stream."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Status
    model: str
    output: list[Item]
    usage: ResponseUsage | None = None
    error: None = None
    incomplete_details: Incomplete | None = None
    # what was asked for
    instructions: str | None = None
    max_output_tokens: int | None = None
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    reasoning: dict[str, str | None] = msgspec.field(default_factory=dict)
    store: Literal[False] = False
    """Nothing is kept: send the conversation with each request."""
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[Any]
    top_p: float
    truncation: Literal["disabled"] = "disabled"


class StreamEvent(Response, frozen=True, kw_only=True):
    """One event of a stream; which fields it has depends on its type."""

    type: str
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item: Item | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: tuple[Any, ...] | UnsetType = UNSET
    # of type "error"
    code: str | UnsetType | None = UNSET
    message: str | UnsetType = UNSET
    param: str | UnsetType | None = UNSET


def with_status(response: ResponseObject, status: Status, **changes: Any) -> ResponseObject:
    """The same response further on."""
    return msgspec.structs.replace(response, status=status, **changes)
