"""Overload: who has started goes on, who was parked comes back in turn, priorities count."""

from __future__ import annotations

import asyncio
import random

import pytest

from pie_async import Engine, SamplingParams
from pie_async.core.schedule import Schedule
from pie_async.core.sequence import Sequence
from pie_async.testing import check_returned
from tests.support.soak import BLOCK_BYTES

REQUESTS = 80
LONGEST_GAP_SHARE = 0.25
"""Between two tokens of a sequence, of the time in which everything is answered: what is parked
waits for those before it, never for those that came after. Over twelve seeds 0.16 at most."""


class Turns:
    """Watches whose turn it is: resumed and started sequences in serving order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.resumed = 0
        resume, adopt = Schedule.resume, Schedule.adopt_prefix

        def checked_resume(schedule: Schedule, seq: Sequence) -> None:
            assert seq.order == min(other.order for other in schedule.parked)
            self.resumed += 1
            resume(schedule, seq)

        def checked_adopt(schedule: Schedule, seq: Sequence) -> None:
            """Called for each sequence that starts for the first time, or over."""
            behind = schedule.next_waiting()
            assert behind is None or seq.order < behind.order
            assert all(seq.order < parked.order for parked in schedule.parked)
            adopt(schedule, seq)

        monkeypatch.setattr(Schedule, "resume", checked_resume)
        monkeypatch.setattr(Schedule, "adopt_prefix", checked_adopt)


async def serve(
    seed: int, requests_per_s: float, link: str
) -> tuple[float, float, dict[int, list[float]]]:
    """Seconds for all, the longest gap between two tokens, and by priority when each started."""
    dice = random.Random(seed)
    longest_gap_s = 0.0
    waited_s: dict[int, list[float]] = {0: [], 1: []}
    clock = asyncio.get_running_loop()
    began_s = clock.time()

    async def one(engine: Engine, number: int, at_s: float, length: int, most: int) -> None:
        nonlocal longest_gap_s
        await asyncio.sleep(at_s)
        priority = number % 4 == 0
        params = SamplingParams(max_tokens=most, seed=number, output_kind="delta")
        last_s, count = clock.time(), 0
        prompt = [(number * 37 + 7 * i) % 1000 for i in range(length)]
        async for output in engine.generate(prompt, params, priority=int(not priority)):
            gap_s, last_s = clock.time() - last_s, clock.time()
            if count:
                longest_gap_s = max(longest_gap_s, gap_s)
            else:
                waited_s[int(not priority)].append(gap_s)
            count += len(output.outputs[0].token_ids)
        assert count == most

    async with Engine(
        device="sim", model="tiny", debug=True, sim_link=link, seed=seed,
        device_kv_bytes=24 * BLOCK_BYTES, host_pool_bytes=200 * BLOCK_BYTES,
    ) as engine:  # fmt: skip
        at_s = 0.0
        async with asyncio.TaskGroup() as group:
            for number in range(REQUESTS):
                at_s += dice.expovariate(requests_per_s) if requests_per_s else 0.0
                length, most = dice.randrange(10, 80), dice.randrange(20, 120)
                group.create_task(one(engine, number, at_s, length, most))
        await engine.drain()
        check_returned(engine)
    return clock.time() - began_s, longest_gap_s, waited_s


@pytest.mark.parametrize("link", ["pcie5", "nvlink"])
@pytest.mark.parametrize("seed", range(4))
async def test_under_overload_nobody_who_has_started_starves(
    seed: int, link: str, monkeypatch: pytest.MonkeyPatch
):
    turns = Turns(monkeypatch)
    burst_s, _, _ = await serve(seed, 0.0, link)
    total_s, longest_gap_s, waited_s = await serve(seed, 3 * REQUESTS / burst_s, link)
    if link == "pcie5":
        assert turns.resumed > 0, "nobody was parked"
    assert longest_gap_s < LONGEST_GAP_SHARE * total_s
    first, second = (sum(w) / len(w) for w in waited_s.values())
    assert first < second
