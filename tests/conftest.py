"""What every test gets: virtual time, unless it is marked `realtime` or `gpu`."""

from __future__ import annotations

import os

import pytest
import torch
import uvloop

from pie_async.runtime.virtual_time import VirtualTimeLoop

if not torch.cuda.is_available():
    # Before any test imports a Triton kernel: without a GPU they are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_runtest_setup(item):
    """Tests on a GPU are skipped, with the reason, where there is none."""
    if item.get_closest_marker("gpu"):
        from support.cuda_rig import why_no_cuda

        if reason := why_no_cuda():
            pytest.skip(reason)


def pytest_asyncio_loop_factories(config, item):
    """Seen by pytest-asyncio for every async test; markers on its class or module count too."""
    if item.get_closest_marker("gpu") or item.get_closest_marker("realtime"):
        return {"uvloop": uvloop.new_event_loop}
    return {"virtual": VirtualTimeLoop}
