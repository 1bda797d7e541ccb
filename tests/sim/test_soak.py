"""Random loads: the same tokens as with room for everything, nothing leaked, the same twice."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts._soak.many_requests import run_many
from tests.support.soak import Scenario, compare, run

SEEDS = 32


@pytest.mark.parametrize("seed", range(SEEDS))
def test_tokens_are_those_of_a_run_in_which_everything_fits(seed: int):
    compare(Scenario.of(seed))


@pytest.mark.parametrize("seed", [3, 17, 29])
def test_the_same_run_twice_tells_the_same_story_byte_for_byte(seed: int):
    first, second = (run(Scenario.of(seed), with_story=True) for _ in range(2))
    assert len(first.story) > 1000
    assert first.story == second.story
    assert first.stats == second.stats


def test_another_seed_tells_another_story():
    assert run(Scenario.of(3), with_story=True).story != run(Scenario.of(4), with_story=True).story


def test_the_seeds_reach_every_kind_of_pressure():
    """Otherwise they would prove little."""
    stats = [run(Scenario.of(seed)).stats for seed in range(SEEDS)]
    pressure = ("preemptions_parked", "preemptions_recomputed", "demotions", "promotions")
    for name in (*pressure, "cached_tokens", "cache_evictions"):
        assert sum(getattr(one, name) for one in stats) > 0, name
    assert any(one.sequences_cancelled for one in stats)


def test_the_soak_script_runs_seeds_and_says_so():
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "scripts/soak.py", "--seeds", "0:2"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "2 of 2 seeds passed" in ran.stdout


def test_many_requests_give_everything_back():
    outcome = run_many(200, seed=1)  # 100,000 by the script
    assert outcome.ends["cancelled"] > 30
    assert outcome.ends["finished"] > 80
    assert outcome.stats.pauses > 0


def test_a_failing_seed_names_the_command_that_replays_it(monkeypatch: pytest.MonkeyPatch):
    from tests.support import soak

    def leak(engine) -> None:
        raise AssertionError("blocks leaked")

    monkeypatch.setattr(soak, "check_returned", leak)
    with pytest.raises(soak.SoakFailed, match=r"scripts/soak\.py --seeds 5:6"):
        run(Scenario.of(5))
