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
    hardware.require_memory(50 * GIB, option="host_pool_bytes")
    machine(monkeypatch, available_bytes=None)
    hardware.require_memory(500 * GIB, option="host_pool_bytes")


def test_a_pool_larger_than_the_free_memory_is_refused_by_name(monkeypatch):
    machine(monkeypatch)
    with pytest.raises(ConfigError, match=r"host_pool_bytes is 51\.0 GiB, but 50\.0 GiB") as caught:
        hardware.require_memory(51 * GIB, option="host_pool_bytes")
    assert caught.value.option == "host_pool_bytes"
    assert "container" not in str(caught.value)


def test_a_container_s_limit_counts_and_is_named(monkeypatch):
    machine(monkeypatch, cgroup_limit_bytes=16 * GIB, cgroup_used_bytes=4 * GIB)
    hardware.require_memory(12 * GIB, option="host_pool_bytes")
    with pytest.raises(ConfigError, match=r"12\.0 GiB .* container's limit is 16\.0 GiB"):
        hardware.require_memory(13 * GIB, option="host_pool_bytes")


def groups(monkeypatch, tmp_path, own: str, files: dict[str, str]) -> hardware.Hardware:
    """The machine as seen from the group `own`, with `files` below the mounted groups."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    read = hardware._lines
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path)
    monkeypatch.setattr(
        hardware,
        "_lines",
        lambda path: own.splitlines() if str(path) == "/proc/self/cgroup" else read(path),
    )
    return hardware.read_hardware()


def test_the_tightest_of_nested_groups_counts(monkeypatch, tmp_path):
    found = groups(
        monkeypatch,
        tmp_path,
        "0::/slice/unit\n",
        {
            "slice/memory.max": f"{8 * GIB}\n",
            "slice/memory.current": f"{7 * GIB}\n",
            "slice/unit/memory.max": f"{6 * GIB}\n",
            "slice/unit/memory.current": f"{1 * GIB}\n",
        },
    )
    assert (found.cgroup_limit_bytes, found.cgroup_used_bytes) == (8 * GIB, 7 * GIB)
    assert hardware.usable_bytes(found) <= GIB


def test_a_limit_below_a_root_without_one_is_found(monkeypatch, tmp_path):
    files = {"memory.max": "max\n", "a/memory.max": f"{GIB}\n", "a/b/memory.max": "max\n"}
    assert groups(monkeypatch, tmp_path, "0::/a/b\n", files).cgroup_limit_bytes == GIB


def test_groups_of_version_1_have_folders_and_a_number_for_no_limit(monkeypatch, tmp_path):
    own = "5:cpu,cpuacct:/x\n4:memory:/job\n0::/\n"
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/job/memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory/job/memory.usage_in_bytes": f"{GIB}\n",
    }
    found = groups(monkeypatch, tmp_path, own, files)
    assert (found.cgroup_limit_bytes, found.cgroup_used_bytes) == (2 * GIB, GIB)


def test_a_group_that_is_not_mounted_here_is_passed_over(monkeypatch, tmp_path):
    files = {"memory.max": f"{3 * GIB}\n"}
    assert groups(monkeypatch, tmp_path, "0::/of/the/host\n", files).cgroup_limit_bytes == 3 * GIB
    assert groups(monkeypatch, tmp_path / "none", "", {}).cgroup_limit_bytes is None
