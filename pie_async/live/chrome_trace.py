"""A timeline as the JSON that Perfetto (ui.perfetto.dev) and chrome://tracing open.

One track for each stream and direction, one for each sequence, and a counter for the governor's
limit. Events are complete ones ("X") and never overlap on a track, which is what Perfetto asks of
this format. Times are microseconds from the first event's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from pie_async.live.timeline import TRACKS, RequestSpan, Span, Timeline

DEVICE, REQUESTS = 1, 2
_NAMES = {
    "compute": "compute",
    "stall": "compute waits for copies (sum, from the iteration's begin)",
    "h2d": "copies to the device (h2d)",
    "d2h": "copies to the pool (d2h)",
}


def chrome_trace(told: Timeline) -> bytes:
    """The trace as a JSON document."""
    events = list(_events(told))
    return msgspec.json.encode(
        {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {"iterations": told.iterations, "source": "pie_async"},
        }
    )


def _events(told: Timeline) -> Iterator[dict[str, Any]]:
    starts = [
        *(span.start_s for span in told.spans),
        *(span.start_s for span in told.requests),
        *(change.at_s for change in told.limits),
    ]
    zero_s = min(starts, default=told.now_s)
    yield from _named_tracks(told)
    for span in told.spans:
        yield _complete(span, zero_s, DEVICE, TRACKS.index(span.track) + 1, _label(span)) | {
            "args": _arguments(span)
        }
    for request in told.requests:
        yield _complete(request, zero_s, REQUESTS, request.sequence, request.phase) | {
            "args": {"request": request.request, "output_tokens": request.output_tokens}
        }
    for change in told.limits:
        yield {
            "ph": "C",
            "name": "streamed limit",
            "pid": DEVICE,
            "ts": _us(change.at_s - zero_s),
            "args": {"blocks": change.limit_blocks},
        }


def _named_tracks(told: Timeline) -> Iterator[dict[str, Any]]:
    for pid, name in ((DEVICE, "device"), (REQUESTS, "requests")):
        yield _metadata("process_name", pid, 0, {"name": name})
        yield _metadata("process_sort_index", pid, 0, {"sort_index": pid})
    for number, track in enumerate(TRACKS, start=1):
        yield _metadata("thread_name", DEVICE, number, {"name": _NAMES[track]})
        yield _metadata("thread_sort_index", DEVICE, number, {"sort_index": number})
    names = {each.sequence: f"request {each.request}" for each in told.requests}
    for sequence, name in sorted(names.items()):
        yield _metadata("thread_name", REQUESTS, sequence, {"name": f"{name}, sequence {sequence}"})


def _metadata(name: str, pid: int, tid: int, args: dict[str, Any]) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "args": args}


def _complete(
    span: Span | RequestSpan, zero_s: float, pid: int, tid: int, name: str
) -> dict[str, Any]:
    start = _us(span.start_s - zero_s)
    return {
        "ph": "X",
        "name": name,
        "cat": "device" if pid == DEVICE else "request",
        "pid": pid,
        "tid": tid,
        "ts": start,
        # from rounded ends, so that neighbours do not overlap by a rounding
        "dur": round(_us(span.end_s - zero_s) - start, 3),
    }


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)


def _label(span: Span) -> str:
    return span.doing if span.iteration is None else f"{span.doing} {span.iteration}"


def _arguments(span: Span) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if span.num_rows:
        found |= {"sequences": span.num_rows, "tokens": span.num_tokens}
    if span.num_bytes:
        found["bytes"] = span.num_bytes
        if span.busy_s > 0:
            found["GB/s"] = round(span.num_bytes / span.busy_s / 1e9, 2)
    return found
