"""How far an experiment has come: a line for each of its parts, as it begins.

Nothing is drawn in between: a bar that moves takes the interpreter from what is measured.
"""

from __future__ import annotations

import time
from collections.abc import Callable

WIDTH = 20


class Progress:
    """Parts of an experiment, one after the other.

    Args:
        parts: that there are.
        clock: seconds.
    """

    def __init__(self, parts: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._parts = parts
        self._begun = 0
        self._clock = clock
        self._began_s = clock()

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
