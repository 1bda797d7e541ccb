"""A pool that the machine cannot hold is refused before anything is loaded."""

from __future__ import annotations

import pytest

from pie_async import hardware
from pie_async.config import GIB
from pie_async.errors import ConfigError


def machine(monkeypatch, **changes) -> None:
    found = {
        "system": "", "python": "", "processor": "", "cores": 1, "cores_in_all": 1,
        "memory_bytes": 64 * GIB, "available_bytes": 50 * GIB, "cgroup_limit_bytes": None,
        "cgroup_used_bytes": None, "locked_limit_bytes": None, **changes,
    }  # fmt: skip
    monkeypatch.setattr(hardware, "read_hardware", lambda: hardware.Hardware(**found))


def test_a_pool_that_fits_is_let_pass(monkeypatch):
    machine(monkeypatch)
    hardware.require_poolable(50 * GIB)
    machine(monkeypatch, available_bytes=None)
    hardware.require_poolable(500 * GIB)


def test_a_pool_larger_than_the_free_memory_is_refused_by_name(monkeypatch):
    machine(monkeypatch)
    with pytest.raises(ConfigError, match=r"host_pool_bytes is 51\.0 GiB, but 50\.0 GiB") as caught:
        hardware.require_poolable(51 * GIB)
    assert caught.value.option == "host_pool_bytes"
    assert "container" not in str(caught.value)


def test_a_container_s_limit_counts_and_is_named(monkeypatch):
    machine(monkeypatch, cgroup_limit_bytes=16 * GIB, cgroup_used_bytes=4 * GIB)
    hardware.require_poolable(12 * GIB)
    with pytest.raises(ConfigError, match=r"12\.0 GiB .* container's limit is 16\.0 GiB"):
        hardware.require_poolable(13 * GIB)
