"""What a parser makes of a model's output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol


class Content(NamedTuple):
    """Text for the user."""

    text: str


class Reasoning(NamedTuple):
    """Text that the model wrote for itself."""

    text: str


class CallBegan(NamedTuple):
    """The model calls a tool; its arguments follow."""

    name: str


class CallArguments(NamedTuple):
    """The next piece of the arguments' JSON, of the call that began last."""

    text: str


Event = Content | Reasoning | CallBegan | CallArguments


class Parser(Protocol):
    """One output's."""

    def feed(self, text: str) -> list[Event]:
        """What is certain now."""
        ...

    def flush(self) -> list[Event]:
        """The output is over: what was held back."""
        ...


class PlainParser:
    """All is for the user."""

    def feed(self, text: str) -> list[Event]:
        """See `Parser`."""
        return [Content(text)] if text else []

    def flush(self) -> list[Event]:
        """See `Parser`."""
        return []


class ArgumentsParser:
    """All is the arguments of one tool, whose call was forced."""

    def __init__(self, name: str) -> None:
        self._opening: list[Event] = [CallBegan(name)]

    def feed(self, text: str) -> list[Event]:
        """See `Parser`."""
        if not text:
            return []
        events, self._opening = [*self._opening, CallArguments(text)], []
        return events

    def flush(self) -> list[Event]:
        """See `Parser`."""
        return []


def held_back(text: str, tag: str) -> int:
    """How many of the last characters may be the beginning of `tag`."""
    longest = min(len(text), len(tag) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(tag[:n])), 0)


def merged(events: Iterable[Event]) -> list[Event]:
    """The same with neighbours of one kind in one piece."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, (Content, Reasoning, CallArguments)) and type(last) is type(event):
            assert isinstance(last, (Content, Reasoning, CallArguments))
            result[-1] = type(event)(last.text + event.text)
        else:
            result.append(event)
    return result


MakeParser = Callable[[], Parser]
