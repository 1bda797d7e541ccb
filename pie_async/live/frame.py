"""What watchers are sent: a look at the engine, with the rates since the look before."""

from __future__ import annotations

import math

import msgspec

from pie_async.live.timeline import Span
from pie_async.live.view import EngineView

LEAST_COPY_BYTES = 64 * 1024
"""Smaller copies say nothing of what a link can do."""


class LinkGauge(msgspec.Struct, frozen=True, kw_only=True):
    """One direction of the link, in bytes per second."""

    bytes_per_s: float
    """Since the last look."""
    peak_bytes_per_s: float
    """The fastest that a copy was measured, since somebody began to watch; 0: none was seen."""


class LiveFrame(msgspec.Struct, frozen=True, kw_only=True):
    """One event of `/view`."""

    model: str
    version: str
    is_accepting: bool
    output_tokens_per_s: float
    """Since the last look, as all rates."""
    prompt_tokens_per_s: float
    stall_share: float
    """Part of the compute stream's time since then that it waited for copies, 0 to 1."""
    h2d: LinkGauge
    d2h: LinkGauge
    view: EngineView


class Rates:
    """Makes frames of looks; remembers the last one."""

    def __init__(self, *, model: str, version: str) -> None:
        self._model = model
        self._version = version
        self._last: EngineView | None = None
        self._peaks = {"h2d": 0.0, "d2h": 0.0}

    @property
    def since_s(self) -> float:
        """When the last look was, by the engine's clock; infinity before the first."""
        return math.inf if self._last is None else self._last.now_s

    def forget(self) -> None:
        """The next look is the first: nobody watched for a while, or the engine is another one."""
        self._last = None

    def frame(self, view: EngineView, *, is_accepting: bool) -> LiveFrame:
        last, self._last = self._last, view
        for span in view.spans:
            self._note_peak(span)
        now, before = view.stats, (last or view).stats
        took_s = view.now_s - (last or view).now_s
        if took_s <= 0 or now.uptime_s < before.uptime_s:  # the first look, or a new engine
            took_s, before = math.inf, now
        compute_s, stall_s = now.compute_s - before.compute_s, now.stall_s - before.stall_s
        return LiveFrame(
            model=self._model,
            version=self._version,
            is_accepting=is_accepting,
            output_tokens_per_s=(now.output_tokens - before.output_tokens) / took_s,
            prompt_tokens_per_s=(now.prompt_tokens - before.prompt_tokens) / took_s,
            stall_share=stall_s / (compute_s + stall_s) if compute_s + stall_s > 0 else 0.0,
            h2d=self._gauge("h2d", (now.h2d_bytes - before.h2d_bytes) / took_s),
            d2h=self._gauge("d2h", (now.d2h_bytes - before.d2h_bytes) / took_s),
            view=view,
        )

    def _note_peak(self, span: Span) -> None:
        if span.num_bytes >= LEAST_COPY_BYTES and span.busy_s > 0:
            rate = span.num_bytes / span.busy_s
            self._peaks[span.track] = max(self._peaks[span.track], rate)

    def _gauge(self, track: str, bytes_per_s: float) -> LinkGauge:
        return LinkGauge(bytes_per_s=bytes_per_s, peak_bytes_per_s=self._peaks[track])
