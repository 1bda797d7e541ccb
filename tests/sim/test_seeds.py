"""Whole runs drawn from one seed each: clean, the same every time, and hard enough to prove it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from pie_async.engine import Engine
from pie_async.runtime.virtual_time import VirtualTimeLoop
from tests.support.chaos import MANNERS, Chaos
from tests.support.chaos_run import ChaosFailed, Outcome, run

SEEDS, AT_ONCE = 200, 10
API_SEEDS = range(SEEDS, SEEDS + 50)
"""Others than without the API: more is seen."""
ROOT = Path(__file__).parents[2]

DEADLY = ("actor_raises", "lost_context", "sticky_error", "device_out_of_memory")

outcomes: dict[int, Outcome] = {}


def outcome_of(seed: int) -> Outcome:
    """Of a run of this seed, made once."""
    if seed not in outcomes:
        outcomes[seed] = run(seed)
    return outcomes[seed]


@pytest.mark.parametrize("first", range(0, SEEDS, AT_ONCE))
def test_seeds_are_clean(first: int):
    for seed in range(first, first + AT_ONCE):
        outcome = outcome_of(seed)
        assert outcome.messages > 0
        assert sum(outcome.endings.values()) == sum(c.params.n for c in Chaos.of(seed).clients)


@pytest.mark.parametrize("seed", [0, 7, 35, 101, 150])
def test_the_same_seed_tells_the_same_story_byte_for_byte(seed: int):
    first, second = outcome_of(seed), run(seed)
    assert len(first.story) > 1000
    assert first.story == second.story
    assert (first.stats, first.virtual_s) == (second.stats, second.virtual_s)


def test_another_process_with_other_hashes_tells_the_same_story():
    ran = subprocess.run(
        [sys.executable, "scripts/chaos.py", "--seed", "7"],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert f"story {outcome_of(7).digest}" in ran.stdout


def test_seeds_tell_different_stories():
    assert len({outcome_of(seed).digest for seed in range(20)}) == 20


def test_the_seeds_reach_every_kind_of_pressure_and_every_manner():
    """Otherwise they would prove little."""
    totals: Counter[str] = Counter()
    endings: Counter[str] = Counter()
    bites: Counter[str] = Counter()
    for seed in range(SEEDS):
        stats = outcome_of(seed).stats
        for name in (
            "preemptions_parked",
            "preemptions_recomputed",
            "demotions",
            "promotions",
            "prefix_hit_tokens",
            "cache_evictions",
            "sequences_cancelled",
            "h2d_bytes",
            "copy_attempts_failed",
            "copies_lost",
            "sequences_begun_anew",
        ):
            totals[name] += getattr(stats, name) > 0
        endings.update(outcome_of(seed).endings)
        bites.update(outcome_of(seed).bites.keys())
    assert min(totals.values()) >= 5, totals
    reasons = ("length", "stop", "abort", "Overloaded", "EngineStopped")
    assert min(endings[reason] for reason in reasons) >= 5, endings
    drawn = Counter(fault.point for seed in range(SEEDS) for fault in Chaos.of(seed).faults)
    assert set(drawn) == set(bites)
    assert min(bites[point] for point in drawn if point not in DEADLY) >= 5, bites
    assert sum(bites[point] for point in DEADLY) >= 5, bites
    chaoses = [Chaos.of(seed) for seed in range(SEEDS)]
    assert {client.manner for chaos in chaoses for client in chaos.clients} == set(MANNERS)
    assert sum(chaos.pool.refused_at is not None for chaos in chaoses) >= 5
    assert sum(chaos.mail_delay_s > 0 for chaos in chaoses) >= 50


@pytest.mark.parametrize("first", range(API_SEEDS.start, API_SEEDS.stop, AT_ONCE))
def test_seeds_are_clean_through_the_api(first: int):
    endings: Counter[str] = Counter()
    for seed in range(first, first + AT_ONCE):
        outcome = run(seed, through_api=True)
        assert sum(outcome.endings.values()) == sum(c.params.n for c in Chaos.of(seed).clients)
        endings.update(outcome.endings)
    assert endings["length"] > 0 < endings["stop"], endings


def test_the_same_seed_tells_the_same_story_through_the_api():
    assert (
        run(API_SEEDS.start, through_api=True).story == run(API_SEEDS.start, through_api=True).story
    )


def test_a_token_that_is_changed_fails_the_seed_through_the_api():
    def spoil(engine: Engine) -> None:
        engine._loaded().device.sampler._vocab_size -= 1

    seed = next(s for s in range(SEEDS) if outcome_of(s).messages > 500)
    with pytest.raises(ChaosFailed, match=rf"scripts/chaos --api --seed {seed}\b"):
        run(seed, through_api=True, change=spoil)


@pytest.mark.parametrize("what", ["a host slot", "a lane", "a block", "a token"])
def test_what_is_kept_or_changed_fails_the_seed_and_names_its_command(what: str):
    def spoil(engine: Engine) -> None:
        assert engine._actors is not None
        schedule = engine._actors.scheduler._schedule
        if what == "a host slot":
            schedule.residency.host.take()
        elif what == "a lane":
            schedule.lanes.take()
        elif what == "a block":
            schedule.residency.allocate(0)
        else:
            sampler = engine._loaded().device.sampler
            sampler._vocab_size -= 1

    seed = next(s for s in range(SEEDS) if Chaos.of(s).host_blocks and outcome_of(s).messages > 500)
    with pytest.raises(ChaosFailed, match=rf"scripts/chaos --seed {seed}\b"):
        run(seed, change=spoil)


def ready_order(seed: int | None) -> list[int]:
    async def main() -> list[int]:
        order: list[int] = []
        for number in range(20):
            asyncio.get_running_loop().call_soon(order.append, number)
        await asyncio.sleep(1)
        return order

    with asyncio.Runner(loop_factory=partial(VirtualTimeLoop, order_seed=seed)) as runner:
        return runner.run(main())


def test_the_order_of_ready_callbacks_is_drawn_and_drops_none():
    assert ready_order(None) == list(range(20))
    assert ready_order(1) == ready_order(1) != ready_order(2)
    assert sorted(ready_order(1)) == sorted(ready_order(2)) == list(range(20))


@pytest.mark.parametrize("seed", [245, 880, 4449, 5444, 874, 1091, 1442, 2685, 5692, 8401, 8576])
def test_seeds_that_once_failed_are_clean(seed: int):
    run(seed)
