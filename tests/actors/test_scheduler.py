"""The scheduler actor between mailboxes that nobody reads."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from pie_async.actors.scheduler import SchedulerActor
from pie_async.core.invariants import InvariantBroken
from pie_async.messages import (
    Cancel,
    Drain,
    Drained,
    IterationObserved,
    IterationRan,
    IterationStaged,
    MaskMade,
    MasksMade,
    RunIteration,
    SampledToken,
    SampleIteration,
    SequencesAdvanced,
    SetStreamedLimit,
    StageIteration,
    Submit,
    SwapIn,
    SwapOut,
    SwappedIn,
    SwappedOut,
)
from pie_async.sampling_params import SamplingParams
from pie_async.structured import StructuredOutputs
from tests.actors.neighbours import mailboxes, turns
from tests.support.perfect_device import a_schedule


def submit(
    sequence: int,
    *,
    prompt_len: int = 5,
    max_tokens: int = 3,
    guide: StructuredOutputs | None = None,
) -> Submit:
    return Submit(
        request=sequence,
        sequences=(sequence,),
        prompt_tokens=tuple(range(100 * sequence, 100 * sequence + prompt_len)),
        sampling=SamplingParams(max_tokens=max_tokens, structured_outputs=guide),
        seed=1,
        max_tokens=max_tokens,
    )


class Bench:
    """One scheduler, its neighbours, and short words for what they say."""

    def __init__(
        self,
        *,
        iterations_in_flight: int = 2,
        with_governor: bool = True,
        with_guide: bool = False,
        **schedule,
    ):
        self.schedule = a_schedule(**schedule)
        self.to = mailboxes(with_governor=with_governor, with_guide=with_guide)
        self.actor = SchedulerActor(
            self.schedule,
            iterations_in_flight=iterations_in_flight,
            mailbox_capacity=256,
            checks_invariants=True,
        )
        self.actor.connect(self.to)

    async def tell(self, *mail) -> None:
        for one in mail:
            self.actor.mailbox.post(one)
        await turns()

    async def make_masks(self) -> None:
        """Answer the guide's orders."""
        orders = [o for mail in self.to.guide.drain() for o in getattr(mail, "orders", ())]
        assert orders
        masks = tuple(MaskMade(order.sequence, order.slot, 1e-4) for order in orders)
        await self.tell(MasksMade(masks=masks))

    def commands(self) -> list[RunIteration]:
        return self.to.compute.drain()

    def ran(self, command: RunIteration, *, compute_s: float = 0.01) -> IterationRan:
        sampled = tuple(SampledToken(row.sequence, 9) for row in command.rows if row.is_sampled)
        return IterationRan(
            iteration=command.iteration, sampled=sampled, compute_s=compute_s, stall_s=0.0
        )


@pytest.fixture
async def started():
    """Makes benches whose actors run until the test is over."""
    tasks = []

    def start(**options) -> Bench:
        bench = Bench(**options)
        tasks.append(asyncio.create_task(bench.actor.run()))
        return bench

    yield start
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ExceptionGroup):
            await task


async def test_a_request_becomes_iterations_up_to_the_number_in_flight(started):
    bench = started(iterations_in_flight=2)
    await bench.tell(submit(1, max_tokens=9))
    assert [command.iteration for command in bench.commands()] == [1, 2]
    await turns()
    assert bench.commands() == []


async def test_one_iteration_in_flight_means_one(started):
    bench = started(iterations_in_flight=1)
    await bench.tell(submit(1, max_tokens=9))
    (first,) = bench.commands()
    await bench.tell(bench.ran(first))
    assert [command.iteration for command in bench.commands()] == [2]


async def test_mail_that_arrived_together_takes_part_in_one_plan(started):
    bench = started()
    await bench.tell(submit(1), submit(2), submit(3))
    assert [row.sequence for row in bench.commands()[0].rows] == [1, 2, 3]


async def test_tokens_go_to_delivery_with_their_iteration(started):
    bench = started()
    await bench.tell(submit(1))
    first = bench.commands()[0]
    await bench.tell(bench.ran(first))
    (fact,) = bench.to.delivery.drain()
    assert isinstance(fact, SequencesAdvanced)
    assert fact.iteration == 1
    assert [(a.sequence, a.token.token, a.finish_reason) for a in fact.advances] == [(1, 9, None)]


async def test_an_iteration_without_news_tells_delivery_nothing(started):
    bench = started(token_budget=4)
    await bench.tell(submit(1, prompt_len=9))
    await bench.tell(bench.ran(bench.commands()[0]))
    assert bench.to.delivery.drain() == []


async def test_the_governor_sees_what_an_iteration_was_made_of(started):
    bench = started()
    await bench.tell(submit(1))
    await bench.tell(bench.ran(bench.commands()[0], compute_s=0.25))
    (seen,) = bench.to.governor.drain()
    assert isinstance(seen, IterationObserved)
    assert (seen.iteration, seen.compute_s) == (1, 0.25)
    assert (seen.decode_rows, seen.prefill_tokens, seen.streamed_blocks) == (0, 5, 0)


async def test_without_a_governor_the_limit_is_left_alone(started):
    bench = started(with_governor=False, streamed_limit=3)
    await bench.tell(submit(1))
    await bench.tell(bench.ran(bench.commands()[0]))
    assert bench.schedule.streamed_limit == 3


async def test_a_new_limit_holds_from_the_next_plan_and_its_reason_is_shown(started):
    bench = started()
    await bench.tell(SetStreamedLimit(limit_blocks=5, cause="demand", reason="because"))
    stats = bench.actor.stats()
    assert (stats.streamed_limit_blocks, stats.governor_reason) == (5, "because")


async def under_pressure(started) -> tuple[Bench, SwapOut]:
    """A sequence alone that outgrew the device, and the copies it asked for."""
    bench = started(device_slots=5, host_slots=30, iterations_in_flight=1)
    await bench.tell(submit(1, prompt_len=14, max_tokens=20))
    while True:
        for command in bench.commands():
            bench.actor.mailbox.post(bench.ran(command))
        await turns()
        if len(bench.to.swap_out):
            return bench, bench.to.swap_out.drain()[0]


async def test_blocks_are_demoted_then_staged_with_the_iteration_that_reads_them(started):
    bench, out = await under_pressure(started)
    blocks = tuple(move.block for move in out.moves)
    await bench.tell(SwappedOut(blocks=blocks, swapped_bytes=100, busy_s=0.1))
    while not len(bench.to.swap_in):
        for command in bench.commands():
            bench.actor.mailbox.post(bench.ran(command))
        await turns()
    (stage,) = bench.to.swap_in.drain()
    assert isinstance(stage, StageIteration)
    (command,) = [c for c in bench.commands() if c.is_staged]
    assert command.iteration == stage.iteration
    assert bench.actor.stats().d2h_bytes == 100


@pytest.mark.parametrize("order", ["ran first", "staged first"])
async def test_a_staged_iteration_is_observed_once_both_halves_are_over(started, order: str):
    bench, out = await under_pressure(started)
    blocks = tuple(move.block for move in out.moves)
    await bench.tell(SwappedOut(blocks=blocks, swapped_bytes=100, busy_s=0.1))
    while not len(bench.to.swap_in):
        for command in bench.commands():
            bench.actor.mailbox.post(bench.ran(command))
        await turns()
    (command,) = bench.commands()
    bench.to.governor.drain()
    staged = IterationStaged(iteration=command.iteration, staged_bytes=64, busy_s=0.5)
    halves = [bench.ran(command), staged]
    first, second = halves if order == "ran first" else reversed(halves)
    await bench.tell(first)
    assert bench.to.governor.drain() == []
    await bench.tell(second)
    (seen,) = bench.to.governor.drain()
    assert (seen.staged_bytes, seen.staging_busy_s) == (64, 0.5)
    assert seen.streamed_blocks > 0


async def test_cancelling_answers_at_once_and_frees_when_the_device_is_done(started):
    bench = started()
    await bench.tell(submit(1, max_tokens=9))
    commands = bench.commands()
    await bench.tell(Cancel(sequences=(1,)))
    (fact,) = bench.to.delivery.drain()
    assert [(a.sequence, a.finish_reason) for a in fact.advances] == [(1, "abort")]
    assert bench.actor.stats().resident_blocks > 0, "two iterations may still write its blocks"
    await bench.tell(*[bench.ran(command) for command in commands])
    assert bench.actor.stats().resident_blocks == 0
    assert bench.to.delivery.drain() == []


async def test_draining_is_over_when_nothing_issued_is_left(started):
    bench = started()
    await bench.tell(submit(1, max_tokens=1), Drain())
    (command,) = bench.commands()
    assert bench.to.delivery.drain() == []
    await bench.tell(bench.ran(command))
    assert [type(fact) for fact in bench.to.delivery.drain()] == [SequencesAdvanced, Drained]


async def test_draining_an_idle_scheduler_is_over_at_once(started):
    bench = started()
    await bench.tell(Drain())
    assert bench.to.delivery.drain() == [Drained()]


async def test_draining_waits_for_copies_of_sequences_that_are_gone(started):
    bench, out = await under_pressure(started)
    commands = bench.commands()
    bench.to.delivery.drain()
    await bench.tell(Cancel(sequences=(1,)), Drain(), *[bench.ran(c) for c in commands])
    assert Drained() not in bench.to.delivery.drain()
    blocks = tuple(move.block for move in out.moves)
    await bench.tell(SwappedOut(blocks=blocks, swapped_bytes=1, busy_s=0.1))
    assert bench.to.delivery.drain() == [Drained()]
    assert bench.actor.stats().pooled_blocks == 0


async def test_promoted_blocks_are_counted(started):
    bench = started(device_slots=10, host_slots=30, streamed_limit=30)
    await bench.tell(submit(1, prompt_len=8, max_tokens=60), submit(2, prompt_len=8, max_tokens=25))
    for _ in range(400):
        for command in bench.commands():
            bench.actor.mailbox.post(bench.ran(command))
        for out in bench.to.swap_out.drain():
            blocks = tuple(move.block for move in out.moves)
            bench.actor.mailbox.post(SwappedOut(blocks=blocks, swapped_bytes=1, busy_s=0.0))
        for mail in bench.to.swap_in.drain():
            if isinstance(mail, SwapIn):
                blocks = tuple(move.block for move in mail.moves)
                fact = SwappedIn(blocks=blocks, swapped_bytes=7 * len(blocks), busy_s=0.0)
            else:
                fact = IterationStaged(iteration=mail.iteration, staged_bytes=0, busy_s=0.0)
            bench.actor.mailbox.post(fact)
        bench.to.delivery.drain()
        bench.to.governor.drain()
        await turns(4)
    stats = bench.actor.stats()
    assert stats.sequences_finished == 2
    assert stats.promotions > 0
    assert stats.h2d_bytes == 7 * stats.promotions
    assert (stats.resident_blocks, stats.pooled_blocks, stats.streamed_blocks) == (0, 0, 0)


async def test_contradicting_books_stop_the_actor_in_debug_mode():
    bench = Bench()
    running = asyncio.create_task(bench.actor.run())
    await bench.tell(submit(1))
    bench.schedule.residency.device.take()
    await bench.tell(submit(2))
    with pytest.raises(ExceptionGroup) as caught:
        await running
    assert isinstance(caught.value.exceptions[0], InvariantBroken)


# --- guided sequences ---------------------------------------------------------------------------


async def test_an_iteration_that_awaits_masks_is_sampled_when_they_come_and_none_passes_it(started):
    bench = started(iterations_in_flight=3, with_guide=True)
    await bench.tell(submit(1, max_tokens=9, guide=StructuredOutputs(regex="[0-9]+")))
    (prompt,) = bench.commands()
    await bench.make_masks()
    await bench.tell(bench.ran(prompt))
    first, late = bench.commands()
    assert (first.awaits_masks, late.awaits_masks) == (False, True)
    await bench.tell(submit(2))
    assert bench.commands() == [], "it would have to be issued behind the sampling"
    await bench.tell(bench.ran(first))
    assert bench.commands() == []
    await bench.make_masks()
    sampling, after = bench.commands()
    assert sampling == SampleIteration(iteration=late.iteration)
    assert [row.sequence for row in after.rows] == [1, 2]
    assert after.awaits_masks


async def test_an_iteration_awaits_no_masks_of_those_who_left(started):
    bench = started(with_guide=True)
    await bench.tell(submit(1, max_tokens=9, guide=StructuredOutputs(regex="[0-9]+")))
    (prompt,) = bench.commands()
    await bench.make_masks()
    await bench.tell(bench.ran(prompt))
    first, late = bench.commands()
    await bench.tell(Cancel(sequences=(1,)))
    assert bench.commands() == [SampleIteration(iteration=late.iteration)]
    await bench.tell(bench.ran(first), bench.ran(late), Drain())
    assert Drained() in bench.to.delivery.drain()


async def test_the_device_is_given_work_before_readers_hear_of_the_last(started):
    bench = started(iterations_in_flight=1)
    order: list[str] = []
    for name in ("compute", "delivery"):
        box = getattr(bench.to, name)
        box.post = lambda mail, post=box.post, name=name: (order.append(name), post(mail))
    await bench.tell(submit(1))
    await bench.tell(bench.ran(bench.commands()[0]))
    assert order == ["compute", "compute", "delivery"]
