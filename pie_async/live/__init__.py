"""What an engine is doing, for people to look at: snapshots and timelines, made when asked for."""

from __future__ import annotations

from pie_async.live.timeline import Span, Timeline, timeline
from pie_async.live.view import EngineView, MemoryMap, SequenceView

__all__ = ["EngineView", "MemoryMap", "SequenceView", "Span", "Timeline", "timeline"]
