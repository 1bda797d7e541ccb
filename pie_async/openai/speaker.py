"""One choice of a chat whose text holds more than content: thoughts, calls of tools."""

from __future__ import annotations

import uuid

import msgspec

from pie_async.openai.responses import (
    ChatDelta,
    ChatMessage,
    FunctionCall,
    FunctionDelta,
    ToolCall,
    ToolCallDelta,
)
from pie_async.parsing.events import (
    CallArguments,
    CallBegan,
    Content,
    Event,
    Parser,
    Reasoning,
    merged,
)


class Speaker:
    """Turns a choice's text into deltas, or into one message."""

    def __init__(self, parser: Parser, *, one_call_only: bool) -> None:
        self._parser = parser
        self._most_calls = 1 if one_call_only else None
        self._num_calls = 0

    @property
    def has_called(self) -> bool:
        return self._num_calls > 0

    def events(self, text: str, *, is_last: bool) -> list[Event]:
        """What the next text says; calls that are not wanted are left out."""
        events = self._parser.feed(text) if text else []
        if is_last:
            events += self._parser.flush()
        return [event for event in merged(events) if self._is_wanted(event)]

    def _is_wanted(self, event: Event) -> bool:
        if isinstance(event, CallBegan):
            self._num_calls += 1
        is_call = isinstance(event, (CallBegan, CallArguments))
        return not is_call or self._most_calls is None or self._num_calls <= self._most_calls

    def deltas(self, text: str, *, is_last: bool) -> list[ChatDelta]:
        """What the next text is sent as."""
        return [self._delta(event) for event in self.events(text, is_last=is_last)]

    def _delta(self, event: Event) -> ChatDelta:
        match event:
            case Content():
                return ChatDelta(content=event.text)
            case Reasoning():
                return ChatDelta(reasoning_content=event.text)
            case CallBegan():
                call = ToolCallDelta(
                    index=self._num_calls - 1,
                    id=new_call_id(),
                    type="function",
                    function=FunctionDelta(name=event.name, arguments=""),
                )
            case CallArguments():
                call = ToolCallDelta(
                    index=self._num_calls - 1, function=FunctionDelta(arguments=event.text)
                )
        return ChatDelta(tool_calls=[call])

    def message(self, text: str) -> ChatMessage:
        """What the whole text says."""
        content, thoughts = [], []
        calls: list[tuple[str, list[str]]] = []
        for event in self.events(text, is_last=True):
            match event:
                case Content():
                    content.append(event.text)
                case Reasoning():
                    thoughts.append(event.text)
                case CallBegan():
                    calls.append((event.name, []))
                case CallArguments():
                    calls[-1][1].append(event.text)
        return ChatMessage(
            content="".join(content) if content or not calls else None,
            reasoning_content="".join(thoughts) if thoughts else msgspec.UNSET,
            tool_calls=[
                ToolCall(
                    id=new_call_id(), function=FunctionCall(name=name, arguments="".join(pieces))
                )
                for name, pieces in calls
            ]
            or msgspec.UNSET,
        )


def new_call_id() -> str:
    """A name for a call, by which its outcome is sent back."""
    return f"call_{uuid.uuid4().hex[:24]}"
