"""For pytest with pytest-asyncio: virtual time and a simulated engine.

    # conftest.py
    pytest_plugins = ["pie_async.testing.plugin"]

Marks:
    virtual_time: the test's event loop is a `VirtualTimeLoop`.
    sim_engine(**options): options of `simulated_engine` for the fixture of that name.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from pie_async.engine import Engine
from pie_async.runtime.virtual_time import VirtualTimeLoop
from pie_async.testing.engines import simulated_engine

LoopFactories = dict[str, Callable[[], asyncio.AbstractEventLoop]]


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "virtual_time: the event loop's clock jumps to the next timer (pie_async.testing)",
        "sim_engine(**options): how the fixture sim_engine is made (pie_async.testing)",
    ):
        config.addinivalue_line("markers", line)


@pytest.hookimpl(trylast=True)
def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> LoopFactories:
    """Virtual time for tests that ask for it, by mark or by fixture; the usual loop for others."""
    del config
    wants = item.get_closest_marker("virtual_time") or "sim_engine" in getattr(
        item, "fixturenames", ()
    )
    return {"virtual": VirtualTimeLoop} if wants else {"asyncio": asyncio.new_event_loop}


@pytest_asyncio.fixture
async def sim_engine(request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    """A simulated engine in virtual time, which must have given everything back in the end."""
    mark = request.node.get_closest_marker("sim_engine")
    async with simulated_engine(**(mark.kwargs if mark else {})) as engine:
        yield engine
