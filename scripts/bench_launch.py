"""How long after the end of an iteration the launch thread begins with the next, and is through.

    python scripts/bench_launch.py [--rows 100] [--iteration-ms 30] [--launch-ms 1] [--calls 50]

The engine's own actors on a simulated device in real time, behind a launch thread as CUDA has it
that takes so much of the interpreter's time for each iteration, and lets go of it so often for a
few microseconds, as calls of the driver do. Every row has a reader that takes each token.
Milliseconds from the moment in which the scheduler hears of an iteration's end.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pie_async import Engine, SamplingParams
from pie_async.actors.scheduler import SchedulerActor
from pie_async.config import GIB
from pie_async.device.sim import SimDevice
from pie_async.measurements import percentile
from pie_async.runtime.heap import settle as settle_heap
from pie_async.runtime.launch_thread import LaunchThread
from scripts.bench_http import pace

TOKENS = 400
"""Of each row; the first quarter is not counted."""
LET_GO_FOR = bytes(10_000)
"""A checksum of these takes some microseconds without the interpreter."""


class Delays:
    """Puts a launch thread before every simulated device of this process; notes when it runs."""

    def __init__(self, *, launch_s: float, calls: int) -> None:
        self.began: list[float] = []
        self.issued: list[float] = []
        self._launch_s = launch_s
        self._calls = calls
        self._heard_s = 0.0
        self._loop = asyncio.get_running_loop()
        self._thread = LaunchThread(enter=lambda: None)
        self._thread.start()
        delays, settle, launch = self, SchedulerActor._settle, SimDevice.launch

        def hear(scheduler: SchedulerActor, ran: object) -> None:
            delays._heard_s = time.perf_counter()
            settle(scheduler, ran)  # type: ignore[arg-type]

        def hand_over(device: SimDevice, issue: Callable[[], None]) -> None:
            heard_s = delays._heard_s
            delays._thread.launch(lambda: delays._issue(heard_s, lambda: launch(device, issue)))

        SchedulerActor._settle = hear  # type: ignore[method-assign, assignment]
        SimDevice.launch = hand_over  # type: ignore[method-assign, assignment]

    def _issue(self, heard_s: float, issue: Callable[[], None]) -> None:
        began_s = time.perf_counter()
        for _ in range(self._calls):
            until_s = time.thread_time() + self._launch_s / self._calls
            zlib.crc32(LET_GO_FOR)
            while time.thread_time() < until_s:
                pass
        if heard_s:
            self.began.append(began_s - heard_s)
            self.issued.append(time.perf_counter() - heard_s)
        self._loop.call_soon_threadsafe(issue)


async def measure(rows: int, iteration_s: float, launch_s: float, calls: int) -> Delays:
    pace(iteration_s)
    delays = Delays(launch_s=launch_s, calls=calls)
    params = SamplingParams(max_tokens=TOKENS, output_kind="delta", ignore_eos=True)

    async def read(number: int) -> None:
        async for _ in engine.generate([1, 2, 3, number], params):
            pass

    async with Engine(
        device="sim",
        model="llama-3.1-8b",
        device_kv_bytes=80 * GIB,
        host_pool_bytes=0,
        max_running_sequences=rows,
    ) as engine:
        settle_heap()
        async with asyncio.TaskGroup() as group:
            for number in range(rows):
                group.create_task(read(number))
    return delays


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--iteration-ms", type=float, default=30.0)
    parser.add_argument("--launch-ms", type=float, default=1.0)
    parser.add_argument("--calls", type=int, default=50)
    asked = parser.parse_args()
    iteration_s, launch_s = asked.iteration_ms / 1e3, asked.launch_ms / 1e3
    delays = uvloop.run(measure(asked.rows, iteration_s, launch_s, asked.calls))
    print("          p10   p50   p90   p99, ms")
    for what, all_s in (("begun", delays.began), ("issued", delays.issued)):
        ordered = sorted(all_s[len(all_s) // 4 :])
        figures = (f"{1e3 * percentile(ordered, share):5.2f}" for share in (10, 50, 90, 99))
        print(f"{what:8}", *figures)


if __name__ == "__main__":
    main()
