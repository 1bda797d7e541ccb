"""Very many requests through one simulated engine, in virtual time: all comes back at the end."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter

import msgspec

from pie_async import Engine, EngineConfig, SamplingParams
from pie_async.config import GIB, MIB
from pie_async.errors import PieError
from pie_async.metrics import EngineStats
from pie_async.request_stream import RequestStream
from pie_async.runtime.virtual_time import VirtualTimeLoop
from pie_async.testing import check_returned

AT_ONCE = 96
CONFIG = EngineConfig(
    device="sim", device_kv_bytes=256 * MIB, host_pool_bytes=GIB, pool_idle_s=1.0,
    reader_patience_s=0.05, max_running_sequences=32, watchdog_s=0.0,
)  # fmt: skip
CHUNK_BYTES = 256 * MIB
"""Of the host pool, which keeps one."""


class Outcome(msgspec.Struct, kw_only=True):
    """What came of them."""

    ends: Counter[str]
    stats: EngineStats
    host_bytes: int
    """Of the pool, once nothing has wanted it for a while."""
    virtual_s: float
    wall_s: float
    resident_mib: list[float]
    """Of this process, after each tenth."""

    def tell(self) -> str:
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))
        stats = self.stats
        return (
            f"{self.ends.total()} requests in {self.wall_s:.0f} s ({self.virtual_s:.0f} s of "
            f"virtual time): {ends}\n{stats.sequences_finished} sequences, {stats.output_tokens} "
            f"output tokens, {stats.preemptions_parked} parked, {stats.preemptions_recomputed} "
            f"recomputed, {stats.pauses} paused, {stats.demotions} demotions, {stats.promotions} "
            f"promotions, {stats.cache_evictions} cached blocks evicted\nat the end 0 blocks, "
            f"lanes and streams in use, {self.host_bytes // MIB} MiB of the host pool kept\n"
            "resident after each tenth, MiB: "
            + ", ".join(f"{mib:.1f}" for mib in self.resident_mib)
        )


def run_many(requests: int, *, seed: int) -> Outcome:
    """Run them.

    Raises:
        AssertionError: something did not come back, or ended wrongly.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(_run(requests, seed))


async def _run(requests: int, seed: int) -> Outcome:
    began_s, loop = time.perf_counter(), asyncio.get_running_loop()
    ends: Counter[str] = Counter()
    numbers = iter(range(requests))
    resident_mib: list[float] = []
    async with Engine(CONFIG) as engine:

        async def keep_asking() -> None:
            for number in numbers:
                if number % max(1, requests // 10) == 0:
                    resident_mib.append(_resident_bytes() / MIB)
                ends[await _ask(engine, random.Random(f"{seed}-{number}"))] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(keep_asking())
        # Cancelled ones may still have copies under way.
        await asyncio.sleep(5 * CONFIG.pool_idle_s)
        stats, took_s = engine.stats(), loop.time()
        assert not engine._streams, f"{len(engine._streams)} streams are open"
        assert engine._admission.num_requests == engine._admission.num_tokens == 0
        check_returned(engine)
        host_bytes = stats.host_blocks * stats.block_bytes
        assert host_bytes <= CHUNK_BYTES, f"{host_bytes} bytes of the host pool were kept"
        await engine.drain()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks are left: {left}"
    return Outcome(
        ends=ends,
        stats=stats,
        host_bytes=host_bytes,
        virtual_s=took_s,
        resident_mib=resident_mib,
        wall_s=time.perf_counter() - began_s,
    )


async def _ask(engine: Engine, dice: random.Random) -> str:
    """One request of a client that may leave, or stop reading for a while."""
    family = dice.randrange(20)
    prompt = [1 + (family * 997 + i * 31) % 9000 for i in range(dice.randrange(1, 600))]
    max_tokens = dice.choice([1, 5, 20, 60, 300])
    params = SamplingParams(
        max_tokens=max_tokens, n=dice.choice([1, 1, 1, 1, 2]), seed=family, output_kind="delta"
    )
    await asyncio.sleep(dice.expovariate(1 / 0.1))
    leave_s = dice.expovariate(1 / 0.3) if dice.random() < 0.4 else None
    try:
        stream = await engine.submit(prompt, params)
    except PieError as error:
        return type(error).__name__
    timer = None
    if leave_s is not None:
        timer = asyncio.get_running_loop().call_later(leave_s, stream.cancel)
    try:
        return await _read(stream, dice, max_tokens)
    finally:
        if timer is not None:
            timer.cancel()


async def _read(stream: RequestStream, dice: random.Random, max_tokens: int) -> str:
    stops_at = dice.randrange(1, 10) if dice.random() < 0.1 else None
    counts: Counter[int] = Counter()
    reasons: dict[int, str | None] = {}
    async for output in stream:
        for choice in output.outputs:
            counts[choice.index] += len(choice.token_ids)
            reasons[choice.index] = choice.finish_reason
        if stops_at is not None and counts[0] >= stops_at:
            stops_at = None
            await asyncio.sleep(dice.uniform(0.0, 1.0))
    for index, reason in reasons.items():
        is_whole = counts[index] == max_tokens
        assert is_whole if reason == "length" else reason == "abort", (counts, reasons)
    return "cancelled" if "abort" in reasons.values() else "finished"


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")
