"""Whether the engine is alive: working, or with nothing to do."""

from __future__ import annotations

from pie_async.metrics import EngineStats

STUCK_AFTER_S = 120.0
"""Longest time that an iteration may take; the watchdog, if it is on, acts earlier."""


def is_stuck(stats: EngineStats) -> bool:
    """Judges by the last iteration that completed, not by a constant: an engine that hangs is not
    alive. Before the first one kernels may be compiled, which takes what it takes."""
    return stats.iterations > 0 and stats.pending_s > STUCK_AFTER_S
