"""A real browser. Without one these tests are skipped, and say what to install."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Closed with its module: while playwright runs, this thread has an event loop that runs."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no browser test without the extra browser: playwright"
    )
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip(f"NO BROWSER TEST: none of {', '.join(CHROMIUM)} is installed")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=path, args=FLAGS)
        yield running
        running.close()
