"""Thoughts between `<think>` and `</think>`, as Qwen3 and DeepSeek-R1 write them."""

from __future__ import annotations

from pie_async.parsing.events import Event, Parser, Reasoning, held_back

OPEN, CLOSE = "<think>", "</think>"


class ReasoningParser:
    """Takes the thoughts at an output's beginning apart; what follows is another parser's.

    White space around the tags is left out. Tags further on are text like any other.
    """

    def __init__(self, rest: Parser, *, is_thinking: bool = False) -> None:
        """`is_thinking`: the prompt ended with the opening tag."""
        self._rest = rest
        self._held = ""
        self._read = self._read_thoughts if is_thinking else self._read_opening
        self._is_fresh = True
        """Nothing but white space has come since the tag."""

    def feed(self, text: str) -> list[Event]:
        """See `Parser`."""
        return self._read(text)

    def flush(self) -> list[Event]:
        """See `Parser`."""
        held, self._held = self._held, ""
        if self._read == self._read_thoughts:
            return [Reasoning(held)] if held.strip() else []
        events = self._rest.feed(held) if self._read == self._read_opening else []
        return events + self._rest.flush()

    def _read_opening(self, text: str) -> list[Event]:
        self._held += text
        start = self._held.lstrip()
        if OPEN.startswith(start):
            return []  # white space, or a part of the tag
        held, self._held = self._held, ""
        if start.startswith(OPEN):
            self._read = self._read_thoughts
            return self._read(start.removeprefix(OPEN))
        self._read = self._rest.feed
        return self._read(held)

    def _read_thoughts(self, text: str) -> list[Event]:
        self._held += text
        if self._is_fresh:
            self._held = self._held.lstrip()
            self._is_fresh = not self._held
        thoughts, tag, rest = self._held.partition(CLOSE)
        if tag:
            self._held, self._is_fresh = "", True
            self._read = self._read_gap
            events: list[Event] = [Reasoning(thoughts.rstrip())] if thoughts.strip() else []
            return events + self._read(rest)
        # White space waits too: before the closing tag it does not count.
        keep = held_back(thoughts, CLOSE)
        certain = thoughts[: len(thoughts) - keep].rstrip()
        self._held = thoughts[len(certain) :]
        return [Reasoning(certain)] if certain else []

    def _read_gap(self, text: str) -> list[Event]:
        text = text.lstrip()
        if not text:
            return []
        self._read = self._rest.feed
        return self._read(text)
