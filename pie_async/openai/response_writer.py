"""Engine outputs -> responses of /v1/responses, streamed and whole."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pie_async.openai.errors import ErrorReply
from pie_async.openai.framing import Framing, encoder
from pie_async.openai.response_items import (
    CallItem,
    Incomplete,
    InputDetails,
    Item,
    MessageItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
    ResponseObject,
    ResponseUsage,
    Status,
    StreamEvent,
    with_status,
)
from pie_async.openai.response_request import ResponsesRequest, TextFormat, tools_sent
from pie_async.openai.responses import Response, Usage
from pie_async.openai.speaker import Speaker, new_call_id
from pie_async.openai.usage import choice_end
from pie_async.outputs import RequestOutput
from pie_async.parsing.events import CallArguments, CallBegan, Content, Event, Reasoning
from pie_async.sampling_params import SamplingParams


class ResponseWriter:
    """Writes the events or the response of one request, whose only choice becomes a list of items.

    Args:
        response: what was asked for, with nothing in it yet.
        speaker: tells content, thoughts and calls apart.
    """

    def __init__(self, response: ResponseObject, speaker: Speaker) -> None:
        self.framing = Framing(_named_frames)
        self._response = response
        self._speaker = speaker
        self._items: list[Item] = []
        self._open: _OpenItem | None = None
        self._number = 0
        self._is_cut = False
        """The output ended because it was long enough."""

    def opening(self) -> Iterator[StreamEvent]:
        """What is sent before any output."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._response)

    def events(self, _prompt_index: int, output: RequestOutput) -> bytes:
        """What a delta output is sent as."""
        return _named_frames(self._news(output))

    def _news(self, output: RequestOutput) -> Iterator[StreamEvent]:
        for choice in output.outputs:
            end = choice_end(choice)
            self._is_cut |= end == "length"
            for event in self._speaker.events(choice.text, is_last=end is not None):
                yield from self._said(event)

    def ending(self, usage: Usage) -> Iterator[StreamEvent]:
        """The last item's end, and the whole response."""
        if self._open is None and not self._items:
            yield from self._begin(_OpenItem("message", len(self._items)))
        yield from self._close()
        response = self._finished(usage)
        yield self._event(f"response.{response.status}", response=response)

    def failure(self, reply: ErrorReply) -> bytes:
        """The event that a stream ends with when it failed."""
        detail = reply.detail
        code, param = detail.code or detail.type, detail.param
        return _named_frames([self._event("error", code=code, message=detail.message, param=param)])

    def response(self, outputs: Sequence[RequestOutput], usage: Usage) -> ResponseObject:
        """The whole response from the final output."""
        for output in outputs:
            for _ in self._news(output):
                pass
        for _ in self.ending(usage):
            pass
        return self._finished(usage)

    def _finished(self, usage: Usage) -> ResponseObject:
        return with_status(
            self._response,
            "incomplete" if self._is_cut else "completed",
            output=self._items,
            usage=ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=InputDetails(
                    cached_tokens=usage.prompt_tokens_details.cached_tokens
                ),
                output_tokens=usage.completion_tokens,
                total_tokens=usage.total_tokens,
            ),
            incomplete_details=Incomplete() if self._is_cut else None,
        )

    # --- items --------------------------------------------------------------------------------

    def _said(self, event: Event) -> Iterator[StreamEvent]:
        match event:
            case CallBegan():
                yield from self._close()
                yield from self._begin(_OpenItem("function_call", len(self._items), event.name))
            case CallArguments():
                yield self._delta("function_call_arguments.delta", event.text)
            case Content() | Reasoning():
                kind = "message" if isinstance(event, Content) else "reasoning"
                if self._open is None or self._open.kind != kind:
                    yield from self._close()
                    yield from self._begin(_OpenItem(kind, len(self._items)))
                name = "output_text" if kind == "message" else "reasoning_text"
                yield self._delta(f"{name}.delta", event.text)

    def _begin(self, item: _OpenItem) -> Iterator[StreamEvent]:
        self._open = item
        yield self._event(
            "response.output_item.added", output_index=item.index, item=item.so_far("in_progress")
        )
        if item.kind != "function_call":
            yield self._of_part("response.content_part.added", part=item.part())

    def _delta(self, name: str, text: str) -> StreamEvent:
        assert self._open is not None
        self._open.pieces.append(text)
        if name == "function_call_arguments.delta":
            return self._of_item(f"response.{name}", delta=text)
        logprobs: dict[str, Any] = {"logprobs": ()} if name == "output_text.delta" else {}
        return self._of_part(f"response.{name}", delta=text, **logprobs)

    def _close(self) -> Iterator[StreamEvent]:
        item = self._open
        if item is None:
            return
        text = "".join(item.pieces)
        if item.kind == "function_call":
            yield self._of_item(
                "response.function_call_arguments.done", arguments=text, name=item.name
            )
        elif item.kind == "message":
            yield self._of_part("response.output_text.done", text=text, logprobs=())
        else:
            yield self._of_part("response.reasoning_text.done", text=text)
        if item.kind != "function_call":
            yield self._of_part("response.content_part.done", part=item.part())
        done = item.so_far("incomplete" if self._is_cut else "completed", is_done=True)
        self._items.append(done)
        self._open = None
        yield self._event("response.output_item.done", output_index=item.index, item=done)

    def _of_item(self, kind: str, /, **fields: Any) -> StreamEvent:
        assert self._open is not None
        return self._event(
            kind, output_index=self._open.index, item_id=self._open.item_id, **fields
        )

    def _of_part(self, name: str, **fields: Any) -> StreamEvent:
        return self._of_item(name, content_index=0, **fields)

    def _event(self, kind: str, /, **fields: Any) -> StreamEvent:
        event = StreamEvent(type=kind, sequence_number=self._number, **fields)
        self._number += 1
        return event


def new_response(
    request: ResponsesRequest, params: SamplingParams, response_id: str, model: str
) -> ResponseObject:
    """A response with nothing in it yet: what was asked for."""
    effort = None if request.reasoning is None else request.reasoning.effort
    text_format = None if request.text is None else request.text.format
    sent = {"type": "text"} if text_format is None else _format_sent(text_format)
    return ResponseObject(
        id=response_id,
        created_at=int(time.time()),
        status="in_progress",
        model=model,
        output=[],
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        metadata=request.metadata or {},
        parallel_tool_calls=request.parallel_tool_calls is not False,
        reasoning={"effort": effort, "summary": None},
        temperature=params.temperature,
        text={"format": sent},
        tool_choice=request.tool_choice or "auto",
        tools=tools_sent(request.tools),
        top_p=params.top_p,
    )


def _format_sent(given: TextFormat) -> dict[str, Any]:
    if given.type != "json_schema":
        return {"type": given.type}
    return {
        "type": "json_schema",
        "name": given.name or "",
        "schema": given.schema,
        "strict": bool(given.strict),
    }


_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


class _OpenItem:
    """An item that is being written."""

    def __init__(self, kind: str, index: int, name: str = "") -> None:
        self.kind = kind
        self.index = index
        self.name = name
        self.item_id = f"{_PREFIXES[kind]}_{uuid.uuid4().hex}"
        self.call_id = new_call_id()
        self.pieces: list[str] = []

    def part(self) -> OutputText | ReasoningText:
        """Its only part."""
        text = "".join(self.pieces)
        return OutputText(text=text) if self.kind == "message" else ReasoningText(text=text)

    def so_far(self, status: Status, *, is_done: bool = False) -> Item:
        """The item with what was written; its parts come with it when it is done."""
        text = "".join(self.pieces)
        if self.kind == "function_call":
            return CallItem(
                id=self.item_id, status=status, call_id=self.call_id, name=self.name, arguments=text
            )
        if self.kind == "message":
            said = [OutputText(text=text)] if is_done else []
            return MessageItem(id=self.item_id, status=status, content=said)
        thought = [ReasoningText(text=text)] if is_done else []
        return ReasoningItem(id=self.item_id, status=status, content=thought)


def _named_frames(events: Iterable[Response]) -> bytes:
    """Each as an event of its type's name."""
    return b"".join(
        [
            b"event: " + event.type.encode() + b"\ndata: " + encoder.encode(event) + b"\n\n"
            for event in events
            if isinstance(event, StreamEvent)
        ]
    )
