"""How far an experiment has come: a line for each of its parts, as it begins.

Nothing is drawn in between: a bar that moves takes the interpreter from what is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from scripts.paper.options import Budget

WIDTH = 20


class Progress:
    """Parts of an experiment, one after the other.

    Args:
        parts: that there are.
        budget: without which `begins` lets every part begin.
        clock: seconds.
    """

    def __init__(
        self,
        parts: int,
        budget: Budget | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parts = parts
        self._budget = budget
        self._begun = 0
        self._clock = clock
        self._began_s = clock()

    def begins(self, part: str) -> bool:
        """Whether the budget allows this part; if so it begins."""
        if self._budget is not None and not self._budget.allows(part):
            return False
        self.begin(part)
        return True

    def begin(self, part: str) -> None:
        """Say that this part begins, and how long the others may take by those that were."""
        done = self._begun
        self._begun += 1
        bar = "#" * (done * WIDTH // self._parts)
        left = ""
        if done:
            took_s = self._clock() - self._began_s
            left = f", {took_s / done * (self._parts - done):.0f} s left"
        print(f"[{bar:.<{WIDTH}}] {self._begun} of {self._parts}{left}: {part}", flush=True)
