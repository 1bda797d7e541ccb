"""The kit for others' tests: what it gives, what it notices, and that others can use it."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pie_async import SamplingParams
from pie_async.errors import EngineStopped
from pie_async.ids import BlockId
from pie_async.messages import IterationRan, RunIteration, Submit, SwapOut, SwappedOut
from pie_async.story import Story
from pie_async.testing import (
    ActorRaises,
    CopyFailed,
    Deadlock,
    FaultPlan,
    Faults,
    SlowReader,
    Vanished,
    VanishedClient,
    VirtualTimeLoop,
    ask,
    check_answered,
    check_order,
    check_returned,
    disturbed,
    expected_tokens,
    run_in_virtual_time,
    simulated_engine,
    told,
)
from pie_async.testing.checks import schedule_of

ROOT = Path(__file__).parents[2]
PARAMS = SamplingParams(max_tokens=40, seed=5, n=2)


async def test_an_answer_of_the_simulated_engine_is_what_is_expected():
    async with simulated_engine() as engine:
        answers = await ask(engine, [1, 2, 3], PARAMS)
        for index, answer in enumerate(answers):
            assert answer.tokens == expected_tokens(engine, 3, PARAMS, index=index)
            assert (answer.finish_reason, answer.error) == ("length", None)
        check_order(engine.story, Submit, RunIteration, IterationRan)
        assert len(told(engine.story, Submit, prompt_tokens=(1, 2, 3))) == 1


async def test_what_went_wrong_with_a_copy_is_in_the_story_and_not_in_the_answers():
    few = {"device_blocks": 8, "host_blocks": 40, "streamed_blocks": 5}
    plan = [CopyFailed(at=(1, 2, 3), copies=("demote",))]
    async with simulated_engine(faults=plan, **few) as engine:
        params = SamplingParams(max_tokens=60, seed=5)
        answers = await asyncio.gather(*[ask(engine, [n] * 60, params) for n in range(1, 4)])
        for (answer,) in answers:
            assert answer.tokens == expected_tokens(engine, 60, params)
        (first, *_) = told(engine.story, SwappedOut)
        assert first.failed and not first.blocks
        check_order(engine.story, lambda m: isinstance(m, SwappedOut) and m.failed, SwapOut)


async def test_what_is_not_returned_is_named():
    async with simulated_engine() as engine:
        await ask(engine, [1, 2, 3], PARAMS)
        check_returned(engine)
        schedule = schedule_of(engine)
        for pool in (schedule.residency.host, schedule.residency.device, schedule.lanes):
            slot = pool.take()
            with pytest.raises(AssertionError, match=f"{pool.name} slots leak|lanes for 0 running"):
                check_returned(engine)
            pool.give_back(slot)
        engine._streams["left"] = object()
        with pytest.raises(AssertionError, match=r"not returned: .*'streams': 1"):
            check_returned(engine)
        del engine._streams["left"]


def test_a_command_without_an_end_is_named_and_so_is_an_end_without_one():
    story = Story(lambda: 0.0)
    story.note("compute", RunIteration(iteration=3, rows=()))
    with pytest.raises(AssertionError, match=r"\('iteration', 3\): 1"):
        check_answered(story)
    story.note("scheduler", IterationRan(iteration=3, sampled=(), compute_s=0.0, stall_s=0.0))
    check_answered(story)
    story.note("scheduler", SwappedOut(blocks=(), failed=(BlockId(7),), swapped_bytes=0, busy_s=0))
    with pytest.raises(AssertionError, match=r"\('out', 7\): -1"):
        check_answered(story)


def test_a_step_that_did_not_come_is_named_with_the_story():
    story = Story(lambda: 0.0)
    story.note("compute", RunIteration(iteration=3, rows=()))
    with pytest.raises(AssertionError, match=r"(?s)step 1, IterationRan, .*iteration=3"):
        check_order(story, RunIteration, IterationRan)


async def test_an_engine_that_stops_fails_the_test_unless_it_may():
    plan = FaultPlan(faults=(ActorRaises(at=(3,)),))
    with pytest.raises(EngineStopped, match="by a plan of faults"):
        async with simulated_engine(faults=plan) as engine:
            await ask(engine, [1, 2, 3], PARAMS)
    async with simulated_engine(faults=plan, may_stop=True) as engine:
        answers = await ask(engine, [1, 2, 3], PARAMS)
        assert all(isinstance(answer.error, EngineStopped) for answer in answers)


async def test_a_slow_and_a_vanished_client():
    plan = (SlowReader(at=(2, 4), seconds=1e-3), VanishedClient(at=(6,)))
    faults = Faults(FaultPlan(faults=plan))
    async with simulated_engine() as engine:
        params = SamplingParams(max_tokens=400, seed=5, output_kind="delta")
        (answer,) = await ask(engine, [1, 2, 3], params, faults=faults)
        assert asyncio.get_running_loop().time() > 2e-3
        assert isinstance(answer.error, Vanished)
        expected = expected_tokens(engine, 3, params)
        assert answer.tokens == expected[: len(answer.tokens)]
        assert 6 < len(answer.tokens) < 400
        await engine.drain()
        assert engine.stats().sequences_cancelled == 1
    assert faults.bites == {"slow_reader": 2, "vanished_client": 1}


async def test_disturbed_passes_on_what_it_is_given():
    async def three():
        for number in range(3):
            yield number

    assert [number async for number in disturbed(three(), None)] == [0, 1, 2]


def test_virtual_time_jumps_and_names_a_deadlock():
    async def sleep() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    assert run_in_virtual_time(sleep()) == pytest.approx(3600)

    async def never() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Deadlock, match="never"):
        run_in_virtual_time(never())


async def test_a_callback_that_fails_unheard_fails_the_test(caplog):
    def fail() -> None:
        raise ZeroDivisionError("in a callback")

    async def use() -> None:
        async with simulated_engine() as engine:
            asyncio.get_running_loop().call_soon(fail)
            await ask(engine, [1, 2, 3], PARAMS)

    with pytest.raises(ExceptionGroup, match="nobody was told") as raised:
        await use()
    assert isinstance(raised.value.exceptions[0], ZeroDivisionError)
    assert "in a callback" in caplog.text


@pytest.mark.sim_engine(device_blocks=8, host_blocks=0)
async def test_the_fixture_takes_options_from_its_mark(sim_engine):
    assert sim_engine.stats().device_blocks == 8
    assert isinstance(asyncio.get_running_loop(), VirtualTimeLoop)
    await ask(sim_engine, [1, 2, 3], PARAMS)
    check_returned(sim_engine)


def test_it_loads_neither_torch_nor_pytest():
    code = (
        "import sys, pie_async.testing as kit\n"
        "async def main():\n"
        "    async with kit.simulated_engine() as engine:\n"
        "        print((await kit.ask(engine, [1, 2, 3]))[0].finish_reason)\n"
        "kit.run_in_virtual_time(main())\n"
        "print(sorted({'torch', 'pytest', 'aiohttp'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["length", "[]"]


ELSEWHERE = """
import asyncio

import pytest

from pie_async.testing import ActorRaises, VirtualTimeLoop, ask, simulated_engine

pytestmark = pytest.mark.asyncio


async def test_with_the_fixture(sim_engine):
    assert isinstance(asyncio.get_running_loop(), VirtualTimeLoop)
    (answer,) = await ask(sim_engine, "To be")
    assert answer.finish_reason == "length"


@pytest.mark.virtual_time
async def test_with_the_context_manager():
    async with simulated_engine(faults=[ActorRaises(at=(4,))], may_stop=True) as engine:
        (answer,) = await ask(engine, "To be")
        assert "by a plan of faults" in str(answer.error)
    await asyncio.sleep(3600)


async def test_of_something_else():
    assert not isinstance(asyncio.get_running_loop(), VirtualTimeLoop)


async def test_that_keeps_what_it_should_not(sim_engine):
    sim_engine._running_actors().scheduler._schedule.lanes.take()
"""


def test_it_works_in_somebody_elses_project_as_the_page_says(tmp_path: Path):
    conftest, page_test = python_blocks(ROOT / "docs" / "testing.md")[:2]
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_elsewhere.py").write_text(ELSEWHERE)
    (tmp_path / "test_of_the_page.py").write_text(page_test)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-o", "asyncio_mode=auto", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "6 passed, 1 error" in ran.stdout, ran.stdout
    assert "1 lanes for 0 running" in ran.stdout


def python_blocks(page: Path) -> list[str]:
    """The Python in a page, in order."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
