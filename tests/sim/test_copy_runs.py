"""Joining staging copies across holes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pie_async.device.copy_runs import bridged
from pie_async.messages import CopyRun


def test_a_hole_that_takes_no_longer_than_a_copy_is_copied_along():
    runs = [CopyRun(0, 100, 4), CopyRun(6, 106, 2), CopyRun(12, 112, 1)]
    assert bridged(runs, 1) == runs
    assert bridged(runs, 2) == [CopyRun(0, 100, 8), CopyRun(12, 112, 1)]
    assert bridged(runs, 4) == [CopyRun(0, 100, 13)]


def test_a_hole_of_another_size_on_the_other_side_is_none():
    runs = [CopyRun(0, 100, 4), CopyRun(7, 106, 2)]
    assert bridged(runs, 50) == runs


def test_a_run_that_lies_elsewhere_in_the_pool_is_never_overwritten():
    """Its staging slots lie in what would have been the hole."""
    runs = [CopyRun(0, 100, 4), CopyRun(40, 105, 1), CopyRun(6, 106, 2)]
    assert bridged(runs, 50) == runs


@st.composite
def _scattered(draw: st.DrawFn) -> list[CopyRun]:
    """Runs that overlap on neither side, mostly at the same distance."""
    slots = sorted(draw(st.sets(st.integers(0, 120), min_size=1, max_size=40)))
    moved = draw(st.sets(st.sampled_from(slots), max_size=3))
    return [CopyRun(500 + slot if slot in moved else slot, 1000 + slot, 1) for slot in slots]


@given(_scattered(), st.integers(0, 20))
def test_every_block_still_arrives_in_its_slot_from_its_slot(runs: list[CopyRun], most: int):
    def slots(runs: list[CopyRun]) -> dict[int, int]:
        return {
            run.device_slot + index: run.host_slot + index
            for run in runs
            for index in range(run.count)
        }

    joined = bridged(runs, most)
    copied = slots(joined)
    assert copied.items() >= slots(runs).items()
    assert sum(run.count for run in joined) == len(copied), "no staging slot is written twice"
    gaps = sum(run.count for run in joined) - len(runs)
    assert gaps <= most * (len(runs) - len(joined))
