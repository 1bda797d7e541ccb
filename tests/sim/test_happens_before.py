"""The happens-before checker: what orders two accesses, what does not, and how it says so."""

from __future__ import annotations

import random

import numpy as np
import pytest

from pie_async.device.happens_before import HappensBefore, UnorderedAccess

COMPUTE, H2D, D2H = range(3)


def locations(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


@pytest.fixture
def order() -> HappensBefore:
    return HappensBefore(("compute", "h2d", "d2h"), 16, lambda number: f"slot {number}")


def test_one_stream_orders_its_own_accesses(order: HappensBefore):
    for label in ("first", "second"):
        order.begin(COMPUTE, label)
        order.write(COMPUTE, locations(1, 2))
        order.read(COMPUTE, locations(1, 2))


@pytest.mark.parametrize(
    ("first", "second"), [("write", "read"), ("read", "write"), ("write", "write")]
)
def test_conflicting_accesses_without_an_event_are_reported_with_both(
    order: HappensBefore, first: str, second: str
):
    order.begin(H2D, "stage layer 3")
    getattr(order, first)(H2D, locations(4, 5, 6))
    order.begin(COMPUTE, "run layer 3")
    expected = rf"compute: run layer 3 {second}s slot 6, which h2d: stage layer 3 {first}s"
    with pytest.raises(UnorderedAccess, match=expected):
        getattr(order, second)(COMPUTE, locations(9, 6))


def test_two_reads_need_no_order(order: HappensBefore):
    for stream in (COMPUTE, H2D, D2H):
        order.begin(stream, "read")
        order.read(stream, locations(1))


def test_other_locations_need_no_order(order: HappensBefore):
    order.begin(H2D, "write")
    order.write(H2D, locations(1))
    order.begin(COMPUTE, "write")
    order.write(COMPUTE, locations(2))


def test_an_awaited_event_orders_what_came_before_it(order: HappensBefore):
    order.begin(H2D, "stage")
    order.write(H2D, locations(1))
    order.wait(COMPUTE, order.record(H2D))
    order.begin(COMPUTE, "run")
    order.read(COMPUTE, locations(1))


def test_an_event_recorded_too_early_orders_nothing(order: HappensBefore):
    early = order.record(H2D)
    order.begin(H2D, "stage")
    order.write(H2D, locations(1))
    order.wait(COMPUTE, early)
    order.begin(COMPUTE, "run")
    with pytest.raises(UnorderedAccess):
        order.read(COMPUTE, locations(1))


def test_order_passes_through_a_third_stream(order: HappensBefore):
    order.begin(D2H, "demote")
    order.read(D2H, locations(1))
    order.wait(H2D, order.record(D2H))
    order.wait(COMPUTE, order.record(H2D))
    order.begin(COMPUTE, "overwrite")
    order.write(COMPUTE, locations(1))


def test_a_write_after_several_readers_needs_all_of_them(order: HappensBefore):
    for stream in (COMPUTE, D2H):
        order.begin(stream, "read")
        order.read(stream, locations(1))
    order.wait(H2D, order.record(COMPUTE))
    order.begin(H2D, "promote")
    with pytest.raises(UnorderedAccess, match="d2h: read"):
        order.write(H2D, locations(1))


def test_what_the_host_observed_orders_what_it_issues_later(order: HappensBefore):
    order.begin(COMPUTE, "run")
    order.read(COMPUTE, locations(1))
    fired = order.record(COMPUTE)
    order.observe(fired)
    order.host_issues()
    order.begin(H2D, "promote")
    order.write(H2D, locations(1))


def test_an_event_that_fired_unobserved_orders_nothing(order: HappensBefore):
    order.begin(COMPUTE, "run")
    order.read(COMPUTE, locations(1))
    order.record(COMPUTE)
    order.host_issues()
    order.begin(H2D, "promote")
    with pytest.raises(UnorderedAccess):
        order.write(H2D, locations(1))


@pytest.mark.parametrize("seed", range(20))
def test_it_agrees_with_reachability_on_random_programmes(seed: int):
    """Against the definition: a graph of operations, searched for a path."""
    rng = random.Random(seed)
    order = HappensBefore(("compute", "h2d", "d2h"), 4, str)
    last_of: list[frozenset[int]] = [frozenset()] * 3  # operations before each stream's next
    events: list[tuple[frozenset[int], tuple[int, ...]]] = []
    accesses: list[tuple[int, int, bool]] = []  # operation, location, is it a write
    for operation in range(200):
        stream = rng.randrange(3)
        action = rng.random()
        if action < 0.4 or not events:
            events.append((last_of[stream], order.record(stream)))
            continue
        if action < 0.8:
            before, clock = events[-1 - rng.randrange(min(6, len(events)))]
            order.wait(stream, clock)
            last_of[stream] |= before
            continue
        location, writes = rng.randrange(4), rng.random() < 0.4
        is_race = any(
            place == location and (writes or wrote) and earlier not in last_of[stream]
            for earlier, place, wrote in accesses
        )
        order.begin(stream, str(operation))
        access = order.write if writes else order.read
        if is_race:
            with pytest.raises(UnorderedAccess):
                access(stream, locations(location))
            continue
        access(stream, locations(location))
        accesses.append((operation, location, writes))
        last_of[stream] |= {operation}
