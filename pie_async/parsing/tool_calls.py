"""Calls of tools as the model families write them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, get_args

from pie_async.parsing.call_object import CallObject
from pie_async.parsing.events import Content, Event, Parser, held_back, merged

ToolFormat = Literal["hermes", "llama3"]
"""hermes: `<tool_call>{...}</tool_call>`, Qwen 2.5 and 3; llama3: bare JSON, Llama 3.1 to 3.3."""
TOOL_FORMATS: tuple[ToolFormat, ...] = get_args(ToolFormat)

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_PYTHON_TAG = "<|python_tag|>"


class _Machine:
    """A parser that is a state at a time: it takes text and returns what it leaves over."""

    def __init__(self) -> None:
        self._state: Callable[[str, list[Event]], str] = self._start
        self._held = ""

    def feed(self, text: str) -> list[Event]:
        """See `Parser`."""
        events: list[Event] = []
        self._held += text
        while self._held:
            state, before = self._state, self._held
            self._held = ""
            self._held = state(before, events)
            if self._state == state and self._held == before:
                break
        return merged(events)

    def flush(self) -> list[Event]:
        """See `Parser`."""
        raise NotImplementedError

    def _start(self, text: str, events: list[Event]) -> str:
        raise NotImplementedError


class HermesParser(_Machine):
    """Text with calls between tags. White space around calls is left out."""

    def __init__(self) -> None:
        super().__init__()
        self._call = CallObject()
        self._had_call = False

    def flush(self) -> list[Event]:
        """See `Parser`."""
        events: list[Event] = []
        if self._state == self._start:
            _add(events, self._held)
        elif self._state == self._in_call and not self._call.has_begun:
            _add(events, _OPEN + self._call.taken)
        self._held = ""
        return events

    def _start(self, text: str, events: list[Event]) -> str:
        if self._had_call:
            text = text.lstrip()
            if not text:
                return ""
        before, tag, rest = text.partition(_OPEN)
        if tag:
            _add(events, before.rstrip())
            self._call, self._state = CallObject(), self._in_call
            return rest
        keep = held_back(text, _OPEN)
        certain = text[: len(text) - keep].rstrip()  # white space waits: a call may follow
        if certain:
            self._had_call = False
        _add(events, certain)
        return text[len(certain) :]

    def _in_call(self, text: str, events: list[Event]) -> str:
        found, rest = self._call.read(text)
        events += found
        if self._call.is_done:
            self._state = self._after_call
        elif self._call.is_wrong:
            self._state = self._start
            if self._call.has_begun:
                return rest
            # Not what it looked like: let whoever reads it make something of it.
            self._had_call = False
            _add(events, _OPEN + self._call.taken)
        return rest

    def _after_call(self, text: str, events: list[Event]) -> str:
        del events
        _, tag, rest = text.partition(_CLOSE)
        if tag:
            self._state, self._had_call = self._start, True
            return rest
        return text[len(text) - held_back(text, _CLOSE) :]


class Llama3Parser(_Machine):
    """An output that is nothing but calls, apart by white space or `;`, or else is text.

    Args:
        tools: names; JSON that names none of them is text.
    """

    def __init__(self, tools: Collection[str]) -> None:
        super().__init__()
        self._tools = tools
        self._call = self._new_call()
        self._gap = ""

    def _new_call(self) -> CallObject:
        return CallObject(lambda name: name in self._tools)

    def flush(self) -> list[Event]:
        """See `Parser`."""
        events: list[Event] = []
        if self._state == self._in_call and not self._call.has_begun:
            _add(events, self._gap + self._call.taken)
        elif self._state == self._start and self._held.strip(" \t\r\n;"):
            _add(events, self._held)
        self._held = ""
        return events

    def _start(self, text: str, events: list[Event]) -> str:
        start = text.lstrip(" \t\r\n;" if self._gap == ";" else " \t\r\n")
        if not start or (len(start) < len(_PYTHON_TAG) and _PYTHON_TAG.startswith(start)):
            return text
        if start.startswith(_PYTHON_TAG):
            return start.removeprefix(_PYTHON_TAG)
        if start[0] != "{":
            self._state = self._text
            return text
        self._gap = text[: len(text) - len(start)]
        self._call, self._state = self._new_call(), self._in_call
        return start

    def _in_call(self, text: str, events: list[Event]) -> str:
        found, rest = self._call.read(text)
        events += found
        if self._call.is_done:
            self._state, self._gap = self._start, ";"
        elif self._call.is_wrong:
            self._state = self._text
            if not self._call.has_begun:
                _add(events, self._gap + self._call.taken)
        return rest

    def _text(self, text: str, events: list[Event]) -> str:
        _add(events, text)
        return ""


class ArrayParser(_Machine):
    """`[{"name": ..., "arguments": {...}}, ...]`: what calls that are required are made to be."""

    def __init__(self) -> None:
        super().__init__()
        self._call = CallObject()

    def flush(self) -> list[Event]:
        """See `Parser`."""
        return []

    def _start(self, text: str, events: list[Event]) -> str:
        del events
        at = text.find("{")
        if at < 0:
            return ""
        self._call, self._state = CallObject(), self._in_call
        return text[at:]

    def _in_call(self, text: str, events: list[Event]) -> str:
        found, rest = self._call.read(text)
        events += found
        if self._call.is_done or self._call.is_wrong:
            self._state = self._start
        return rest


def tool_parser(tool_format: ToolFormat, tools: Collection[str]) -> Parser:
    """A parser for one output of a model that was given these tools."""
    return HermesParser() if tool_format == "hermes" else Llama3Parser(tools)


def _add(events: list[Event], text: str) -> None:
    if text:
        events.append(Content(text))
