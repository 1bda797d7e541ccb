"""A real browser. Without one these tests are skipped, and say what to install."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import browsers

MOST_S = 300.0
"""For all tests of a module, which take 20 s where nothing else runs."""


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    """Closed with its module: while playwright runs, this thread has an event loop that runs."""
    with browsers.running(most_s=MOST_S) as running:
        yield running
