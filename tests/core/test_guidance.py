"""Masks of guided sequences: what is ordered when, who waits for whom, and that no slot leaks."""

from __future__ import annotations

from itertools import product

import pytest

from pie_async.core import invariants
from pie_async.core.batching import IterationPlan, plan_iteration
from pie_async.core.guidance import MASKS_PER_LANE, MOST_PATIENCE_S, PAUSE_ITERATIONS
from pie_async.core.residency import ResidencyMap
from pie_async.core.schedule import Schedule
from pie_async.core.sequence import State
from pie_async.ids import IterationId, RequestId, SequenceId
from pie_async.messages import Advance, MaskMade, MaskOrder, SampledToken, Submit
from pie_async.sampling_params import SamplingParams
from pie_async.structured import StructuredOutputs

GUIDE = StructuredOutputs(regex="[0-9]+")
SLOW_S = 2 * MOST_PATIENCE_S


class Bench:
    """A schedule whose iterations and masks are carried out by hand."""

    def __init__(self, *, device_slots: int = 64, lanes: int = 4, max_tokens: int = 20) -> None:
        self._max_tokens = max_tokens
        self.schedule = Schedule(
            residency=ResidencyMap(
                device_slots=device_slots, host_slots=64, staging_slots=64,
                first_staging_slot=device_slots,
            ),
            block_tokens=4,
            token_budget=16,
            max_running=lanes,
            eos_ids=frozenset({0}),
        )  # fmt: skip
        self.iteration = 0

    def submit(self, number: int, *, guided: bool, prompt: int = 3, output: int = 0) -> None:
        self.schedule.submit(
            Submit(
                request=RequestId(number),
                sequences=(SequenceId(number),),
                prompt_tokens=tuple(range(1, prompt + 1)),
                output_tokens=tuple(range(50, 50 + output)),
                sampling=SamplingParams(structured_outputs=GUIDE if guided else None),
                seed=number,
                max_tokens=self._max_tokens,
            )
        )

    def plan(self) -> IterationPlan:
        self.iteration += 1
        plan = plan_iteration(self.schedule, IterationId(self.iteration))
        invariants.check(self.schedule)
        if not plan.rows:
            self.iteration -= 1
        return plan

    def settle(self, token: int = 7) -> list[Advance]:
        launched = self.schedule.in_flight[0]
        sampled = [SampledToken(row.sequence, token) for row in launched.rows if row.is_sampled]
        _, advances = self.schedule.settle(launched.iteration, sampled)
        invariants.check(self.schedule)
        return advances

    def make(self, *orders: MaskOrder, made_s: float = MOST_PATIENCE_S, **outcome) -> list[Advance]:
        made = [MaskMade(order.sequence, order.slot, made_s, **outcome) for order in orders]
        advances = self.schedule.masks_made(made)
        invariants.check(self.schedule)
        return advances

    def orders(self) -> tuple[MaskOrder, ...]:
        orders = self.schedule.mask_orders()
        invariants.check(self.schedule)
        return orders


def rows(plan: IterationPlan) -> dict[int, tuple[int, bool]]:
    """Tokens fed and whether one is sampled, by sequence."""
    return {row.sequence: (row.num_tokens, row.is_sampled) for row in plan.rows}


def test_a_prompt_is_computed_but_for_its_last_token_until_the_mask_is_there():
    bench = Bench()
    bench.submit(1, guided=True, prompt=3)
    assert rows(bench.plan()) == {1: (2, False)}
    (order,) = bench.orders()
    assert order == MaskOrder(SequenceId(1), order.slot, (), GUIDE)
    assert bench.orders() == (), "one order at a time"
    bench.settle()
    assert not bench.plan().rows
    bench.make(order)
    plan = bench.plan()
    assert rows(plan) == {1: (1, True)}
    assert plan.rows[0].mask == order.slot


def test_a_prompt_of_one_token_waits_for_its_mask_with_nothing_in_flight():
    bench = Bench()
    bench.submit(1, guided=True, prompt=1)
    assert not bench.plan().rows
    bench.make(*bench.orders())
    assert rows(bench.plan()) == {1: (1, True)}


def test_the_others_go_on_while_one_with_a_slow_guide_waits():
    bench = Bench()
    bench.submit(1, guided=True)
    bench.submit(2, guided=False)
    assert rows(bench.plan()) == {1: (2, False), 2: (3, True)}
    (order,) = bench.orders()
    assert rows(bench.plan()) == {2: (1, True)}, "the second iteration in flight"
    bench.settle()
    assert rows(bench.plan()) == {2: (1, True)}
    bench.make(order, made_s=SLOW_S)
    bench.settle()
    assert rows(bench.plan()) == {1: (1, True), 2: (1, True)}
    bench.settle()
    assert rows(bench.plan()) == {2: (1, True)}, "its token is on the way: no mask, no row"


def under_way(bench: Bench, *numbers: int) -> None:
    """Guided sequences whose first tokens are being sampled."""
    for number in numbers:
        bench.submit(number, guided=True)
    bench.plan()
    bench.settle()
    bench.make(*bench.orders())
    assert rows(bench.plan()) == dict.fromkeys(numbers, (1, True))


def test_a_row_with_a_quick_guide_is_launched_before_its_mask_can_be_made():
    bench = Bench()
    under_way(bench, 1)
    bench.submit(2, guided=False)
    plan = bench.plan()
    assert rows(plan) == {1: (1, True), 2: (3, True)}
    guidance = bench.schedule.guidance
    assert guidance.late == {1: plan.rows[0].mask}
    assert bench.orders() == (), "the token before is not known"
    bench.settle(token=9)
    (order,) = bench.orders()
    assert (order.tokens, order.slot) == ((9,), plan.rows[0].mask)
    bench.make(order)
    assert guidance.late == {}, "it may be sampled"
    assert rows(bench.plan()) == {1: (1, True), 2: (1, True)}
    bench.settle()
    bench.make(*bench.orders())
    bench.settle()
    assert guidance.slots.num_used == 0


@pytest.mark.parametrize(("iteration_s", "is_slow"), [(1.0, False), (MOST_PATIENCE_S, True)])
def test_a_guide_that_has_become_slow_is_waited_for_once(iteration_s: float, is_slow: bool):
    bench = Bench()
    under_way(bench, 1)
    bench.plan()
    bench.settle()
    bench.schedule.guidance.iteration_took(iteration_s)
    bench.make(*bench.orders(), made_s=MOST_PATIENCE_S)
    assert rows(bench.plan()) == ({} if is_slow else {1: (1, True)})


@pytest.mark.parametrize(
    ("moment", "how"),
    [
        *product(("unknown", "ordered", "made"), ("cancelled", "parked")),
        *product(("ordered",), ("refused", "complete")),
    ],
)
def test_a_late_row_waits_for_nobody_who_has_left(moment: str, how: str):
    bench = Bench()
    under_way(bench, 1)
    bench.plan()
    schedule = bench.schedule
    orders: tuple[MaskOrder, ...] = ()
    if moment != "unknown":
        bench.settle()
        orders = bench.orders()
    if moment == "made":
        bench.make(*orders)
        orders = ()
    if how == "cancelled":
        schedule.cancel([SequenceId(1)], "abort")
    elif how == "parked":
        schedule.park(schedule.sequences[SequenceId(1)])
    if moment == "unknown":
        bench.settle(token=9)
        orders = bench.orders()
        assert len(orders) == (how == "parked"), "one that comes back will have its token"
    outcome = {"refused": {"refusal": "too complex"}, "complete": {"is_ended": True}}
    bench.make(*orders, **outcome.get(how, {}))
    assert bench.orders() == ()
    assert schedule.guidance.late == {}
    bench.settle(token=8)
    assert schedule.guidance.slots.num_used == 0
    if how == "parked":
        assert schedule.sequences[SequenceId(1)].tokens[-2:] == [7 if moment != "unknown" else 9, 8]


def late_while(bench: Bench, iterations: int, *, wait_share: float) -> list[bool]:
    """Whether masks were late, iteration by iteration; compute waits so long for those that are."""
    was_late = []
    for _ in range(iterations):
        if not bench.schedule.in_flight:
            bench.make(*bench.orders(), made_s=0.0)
            bench.plan()
        bench.plan()  # the next one, before the tokens of the one in flight are known
        bench.settle()
        guidance = bench.schedule.guidance
        was_late.append(bool(guidance.late))
        bench.make(*bench.orders(), made_s=0.0)
        guidance.iteration_took(1.0, wait_share if was_late[-1] else 0.0)
    return was_late


def test_others_do_not_wait_for_late_masks_longer_than_a_part_of_the_time():
    bench = Bench(device_slots=512, max_tokens=900)
    under_way(bench, 1)
    bench.submit(2, guided=False)
    assert all(late_while(bench, 20, wait_share=0.2))
    was_late = late_while(bench, 2 * PAUSE_ITERATIONS, wait_share=1.5)
    first = was_late.index(False)
    assert 1 < first < 12, "one that waits long says little"
    assert not any(was_late[first : first + PAUSE_ITERATIONS - 1])
    assert any(was_late[first + PAUSE_ITERATIONS :]), "then it is tried anew"
    bench.schedule.cancel([SequenceId(2)], "abort")
    late_while(bench, 2, wait_share=1.5)
    assert all(late_while(bench, 20, wait_share=1.5)), "nobody else waits"


def test_without_a_free_slot_no_row_is_late():
    bench = Bench()
    under_way(bench, 1)
    slots = bench.schedule.guidance.slots
    taken = [slots.take() for _ in range(slots.num_free)]
    assert plan_iteration(bench.schedule, IterationId(99)).rows == []
    for slot in taken:
        slots.give_back(slot)
    assert rows(bench.plan()) == {1: (1, True)}


def one_ahead(bench: Bench, *, made_s: float = MOST_PATIENCE_S) -> None:
    """Two guided sequences; the mask of one is made when the other is in flight already."""
    bench.submit(1, guided=True)
    bench.submit(2, guided=True)
    bench.plan()
    bench.settle()
    first, second = bench.orders()
    bench.make(first, made_s=made_s)
    assert rows(bench.plan()) == {1: (1, True)}
    bench.make(second, made_s=made_s)


def test_slow_guided_sequences_alone_stay_together():
    """Two iterations in flight of one half each would take twice as long as one of both."""
    bench = Bench()
    one_ahead(bench, made_s=SLOW_S)
    assert not bench.plan().rows, "it waits for the one in flight"
    bench.settle()
    (order,) = bench.orders()
    bench.make(order)
    assert rows(bench.plan()) == {1: (1, True), 2: (1, True)}


def test_quick_guided_sequences_alone_catch_up_with_the_one_in_flight():
    bench = Bench()
    one_ahead(bench)
    assert rows(bench.plan()) == {1: (1, True), 2: (1, True)}


def test_orders_tell_the_tokens_since_the_last_one():
    bench = Bench()
    bench.submit(1, guided=True, output=2)
    bench.plan()
    (order,) = bench.orders()
    assert (order.tokens, order.guide) == ((50, 51), GUIDE), "another engine's output comes first"
    bench.make(order)
    bench.settle()
    bench.plan()
    bench.settle(token=9)
    (order,) = bench.orders()
    assert (order.tokens, order.guide) == ((9,), None)


def test_a_complete_output_ends_without_another_iteration():
    bench = Bench()
    bench.submit(1, guided=True)
    bench.plan()
    advances = bench.make(*bench.orders(), is_ended=True)
    assert advances == [Advance(SequenceId(1), None, "stop")]
    assert bench.schedule.guidance.take_ended() == (1,)
    assert bench.schedule.guidance.take_ended() == ()
    assert bench.schedule.is_idle


def test_a_guide_that_fails_ends_its_sequence_and_says_why():
    bench = Bench()
    bench.submit(1, guided=True)
    bench.plan()
    (advance,) = bench.make(*bench.orders(), refusal="too complex")
    assert (advance.finish_reason, advance.unguided_because) == ("abort", "too complex")


@pytest.mark.parametrize("moment", ["ordered", "ready", "read"])
@pytest.mark.parametrize("how", ["cancelled", "parked"])
def test_no_slot_leaks_whenever_a_sequence_leaves(moment: str, how: str):
    bench = Bench()
    bench.submit(1, guided=True)
    bench.plan()
    orders = bench.orders()
    bench.settle()
    if moment != "ordered":
        bench.make(*orders)
    if moment == "read":
        bench.plan()
    schedule = bench.schedule
    if how == "cancelled":
        schedule.cancel([SequenceId(1)], "abort")
    else:
        schedule.park(schedule.sequences[SequenceId(1)])
    invariants.check(schedule)
    if moment == "ordered":
        bench.make(*orders)
    if moment == "read":
        bench.settle()
    assert schedule.guidance.slots.num_used == 0


def test_a_sequence_that_comes_back_orders_its_mask_anew_and_loses_no_token():
    bench = Bench()
    bench.submit(1, guided=True)
    bench.plan()
    bench.make(*bench.orders())
    bench.settle()
    bench.plan()
    schedule = bench.schedule
    seq = schedule.sequences[SequenceId(1)]
    schedule.park(seq)
    bench.settle(token=8)
    schedule.drop(seq)
    assert seq.state is State.WAITING
    bench.plan()
    (order,) = bench.orders()
    assert order.tokens == (8,)
    assert order.guide is None, "its guide is where it was"


def test_without_free_slots_a_sequence_waits_its_turn():
    bench = Bench(lanes=1)
    guidance = bench.schedule.guidance
    bench.submit(1, guided=True)
    bench.plan()
    taken = [guidance.slots.take() for _ in range(MASKS_PER_LANE)]
    assert bench.schedule.mask_orders() == ()
    for slot in taken:
        guidance.slots.give_back(slot)
    assert len(bench.orders()) == 1
