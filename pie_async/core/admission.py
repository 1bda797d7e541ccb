"""How much may be accepted at a time, and when those who are refused should come again."""

from __future__ import annotations

from collections import deque

from pie_async.errors import Overloaded

REMEMBERED_ENDS = 64
LEAST_S, MOST_S = 1.0, 60.0
UNKNOWN_S = 5.0
"""What is told before anything has ended."""


def retry_after_s(*, ahead: int, ends_s: deque[float], now_s: float) -> float:
    """When so many places will have become free, as far as the past tells.

    Args:
        ahead: places that are needed: one, and one for everybody who was refused before.
        ends_s: when requests ended lately, ascending.
    """
    if not ends_s:
        return UNKNOWN_S
    # Up to now, not to the last end: what has stopped ending things has become slow.
    wait_s = ahead * max(now_s - ends_s[0], 1e-3) / len(ends_s)
    return min(MOST_S, max(LEAST_S, wait_s))


class Admission:
    """Counts what is accepted and unfinished. Times are seconds of one clock."""

    def __init__(self, *, most_requests: int, most_tokens: int) -> None:
        """
        Args:
            most_tokens: of the prompts, once for every sequence; a request may exceed it alone.
        """
        self._most_requests = most_requests
        self._most_tokens = most_tokens
        self.num_requests = 0
        self.num_tokens = 0
        self._num_refused = 0
        """Those told to come again, less the places that became free since."""
        self._ends_s: deque[float] = deque(maxlen=REMEMBERED_ENDS)

    def check(self, *, now_s: float, num_tokens: int = 0) -> None:
        """Whether a request with so many tokens may come in.

        Raises:
            Overloaded: not now; says when.
        """
        if self.num_requests >= self._most_requests:
            self._refuse(
                f"{self.num_requests} requests are queued, the most allowed "
                "(max_queued_requests); try again later",
                now_s,
            )
        if self.num_requests and self.num_tokens + num_tokens > self._most_tokens:
            self._refuse(
                f"prompts of {self.num_tokens} tokens are queued, and with {num_tokens} more there "
                f"would be more than {self._most_tokens} (max_queued_tokens); try again later",
                now_s,
            )

    def _refuse(self, why: str, now_s: float) -> None:
        self._num_refused += 1
        after_s = retry_after_s(ahead=self._num_refused, ends_s=self._ends_s, now_s=now_s)
        raise Overloaded(why, retry_after_s=after_s)

    def enter(self, num_tokens: int) -> None:
        """A request was accepted."""
        self.num_requests += 1
        self.num_tokens += num_tokens

    def leave(self, num_tokens: int, *, now_s: float) -> None:
        """A request that had so many tokens ended, however it did."""
        self.num_requests -= 1
        self.num_tokens -= num_tokens
        self._num_refused = max(0, self._num_refused - 1)
        self._ends_s.append(now_s)
