"""Compute, swap-in and swap-out: a command becomes device work, its end becomes one fact."""

from __future__ import annotations

import asyncio

import pytest

from pie_async.actors.compute import ComputeActor
from pie_async.actors.swap_in import SwapInActor
from pie_async.actors.swap_out import SwapOutActor
from pie_async.device.protocol import CopyResult, PassResult
from pie_async.errors import DeviceFault
from pie_async.messages import (
    BlockMove,
    CopyRun,
    IterationRan,
    IterationStaged,
    RunIteration,
    SampledToken,
    SampleIteration,
    SchedulerMail,
    StageIteration,
    SwapIn,
    SwapOut,
    SwappedIn,
    SwappedOut,
)
from pie_async.runtime.mailbox import Mailbox
from tests.actors.neighbours import Queues, turns

COPIED = CopyResult(copied_bytes=4096, busy_s=0.5)
MOVES = (BlockMove(3, 0, 1), BlockMove(5, 2, 4))

CASES = {
    "run": (
        ComputeActor,
        RunIteration(iteration=7, rows=()),
        PassResult(sampled=(SampledToken(1, 2),), prompt_logprobs=(), compute_s=0.25, stall_s=0.5),
        IterationRan(iteration=7, sampled=(SampledToken(1, 2),), compute_s=0.25, stall_s=0.5),
    ),
    "stage": (
        SwapInActor,
        StageIteration(iteration=7, runs=(CopyRun(0, 9, 2),)),
        COPIED,
        IterationStaged(iteration=7, staged_bytes=4096, busy_s=0.5),
    ),
    "promote": (
        SwapInActor,
        SwapIn(moves=MOVES),
        COPIED,
        SwappedIn(blocks=(3, 5), swapped_bytes=4096, busy_s=0.5),
    ),
    "demote": (
        SwapOutActor,
        SwapOut(moves=MOVES),
        COPIED,
        SwappedOut(blocks=(3, 5), swapped_bytes=4096, busy_s=0.5),
    ),
}


@pytest.fixture
def queues() -> Queues:
    return Queues()


@pytest.fixture
def scheduler() -> Mailbox[SchedulerMail]:
    return Mailbox("scheduler", 16)


@pytest.mark.parametrize("what", CASES)
async def test_a_command_ends_in_exactly_one_fact(what: str, queues: Queues, scheduler):
    kind, command, result, fact = CASES[what]
    actor = kind(queues, scheduler)
    actor.mailbox.post(command)
    actor.mailbox.close()
    running = asyncio.create_task(actor.run())
    await turns()
    assert [asked for asked, _ in queues.asked] == [what]
    assert len(scheduler) == 0, "nothing is reported before it is over"
    queues.futures[0].set_result(result)
    await running
    assert scheduler.drain() == [fact]


@pytest.mark.parametrize("what", CASES)
async def test_a_device_fault_ends_the_actor_and_is_no_fact(what: str, queues: Queues, scheduler):
    kind, command, _, _ = CASES[what]
    actor = kind(queues, scheduler)
    actor.mailbox.post(command)
    running = asyncio.create_task(actor.run())
    await turns()
    queues.futures[0].set_exception(DeviceFault("gone"))
    with pytest.raises(ExceptionGroup) as caught:
        await running
    assert isinstance(caught.value.exceptions[0], DeviceFault)
    assert scheduler.drain() == []


@pytest.mark.parametrize("what", CASES)
async def test_commands_are_issued_without_waiting_for_those_before(
    what: str, queues: Queues, scheduler
):
    kind, command, result, fact = CASES[what]
    actor = kind(queues, scheduler)
    for _ in range(3):
        actor.mailbox.post(command)
    actor.mailbox.close()
    running = asyncio.create_task(actor.run())
    await turns()
    assert len(queues.futures) == 3
    for future in queues.futures:
        future.set_result(result)
    await running
    assert scheduler.drain() == [fact] * 3


@pytest.mark.parametrize("what", CASES)
async def test_cancelling_the_actor_cancels_its_wait_and_not_the_device_work(
    what: str, queues: Queues, scheduler
):
    kind, command, result, _ = CASES[what]
    actor = kind(queues, scheduler)
    actor.mailbox.post(command)
    running = asyncio.create_task(actor.run())
    await turns()
    running.cancel()
    await asyncio.wait([running])
    assert not queues.futures[0].cancelled()
    queues.futures[0].set_result(result)
    assert scheduler.drain() == []


async def test_iterations_are_reported_in_order_also_when_they_end_together(scheduler):
    """On a busy loop two iterations may be over before the second one's wait has begun; a wait
    for what is already over ends first."""
    result = PassResult(sampled=(), prompt_logprobs=(), compute_s=0.25, stall_s=0.0)

    class Sudden(Queues):
        def run(self, command: RunIteration) -> asyncio.Future[PassResult]:
            future = super().run(command)
            if command.iteration == 9:
                for one in self.futures:
                    one.set_result(result)
            return future

    actor = ComputeActor(Sudden(), scheduler)
    running = asyncio.create_task(actor.run())
    actor.mailbox.post(RunIteration(iteration=8, rows=()))
    await turns()
    actor.mailbox.post(RunIteration(iteration=9, rows=()))
    actor.mailbox.close()
    await running
    assert [fact.iteration for fact in scheduler.drain()] == [8, 9]


async def test_the_sampling_of_an_iteration_is_asked_for_after_it(queues: Queues, scheduler):
    actor = ComputeActor(queues, scheduler)
    running = asyncio.create_task(actor.run())
    command = RunIteration(iteration=8, rows=(), awaits_masks=True)
    actor.mailbox.post(command)
    actor.mailbox.post(SampleIteration(iteration=8))
    await turns()
    assert queues.asked == [("run", command), ("sample", 8)]
    assert scheduler.drain() == []
    running.cancel()
    await asyncio.wait([running])
