from __future__ import annotations

import msgspec

from pie_async.ids import IterationId
from pie_async.messages import Drain, IterationRan, RunIteration
from pie_async.story import Entry, Story


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def ran(iteration: int) -> IterationRan:
    return IterationRan(iteration=IterationId(iteration), sampled=(), compute_s=0.5, stall_s=0.0)


def test_it_keeps_the_last_messages_in_order():
    story = Story(Clock(), length=3)
    for number in range(5):
        story.note("scheduler", ran(number))
    assert [entry.message.iteration for entry in story] == [2, 3, 4]
    assert len(story) == 3


def test_it_finds_all_of_one_iteration():
    story = Story(Clock())
    story.note("scheduler", Drain())
    story.note("compute", RunIteration(iteration=IterationId(7), rows=()))
    story.note("scheduler", ran(7))
    story.note("scheduler", ran(8))
    assert [entry.actor for entry in story.of_iteration(IterationId(7))] == ["compute", "scheduler"]


def test_equal_stories_are_equal_bytes_and_every_difference_shows():
    def told(at_s: float, actor: str, iteration: int) -> bytes:
        clock = Clock()
        clock.now_s = at_s
        story = Story(clock)
        story.note(actor, ran(iteration))
        return story.to_bytes()

    assert told(1.0, "scheduler", 7) == told(1.0, "scheduler", 7)
    others = {told(1.5, "scheduler", 7), told(1.0, "compute", 7), told(1.0, "scheduler", 8)}
    assert told(1.0, "scheduler", 7) not in others


def test_its_bytes_can_be_read_back():
    clock = Clock()
    story = Story(clock)
    clock.now_s = 2.5
    story.note("scheduler", ran(3))
    assert msgspec.msgpack.decode(story.to_bytes(), type=Entry) == Entry(2.5, "scheduler", ran(3))


def test_it_tells_the_last_entries_a_line_each():
    story = Story(Clock())
    for number in range(50):
        story.note("scheduler", ran(number))
    lines = story.tell(last=2).splitlines()
    assert len(lines) == 2
    assert "scheduler" in lines[-1]
    assert "iteration=49" in lines[-1]
