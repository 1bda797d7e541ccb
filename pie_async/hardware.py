"""What this machine has: processor, memory and its limits, a GPU or none."""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator
from pathlib import Path

import msgspec

from pie_async.config import format_size
from pie_async.errors import ConfigError

_CGROUPS = Path("/sys/fs/cgroup")


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """The machine as this process sees it. None: not limited, or not told by the system."""

    system: str
    python: str
    processor: str
    cores: int
    """Cores this process may run on."""
    cores_in_all: int
    memory_bytes: int | None
    available_bytes: int | None
    cgroup_limit_bytes: int | None
    cgroup_used_bytes: int | None
    locked_limit_bytes: int | None
    """Most memory that may be pinned."""


def read_hardware() -> Hardware:
    """Look at the system's own files; nothing is measured."""
    memory = _meminfo()
    limit, used = _cgroup()
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    cores_in_all = os.cpu_count() or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores_in_all
    return Hardware(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        processor=_processor(),
        cores=cores,
        cores_in_all=cores_in_all,
        memory_bytes=memory.get("MemTotal"),
        available_bytes=memory.get("MemAvailable"),
        cgroup_limit_bytes=limit,
        cgroup_used_bytes=used,
        locked_limit_bytes=None if locked == resource.RLIM_INFINITY else locked,
    )


def usable_bytes(hardware: Hardware) -> int | None:
    """Memory that can still be taken, the container's limit included; None if not told."""
    room = []
    if hardware.available_bytes is not None:
        room.append(hardware.available_bytes)
    if hardware.cgroup_limit_bytes is not None:
        room.append(hardware.cgroup_limit_bytes - (hardware.cgroup_used_bytes or 0))
    return min(room, default=None)


def require_memory(wanted_bytes: int, *, option: str) -> None:
    """Refuse KV that this machine's memory cannot hold: taking it need not fail, the system may end
    the process once it is written or pinned.

    RLIMIT_MEMLOCK is not looked at: it bounds mlock(2), and the CUDA driver pins pages itself
    without asking for it. Were a driver to obey it, the first chunk would be refused.

    Args:
        wanted_bytes: of the host pool, or of a device arena in the same memory.
        option: that asks for them, `host_pool_bytes` or `device_kv_bytes`.

    Raises:
        ConfigError: says what is free, and whose limit that is.
    """
    hardware = read_hardware()
    usable = usable_bytes(hardware)
    if usable is None or wanted_bytes <= usable:
        return
    limit = hardware.cgroup_limit_bytes
    whose = "" if limit is None else f" (the container's limit is {format_size(limit)})"
    or_else = ", or set it to 0 to switch pooling off" if option == "host_pool_bytes" else ""
    raise ConfigError(
        f"{option} is {format_size(wanted_bytes)}, but {format_size(max(0, usable))} of memory are "
        f"free{whose}; lower it{or_else}",
        option=option,
    )


def _meminfo() -> dict[str, int]:
    found = {}
    for line in _lines("/proc/meminfo"):
        name, _, value = line.partition(":")
        number = value.split()
        if number and number[0].isdigit():
            found[name] = int(number[0]) * 1024
    return found


def _processor() -> str:
    for line in _lines("/proc/cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


def _cgroup() -> tuple[int | None, int | None]:
    """(limit, used) of the memory group that leaves this process the least room, of the group it
    is in and all around it: every one of them counts."""
    found = [
        (limit, _number(group / used) or 0)
        for group, most, used in _memory_groups()
        if (limit := _number(group / most)) is not None
    ]
    return min(found, key=lambda each: each[0] - each[1], default=(None, None))


def _memory_groups() -> Iterator[tuple[Path, str, str]]:
    """(folder, file of the limit, file of the use) from the process's own group up to the root.

    A line of /proc/self/cgroup is "number:controllers:path"; version 2 has number 0 and no
    controllers (cgroups(7)). In a container without a namespace of its own the path is the
    host's, of which only the root may be mounted: what is not there is passed over.
    """
    for line in _lines("/proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            root, most, used = _CGROUPS, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = _CGROUPS / "memory"
            most, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        names = [name for name in path.split("/") if name not in ("", "..")]
        for depth in range(len(names), -1, -1):
            yield root.joinpath(*names[:depth]), most, used


def _number(path: Path) -> int | None:
    """What a file of one number says; None: "max", or there is no such file."""
    value = "".join(_lines(path)).strip()
    # version 1 writes "no limit" as a number near 2^63
    return int(value) if value.isdigit() and int(value) < 2**60 else None


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
