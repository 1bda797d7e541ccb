"""A browser that is given an end: playwright waits for ever for one that does not answer, and in
some places also for one that has died."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@contextmanager
def running(*, most_s: float) -> Iterator[Any]:
    """A browser for whoever is done with it in time. Otherwise playwright's driver is killed, whose
    end is the browser's: what waits for either fails, and so does whoever leaves this."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no browser test without the extra browser: playwright"
    )
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"NO BROWSER TEST: none of {', '.join(CHROMIUM)} is installed")
    is_late = threading.Event()
    others = _children()

    def kill(drivers: set[int]) -> None:
        is_late.set()
        for each in drivers:
            os.kill(each, signal.SIGKILL)

    try:
        with playwright.sync_playwright() as started:
            timer = threading.Timer(most_s, kill, [_children() - others])
            timer.daemon = True
            timer.start()
            try:
                browser = started.chromium.launch(executable_path=path, args=FLAGS)
                yield browser
                browser.close()
            finally:
                timer.cancel()
    finally:
        if is_late.is_set():
            pytest.fail(f"the browser was not done after {most_s:g} s, and was killed")


def _children() -> set[int]:
    """Processes that this thread has started."""
    return set(map(int, Path("/proc/thread-self/children").read_text().split()))
