"""What is set aside, what is given back, and how little that takes."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from pie_async.runtime.heap import SWEEP_EVERY_S, TIDY_EVERY_S, YOUNG_OBJECTS, settled, tidied
from pie_async.testing import run_in_virtual_time


def test_what_is_loaded_is_set_aside_until_the_block_ends() -> None:
    before = gc.get_threshold()
    gc.unfreeze()
    with settled():
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold() == (YOUNG_OBJECTS, *before[1:])
    assert gc.get_freeze_count() == 0
    assert gc.get_threshold() == before


@contextmanager
def set_aside_again() -> Iterator[None]:
    """No collections but those asked for; at the end nothing is set aside."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class InACycle:
    def __init__(self) -> None:
        self.itself = self


def test_garbage_that_nothing_brings_about_is_swept_now_and_then_and_not_after_the_end() -> None:
    async def main() -> None:
        async with tidied():
            kept = InACycle()
            gc.collect(0)
            old, young = weakref.ref(kept), weakref.ref(InACycle())
            del kept
            await asyncio.sleep(TIDY_EVERY_S + 1)
            assert old() is not None and young() is None
            await asyncio.sleep(SWEEP_EVERY_S)
            assert old() is None
            left = weakref.ref(InACycle())
        await asyncio.sleep(10 * SWEEP_EVERY_S)
        assert left() is not None
        assert len(asyncio.all_tasks()) == 1

    with set_aside_again():
        run_in_virtual_time(main())


def test_free_lists_are_emptied_once_a_minute_without_going_through_what_there_is() -> None:
    seen: list[tuple[int, int]] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append((info["generation"], len(gc.get_objects(generation=info["generation"]))))

    async def main() -> None:
        kept = [[] for _ in range(10_000)]
        gc.collect(0)  # it is old by then
        gc.callbacks.append(note)
        async with tidied():
            await asyncio.sleep(TIDY_EVERY_S + 1)
        assert kept

    with set_aside_again():
        try:
            run_in_virtual_time(main())
        finally:
            gc.callbacks.remove(note)
    assert [generation for generation, _ in seen] == [0, 2]
    assert all(num_objects < 1000 for _, num_objects in seen)
