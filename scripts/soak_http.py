#!/usr/bin/env python3
"""Clients that connect, read, cancel, stall and vanish, against a real server, for minutes.

    python scripts/soak_http.py --minutes 10 --clients 1000

Starts `pie-async serve` on 127.0.0.1, by default on the simulated device, keeps so many clients
busy, and then waits until the server is quiet again. Exits with 1 if blocks, tasks, sockets or
files were not given back, if an answer was wrong, or if a process grew: if the slope of its
memory is above zero by more than chance allows.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections import Counter
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts._soak_http.clients import Client, Tally
from scripts._soak_http.memory import slope_of, tenths
from scripts._soak_http.server import Server, State

SERVE = (
    "--device", "sim", "--device-kv", "384MiB", "--host-pool", "512MiB",
    "--max-running", "16", "--max-queued", "200", "--reader-patience", "1s",
)  # fmt: skip
WARM_UP = 0.5
"""Share of the time that memory is not judged by: the story fills, allocators settle."""
QUIET_S = 60.0
"""How long the server may take to be quiet once all clients are gone."""


async def soak(server: Server, *, clients: int, seconds: float, seed: int) -> Tally:
    """Run all clients for so long."""
    tally = Tally()
    ends_s = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            dice = random.Random(f"{seed}-{number}")
            group.create_task(Client(server.port, dice, tally).keep_on(ends_s))
        while time.monotonic() < ends_s:
            await asyncio.sleep(1.0)
            server.sample()
    return tally


async def run(arguments: argparse.Namespace) -> int:
    seconds = arguments.minutes * 60
    async with Server(tuple(arguments.serve.split()) or SERVE) as server:
        # Everything is there that is made once: connections, caches, threads.
        warm = Tally()
        await asyncio.gather(
            *[Client(server.port, random.Random(n), warm).visit() for n in range(50)]
        )
        before = await server.quiet_state(within_s=QUIET_S)
        server.samples.clear()
        tally = await soak(server, clients=arguments.clients, seconds=seconds, seed=arguments.seed)
        after = await server.quiet_state(within_s=QUIET_S)
        counters = await server.counters()
        status = await server.stop()
    return report(arguments, tally, before, after, server.samples, counters, status)


def report(
    arguments: argparse.Namespace,
    tally: Tally,
    before: State,
    after: State,
    samples: dict[str, list[tuple[float, int]]],
    counters: dict[str, float],
    status: int,
) -> int:
    faults = [f"wrong: {count} x {what}" for what, count in tally.wrong.most_common(10)]
    faults += [f"leaked: {each}" for each in after.leaks(before)]
    if status:
        faults.append(f"the server ended with status {status}")
    print(f"{arguments.clients} clients, {arguments.minutes:g} minutes, seed {arguments.seed}")
    print("what they did: " + _listed(tally.done))
    print("what the server answered: " + _listed(tally.statuses))
    print("engine: " + _listed({name: round(count) for name, count in counters.items()}))
    print(f"before: {before}\nafter:  {after}")
    for name, resident in samples.items():
        slope = slope_of(resident[int(len(resident) * WARM_UP) :])
        print(f"{name}: {tenths(resident)}; then {slope}")
        if slope.low > 0:
            faults.append(f"{name} grows")
    for fault in faults:
        print(fault)
    print("failed" if faults else "nothing leaked")
    return 1 if faults else 0


def _listed(counts: dict[str, int] | Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of what the clients do")
    parser.add_argument("--serve", default="", help="flags for `pie-async serve` instead of ours")
    return uvloop.run(run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
