"""What is set aside, and that it is given back."""

from __future__ import annotations

import gc

from pie_async.runtime.heap import YOUNG_OBJECTS, settled


def test_what_is_loaded_is_set_aside_until_the_block_ends() -> None:
    before = gc.get_threshold()
    gc.unfreeze()
    with settled():
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold() == (YOUNG_OBJECTS, *before[1:])
    assert gc.get_freeze_count() == 0
    assert gc.get_threshold() == before
