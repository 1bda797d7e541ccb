"""How long clients wait: TTFT, ITL and end to end, taken where outputs arrive."""

from __future__ import annotations

from typing import Protocol

from pie_async.openai.feed import Arrival
from pie_async.outputs import FinishReason, SequenceTimes


class LatencySink(Protocol):
    """Where measured times go, seconds."""

    def observe_ttft(self, ttft_s: float) -> None: ...

    def observe_itl(self, itl_s: float) -> None: ...

    def observe_e2e(self, e2e_s: float) -> None: ...

    def observe_times(self, times: SequenceTimes) -> None:
        """Of a choice that ended."""

    def count_finished(self, reason: FinishReason) -> None:
        """One choice ended."""


class NoLatencySink:
    """Keeps nothing."""

    def observe_ttft(self, ttft_s: float) -> None: ...

    def observe_itl(self, itl_s: float) -> None: ...

    def observe_e2e(self, e2e_s: float) -> None: ...

    def observe_times(self, times: SequenceTimes) -> None: ...

    def count_finished(self, reason: FinishReason) -> None: ...


class RequestLatency:
    """Watches one HTTP request's outputs and tells the sink."""

    def __init__(self, sink: LatencySink, *, started_at_s: float, is_streamed: bool) -> None:
        """`started_at_s`: loop time at which the request was read; without streaming, outputs
        arrive all at once, so only the end is measured."""
        self._sink = sink
        self._started_at_s = started_at_s
        self._is_streamed = is_streamed
        self._previous_s: dict[tuple[int, int], float] = {}

    def observe(self, arrival: Arrival) -> None:
        """Measure what an output says."""
        for choice in arrival.output.outputs:
            if self._is_streamed and choice.token_ids:
                self._observe_tokens((arrival.prompt_index, choice.index), arrival.at_s)
                for _ in choice.token_ids[1:]:
                    self._sink.observe_itl(0.0)  # they came together
            if choice.finish_reason is not None:
                self._sink.count_finished(choice.finish_reason)
                if choice.times is not None:
                    self._sink.observe_times(choice.times)

    def finish(self, at_s: float) -> None:
        """Measure the request as a whole."""
        self._sink.observe_e2e(at_s - self._started_at_s)

    def _observe_tokens(self, choice: tuple[int, int], at_s: float) -> None:
        previous_s = self._previous_s.get(choice)
        if previous_s is not None:
            self._sink.observe_itl(at_s - previous_s)
        elif not self._previous_s:
            self._sink.observe_ttft(at_s - self._started_at_s)
        self._previous_s[choice] = at_s
