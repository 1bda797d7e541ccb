"""Ending a text at its first stop string while it arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Looks for stop strings in a text fed piece by piece.

    The stop string that is complete first wins; of several complete at the same character,
    the longest. So the outcome doesn't depend on how the text is cut into pieces.

    Text that may still turn out to begin a stop string is held back, and nothing else is.

    Args:
        stops: not empty strings; none at all lets everything pass.
        include_stop: whether the stop string itself is part of the text.

    Cost: amortised O(characters x stops that have begun), by Knuth, Morris and Pratt's failure
    function, which is computed as far as the text has matched: a stop string that never begins
    costs nothing, however long it is.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self._stops = tuple(dict.fromkeys(stops))
        self._failures = [[0] for _ in self._stops]
        """Entry i: the longest proper beginning of stop[: i + 1] that is also its end."""
        self._matched = [0] * len(self._stops)
        self._begun: set[int] = set()
        """Of which the text ends with some of the characters."""
        self._by_first: dict[str, set[int]] = {}
        for index, stop in enumerate(self._stops):
            self._by_first.setdefault(stop[0], set()).add(index)
        self._include_stop = include_stop
        self._held = ""
        self._is_over = False

    def feed(self, text: str) -> tuple[str, str | None]:
        """Take the next piece of text.

        Returns:
            The text that is now certain to be part of the output, and the stop string that
            ended it, or None. After a stop, everything fed is dropped.
        """
        if self._is_over:
            return "", None
        if not self._stops:
            return text, None
        text = self._held + text
        for end in range(len(self._held), len(text)):
            if (stop := self._advance(text[end])) is not None:
                self._is_over, self._held = True, ""
                kept = end + 1 if self._include_stop else end + 1 - len(stop)
                return text[:kept], stop
        safe = len(text) - max(self._matched)
        self._held = text[safe:]
        return text[:safe], None

    def flush(self) -> str:
        """What was held back, once the text has ended without a stop string."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        self._begun.clear()
        return held

    def _advance(self, char: str) -> str | None:
        """Move each stop string on by one character; the longest that is now complete."""
        complete: str | None = None
        for index in self._begun | self._by_first.get(char, _NONE):
            stop, failures = self._stops[index], self._failures[index]
            matched = _next_state(stop, failures, self._matched[index], char)
            self._matched[index] = matched
            if matched == 0:
                self._begun.discard(index)
                continue
            self._begun.add(index)
            if matched > len(failures):
                failures.append(_next_state(stop, failures, failures[-1], char))
            if matched == len(stop) and (complete is None or matched > len(complete)):
                complete = stop
        return complete


_NONE: frozenset[int] = frozenset()


def _next_state(stop: str, failures: Sequence[int], matched: int, char: str) -> int:
    """Length of the longest beginning of `stop` that the text ends with."""
    while matched and stop[matched] != char:
        matched = failures[matched - 1]
    return matched + 1 if stop[matched] == char else 0
