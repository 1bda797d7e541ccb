"""How much processor time this process's threads use."""

from __future__ import annotations

import threading
import time
from pathlib import Path


class HostTime:
    """Processor time since it was made, of the process and by thread."""

    def __init__(self) -> None:
        self._process_s = time.process_time()
        self._threads_s = _threads_s()

    def total_s(self) -> float:
        return time.process_time() - self._process_s

    def by_thread_s(self) -> dict[str, float]:
        """By the threads' names, for those that used any; the largest first."""
        names = {thread.native_id: thread.name for thread in threading.enumerate()}
        used: dict[str, float] = {}
        for thread, now_s in _threads_s().items():
            name = names.get(thread, "not Python's")
            used[name] = used.get(name, 0.0) + now_s - self._threads_s.get(thread, 0.0)
        return dict(sorted(((n, s) for n, s in used.items() if s > 0), key=lambda pair: -pair[1]))


def _threads_s() -> dict[int, float]:
    """By the system's thread id; empty where the system does not say."""
    found = {}
    for task in Path("/proc/self/task").glob("*"):
        try:
            found[int(task.name)] = int((task / "schedstat").read_text().split()[0]) / 1e9
        except (OSError, ValueError, IndexError):
            continue  # it ended meanwhile, or the kernel keeps no such count
    return found
