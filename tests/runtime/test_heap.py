"""What is set aside, and that it is given back."""

from __future__ import annotations

import asyncio
import gc
import weakref

from pie_async.runtime.heap import SWEEP_EVERY_S, YOUNG_OBJECTS, settled, swept
from pie_async.testing import run_in_virtual_time


def test_what_is_loaded_is_set_aside_until_the_block_ends() -> None:
    before = gc.get_threshold()
    gc.unfreeze()
    with settled():
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold() == (YOUNG_OBJECTS, *before[1:])
    assert gc.get_freeze_count() == 0
    assert gc.get_threshold() == before


class InACycle:
    def __init__(self) -> None:
        self.itself = self


def test_garbage_that_nothing_brings_about_is_swept_once_a_minute_and_not_after_the_end() -> None:
    async def main() -> None:
        async with swept():
            left = weakref.ref(InACycle())
            await asyncio.sleep(SWEEP_EVERY_S - 1)
            assert left() is not None
            await asyncio.sleep(2)
            assert left() is None
            left = weakref.ref(InACycle())
        await asyncio.sleep(10 * SWEEP_EVERY_S)
        assert left() is not None
        assert len(asyncio.all_tasks()) == 1

    gc.disable()
    try:
        run_in_virtual_time(main())
    finally:
        gc.enable()
