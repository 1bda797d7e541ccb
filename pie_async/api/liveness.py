"""Whether the engine is alive: working, or with nothing to do."""

from __future__ import annotations

from pie_async.metrics import EngineStats


class Liveness:
    """Judges by progress, not by a constant: an engine that hangs is not alive.

    Every check compares with the one before, so it takes two checks while sequences run.
    """

    def __init__(self, *, stuck_after_s: float = 120.0) -> None:
        """`stuck_after_s`: longest time that one iteration may take."""
        self._stuck_after_s = stuck_after_s
        self._iterations = -1
        self._since_s = 0.0

    def is_stuck(self, stats: EngineStats, *, now_s: float) -> bool:
        """Whether sequences are running and no iteration ended for too long."""
        if stats.running == 0 or stats.iterations != self._iterations:
            self._iterations = stats.iterations
            self._since_s = now_s
        return now_s - self._since_s > self._stuck_after_s
