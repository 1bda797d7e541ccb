"""What every test gets: virtual time, unless it is marked `realtime` or `gpu`."""

from __future__ import annotations

import uvloop

from pie_async.runtime.virtual_time import VirtualTimeLoop


def pytest_asyncio_loop_factories(config, item):
    """Seen by pytest-asyncio for every async test; markers on its class or module count too."""
    if item.get_closest_marker("gpu") or item.get_closest_marker("realtime"):
        return {"uvloop": uvloop.new_event_loop}
    return {"virtual": VirtualTimeLoop}
