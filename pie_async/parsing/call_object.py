"""One call of a tool in JSON, `{"name": ..., "arguments": {...}}`, while it is being written."""

from __future__ import annotations

import json
from collections.abc import Callable

from pie_async.parsing.events import CallArguments, CallBegan, Event

NAME_KEYS = frozenset({"name"})
ARGUMENT_KEYS = frozenset({"arguments", "parameters"})
_WHITE_SPACE = " \t\r\n"


class CallObject:
    """Reads the characters of one object. Arguments pass as they are written, letter by letter.

    Before the name is known nothing passes. Other keys are left out. It does not check JSON: what
    is inside a value is the model's affair.

    Attributes:
        taken: everything read until the call began.
        is_done: the object is closed.
        is_wrong: this is no call: no object, or closed without the name of a tool.
    """

    def __init__(self, is_tool: Callable[[str], bool] = bool) -> None:
        self._is_tool = is_tool
        self.taken = ""
        self.is_done = False
        self.is_wrong = False
        self.has_begun = False
        self._depth = 0
        self._in_string = False
        self._is_escaped = False
        self._key: str | None = None
        self._piece = ""
        """Of the key or value that is being read, if it is kept."""
        self._is_value = False
        self._early = ""
        """Arguments that came before the name."""
        self._has_arguments = False

    def read(self, text: str) -> tuple[list[Event], str]:
        """What is certain, and the text after the object."""
        events: list[Event] = []
        for at, char in enumerate(text):
            if not self.has_begun:
                self.taken += char
            events += self._step(char)
            if self.is_done or self.is_wrong:
                return events, text[at + 1 :]
        return events, ""

    def _step(self, char: str) -> list[Event]:
        if self._depth == 0:
            if char == "{":
                self._depth = 1
            elif char not in _WHITE_SPACE:
                self.is_wrong = True
            return []
        is_outside = self._depth == 1 and not self._in_string
        if is_outside and char in ",:}":
            return self._structure(char)
        self._track(char)
        if self._is_value and (self._piece or char not in _WHITE_SPACE):
            return self._value(char)
        if not self._is_value:
            self._piece += char
        return []

    def _track(self, char: str) -> None:
        """Strings and depth."""
        if self._is_escaped:
            self._is_escaped = False
        elif self._in_string:
            self._is_escaped = char == "\\"
            self._in_string = char != '"'
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1

    def _structure(self, char: str) -> list[Event]:
        """A comma, a colon or the end, of the object itself."""
        if char == ":" and not self._is_value:
            self._key = _string(self._piece)
            self._is_value, self._piece = True, ""
            return []
        events = self._value_ended() if self._is_value else []
        self._is_value, self._piece = False, ""
        if char == "}" and not self.is_wrong:
            self.is_done = self.has_begun
            self.is_wrong = not self.has_begun
            if self.is_done and not self._has_arguments:
                events.append(CallArguments("{}"))
        return events

    def _value(self, char: str) -> list[Event]:
        if self._key in NAME_KEYS:
            self._piece += char
            return []
        self._piece = char  # something is there; what, nobody asks
        if self._key not in ARGUMENT_KEYS:
            return []
        self._has_arguments = True
        if self.has_begun:
            return [CallArguments(char)] if self._depth > 1 or char not in _WHITE_SPACE else []
        self._early += char
        return []

    def _value_ended(self) -> list[Event]:
        if self._key not in NAME_KEYS or self.has_begun:
            return []
        name = _string(self._piece)
        if name is None or not self._is_tool(name):
            self.is_wrong = True
            return []
        self.has_begun = True
        events: list[Event] = [CallBegan(name)]
        if self._early:
            events.append(CallArguments(self._early.rstrip(_WHITE_SPACE)))
        return events


def _string(text: str) -> str | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) else None
