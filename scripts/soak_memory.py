#!/usr/bin/env python3
"""What a server's process still holds when its clients are gone, burst after burst.

    python scripts/soak_memory.py --bursts 8 --clients 200

Resident memory only tells what was needed at the worst moment: Python gives an arena back when
all of it is free, so it climbs whenever more connections than ever before happen to be open. This
counts the bytes that are in use instead, of Python's allocator and of the C library's, each time
nobody is connected any more. Exits with 1 if more is in use after the last burst than after the
first one, by more than a few bytes for each connection.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._soak_http import clients
from scripts._soak_http.clients import Client, Tally

OPTIONS = {
    "device": "sim", "device_kv_bytes": 384 * 2**20, "host_pool_bytes": 512 * 2**20,
    "max_running_sequences": 16, "max_queued_requests": 200, "reader_patience_s": 1.0,
}  # fmt: skip
QUIET_S = 20.0
"""Longer than any client stalls here, and than a server takes to notice."""
MOST_LEFT = 20.0
"""Bytes per connection: rounding, and what each look at the memory leaves itself."""


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks"),
            *("uordblks", "fordblks", "keepcost"),
        )
    ]


def held() -> dict[str, int]:
    """Bytes in use and resident, and objects, in this process."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = _Mallinfo2
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "python": _python_bytes(),
        "c": libc.mallinfo2().uordblks,
        "objects": len(gc.get_objects()),
        "resident": pages * os.sysconf("SC_PAGESIZE"),
    }


def _python_bytes() -> int:
    """In allocated blocks; the interpreter tells nobody but standard error."""
    with tempfile.TemporaryFile() as told:
        errors = os.dup(2)
        os.dup2(told.fileno(), 2)
        try:
            sys._debugmallocstats()  # CPython's own
        finally:
            os.dup2(errors, 2)
            os.close(errors)
        told.seek(0)
        found = re.search(r"# bytes in allocated blocks\s*=\s*([\d,]+)", told.read().decode())
    assert found is not None
    return int(found[1].replace(",", ""))


async def serve() -> None:
    """A server that tells what it holds for every line of its standard input."""
    from pie_async.api import serve as serve_http
    from pie_async.resilience.engine import ResilientEngine

    def answer() -> None:
        if os.read(0, 1):
            print(json.dumps(held()), flush=True)

    async with ResilientEngine(**OPTIONS) as engine:  # type: ignore[arg-type]
        gc.collect()
        gc.freeze()
        asyncio.get_running_loop().add_reader(0, answer)
        await serve_http(engine, port=0, on_ready=lambda url: print(url, flush=True))


async def soak(bursts: int, num_clients: int, burst_s: float) -> int:
    clients.THINK_S, clients.LONGEST_STALL_S = 1.0, 5.0
    server = await asyncio.create_subprocess_exec(
        sys.executable, __file__, "--serve",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert server.stdin is not None and server.stdout is not None
    port = int((await server.stdout.readline()).decode().strip().rsplit(":", 1)[1])
    connections, found = 0, list[tuple[int, dict[str, int]]]()
    for burst in range(bursts):
        tally, ends_s = Tally(), time.monotonic() + burst_s
        async with asyncio.TaskGroup() as group:
            for number in range(num_clients):
                dice = random.Random(f"{burst}-{number}")
                group.create_task(Client(port, dice, tally).keep_on(ends_s))
        await asyncio.sleep(QUIET_S)
        server.stdin.write(b"\n")
        connections += sum(tally.done.values())
        found.append((connections, json.loads(await server.stdout.readline())))
        print(f"after {connections} connections: {found[-1][1]}", flush=True)
    server.terminate()
    await server.wait()
    return _judge(found)


def _judge(found: list[tuple[int, dict[str, int]]]) -> int:
    (first, before), (last, after) = found[0], found[-1]
    left = {name: (after[name] - before[name]) / max(1, last - first) for name in ("python", "c")}
    print(", ".join(f"{name}: {each:+.1f} bytes per connection" for name, each in left.items()))
    return int(sum(left.values()) > MOST_LEFT)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bursts", type=int, default=8)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=50.0, help="of each burst")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        uvloop.run(serve())
        return 0
    return uvloop.run(soak(arguments.bursts, arguments.clients, arguments.seconds))


if __name__ == "__main__":
    sys.exit(main())
