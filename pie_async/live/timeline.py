"""What the streams and the requests did when, read back from the story.

The story has when a message was handled, and facts about device work say how long it took. So a
span ends when the scheduler heard of it and begins as long before as the device says; where two
would overlap on a stream, which they cannot there, the later one begins at the other's end. What
an iteration waited for copies is known as a sum: it is drawn at the iteration's beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, assert_never

import msgspec

from pie_async.ids import IterationId, RequestId, SequenceId
from pie_async.messages import (
    Advance,
    IterationRan,
    IterationStaged,
    RunIteration,
    SequencesAdvanced,
    SetStreamedLimit,
    Submit,
    SwappedIn,
    SwappedOut,
)
from pie_async.story import Entry, Story

Track = Literal["compute", "stall", "h2d", "d2h"]
TRACKS: tuple[Track, ...] = ("compute", "stall", "h2d", "d2h")
Doing = Literal["prefill", "decode", "iteration", "waits", "staging", "promoting", "demoting"]
Phase = Literal["queued", "prefill", "decode", "off"]

MISSED_ITERATIONS = 3
"""A sequence that is in so few iterations is parked, or was; one may go by without it while the
next one is planned."""


class Span(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that a stream did. Times are the engine's clock, in seconds."""

    track: Track
    start_s: float
    end_s: float
    doing: Doing
    """"iteration" where it is not remembered whether it computed prompts."""
    iteration: int | None = None
    num_bytes: int = 0
    """That were copied."""
    busy_s: float = 0.0
    """How much of it the copy stream was copying."""
    num_rows: int = 0
    """Sequences in the iteration."""
    num_tokens: int = 0
    """That were fed."""


class RequestSpan(msgspec.Struct, frozen=True, kw_only=True):
    """What one sequence of a request did. Times as in `Span`."""

    request: RequestId
    sequence: SequenceId
    start_s: float
    end_s: float
    phase: Phase
    """"off": it had run and is in no iteration, parked or paused."""
    output_tokens: int = 0
    """That it got meanwhile."""


class LimitChange(msgspec.Struct, frozen=True, kw_only=True):
    """What the expansion governor decided."""

    at_s: float
    limit_blocks: int
    cause: str
    reason: str


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """Some iterations, in the order of time; spans of one track never overlap."""

    now_s: float
    spans: tuple[Span, ...]
    requests: tuple[RequestSpan, ...]
    limits: tuple[LimitChange, ...]
    iterations: int
    """How many are in it: what was asked for, or as many as are remembered."""


def timeline(story: Story, *, last_iterations: int, now_s: float) -> Timeline:
    """The last iterations that ended, as far as the story goes back."""
    entries = list(story)
    ran = [entry.at_s for entry in entries if isinstance(entry.message, IterationRan)]
    ran = ran[-last_iterations:] if last_iterations > 0 else []
    spans = list(device_spans(entries))
    kept = _iterations_from(spans, len(ran))
    start_s = min((span.start_s for span in spans if span.iteration in kept), default=now_s)
    return Timeline(
        now_s=now_s,
        spans=tuple(span for span in spans if span.end_s > start_s),
        requests=tuple(
            span for span in request_spans(entries, now_s=now_s) if span.end_s > start_s
        ),
        limits=tuple(each for each in limit_changes(entries) if each.at_s >= start_s),
        iterations=len(ran),
    )


def _iterations_from(spans: Iterable[Span], count: int) -> frozenset[int | None]:
    computed = [span.iteration for span in spans if span.track == "compute"]
    return frozenset(computed[-count:]) if count else frozenset()


def recent_spans(story: Story, *, since_s: float, lookback_s: float) -> Iterator[Span]:
    """What ended after `since_s`.

    Args:
        lookback_s: how long before that the iterations that ended since may have been issued.
            Reading costs about 1 us for each message of all this time.
    """
    entries = story.since(since_s - lookback_s)
    return (span for span in device_spans(entries) if span.end_s > since_s)


def device_spans(entries: Iterable[Entry]) -> Iterator[Span]:
    """The streams' spans, in the order in which they ended."""
    issued: dict[IterationId, RunIteration] = {}
    free_s = dict.fromkeys(TRACKS, float("-inf"))

    def between(track: Track, end_s: float, took_s: float) -> tuple[float, float]:
        start_s = min(end_s, max(end_s - took_s, free_s[track]))
        free_s[track] = end_s
        return start_s, end_s

    for entry in entries:
        end_s, message = entry.at_s, entry.message
        match message:
            case RunIteration():
                issued[message.iteration] = message
            case IterationRan():
                command = issued.pop(message.iteration, None)
                took_s = message.compute_s + message.stall_s + message.mask_wait_s
                start_s, _ = between("compute", end_s, took_s)
                yield Span(
                    track="compute",
                    start_s=start_s,
                    end_s=end_s,
                    doing=_doing(command),
                    iteration=message.iteration,
                    num_rows=len(command.rows) if command else 0,
                    num_tokens=sum(row.num_tokens for row in command.rows) if command else 0,
                )
                if message.stall_s > 0:
                    yield Span(
                        track="stall",
                        start_s=start_s,
                        end_s=min(end_s, start_s + message.stall_s),
                        doing="waits",
                        iteration=message.iteration,
                    )
            case IterationStaged():
                start_s, _ = between("h2d", end_s, message.busy_s)
                yield Span(
                    track="h2d",
                    start_s=start_s,
                    end_s=end_s,
                    doing="staging",
                    iteration=message.iteration,
                    num_bytes=message.staged_bytes,
                    busy_s=message.busy_s,
                )
            case SwappedIn() | SwappedOut():
                track: Track = "h2d" if isinstance(message, SwappedIn) else "d2h"
                start_s, _ = between(track, end_s, message.busy_s)
                yield Span(
                    track=track,
                    start_s=start_s,
                    end_s=end_s,
                    doing="promoting" if track == "h2d" else "demoting",
                    num_bytes=message.swapped_bytes,
                    busy_s=message.busy_s,
                )
            case _:
                pass  # tells nothing of the device


def _doing(command: RunIteration | None) -> Doing:
    if command is None:
        return "iteration"
    return "prefill" if any(len(row.tokens) > 1 for row in command.rows) else "decode"


def limit_changes(entries: Iterable[Entry]) -> Iterator[LimitChange]:
    """The governor's decisions."""
    for entry in entries:
        if isinstance(message := entry.message, SetStreamedLimit):
            yield LimitChange(
                at_s=entry.at_s,
                limit_blocks=message.limit_blocks,
                cause=message.cause,
                reason=message.reason,
            )


# --- requests -------------------------------------------------------------------------------


class _Life(msgspec.Struct, kw_only=True):
    """A sequence as far as the story has been read."""

    request: RequestId
    sequence: SequenceId
    phase: Phase
    since_s: float
    output_tokens: int = 0
    missed: int = 0
    """Iterations in a row that it is not in."""
    missed_since_s: float = 0.0
    has_output: bool = False

    def enter(self, phase: Phase, at_s: float) -> RequestSpan | None:
        """Begin a phase; the one before, if it took any time."""
        ended = self.leave(at_s)
        self.phase, self.since_s, self.output_tokens, self.missed = phase, at_s, 0, 0
        return ended

    def leave(self, at_s: float) -> RequestSpan | None:
        if at_s <= self.since_s:
            return None
        return RequestSpan(
            request=self.request,
            sequence=self.sequence,
            start_s=self.since_s,
            end_s=at_s,
            phase=self.phase,
            output_tokens=self.output_tokens,
        )


def request_spans(entries: Iterable[Entry], *, now_s: float) -> Iterator[RequestSpan]:
    """The sequences' phases, each when it ended, unfinished ones last, at `now_s`.

    Only sequences whose submission is remembered are told of.
    """
    lives: dict[SequenceId, _Life] = {}
    for entry in entries:
        for span in _follow(lives, entry):
            if span is not None:
                yield span
    for life in lives.values():
        if (span := life.leave(max(now_s, life.since_s))) is not None:
            yield span


def _follow(lives: dict[SequenceId, _Life], entry: Entry) -> Iterator[RequestSpan | None]:
    at_s, message = entry.at_s, entry.message
    match message:
        case Submit():
            for sequence in message.sequences:
                lives[sequence] = _Life(
                    request=message.request, sequence=sequence, phase="queued", since_s=at_s
                )
        case RunIteration():
            yield from _follow_rows(lives, message, at_s)
        case SequencesAdvanced():
            for advance in message.advances:
                if (life := lives.get(advance.sequence)) is not None:
                    yield from _follow_advance(lives, life, advance, at_s)
        case _:
            pass


def _follow_advance(
    lives: dict[SequenceId, _Life], life: _Life, advance: Advance, at_s: float
) -> Iterator[RequestSpan | None]:
    if advance.token is not None:
        if life.phase == "prefill":
            yield life.enter("decode", at_s)
        life.has_output = True
        life.output_tokens += 1
    if advance.finish_reason is not None:
        yield lives.pop(advance.sequence).leave(at_s)


def _follow_rows(
    lives: dict[SequenceId, _Life], command: RunIteration, at_s: float
) -> Iterator[RequestSpan | None]:
    fed = {row.sequence for row in command.rows}
    for sequence, life in lives.items():
        match life.phase:
            case "queued" | "off":
                if sequence in fed:
                    yield life.enter("decode" if life.has_output else "prefill", at_s)
            case "prefill" | "decode":
                if sequence in fed:
                    life.missed = 0
                    continue
                if life.missed == 0:
                    life.missed_since_s = at_s
                life.missed += 1
                if life.missed >= MISSED_ITERATIONS:
                    yield life.enter("off", life.missed_since_s)
            case _:
                assert_never(life.phase)
