"""For tests of what embeds the engine: virtual time, a simulated engine, faults, checks.

docs/testing.md shows how. Nothing here needs torch or a GPU; only `plugin` needs pytest.
"""

from __future__ import annotations

from pie_async.runtime.faults import (
    ActorRaises,
    ApiKilled,
    ArenaRefused,
    ClockJump,
    CopyCorrupted,
    CopyFailed,
    CopySlow,
    CopyStuck,
    DeviceOutOfMemory,
    EngineKilled,
    EventNeverFires,
    FaultPlan,
    Faults,
    KernelSlow,
    LogDiskFull,
    LostContext,
    MailDelayed,
    PinningRefused,
    PoolRefused,
    SlowReader,
    StickyError,
    VanishedClient,
)
from pie_async.runtime.virtual_time import Deadlock, VirtualTimeLoop
from pie_async.testing.checks import check_books, check_returned, expected_tokens
from pie_async.testing.clients import Answer, Vanished, ask, disturbed
from pie_async.testing.engines import checked, run_in_virtual_time, simulated_engine
from pie_async.testing.stories import check_answered, check_order, told

__all__ = [
    "ActorRaises",
    "Answer",
    "ApiKilled",
    "ArenaRefused",
    "ClockJump",
    "CopyCorrupted",
    "CopyFailed",
    "CopySlow",
    "CopyStuck",
    "Deadlock",
    "DeviceOutOfMemory",
    "EngineKilled",
    "EventNeverFires",
    "FaultPlan",
    "Faults",
    "KernelSlow",
    "LogDiskFull",
    "LostContext",
    "MailDelayed",
    "PinningRefused",
    "PoolRefused",
    "SlowReader",
    "StickyError",
    "Vanished",
    "VanishedClient",
    "VirtualTimeLoop",
    "ask",
    "check_answered",
    "check_books",
    "check_order",
    "check_returned",
    "checked",
    "disturbed",
    "expected_tokens",
    "run_in_virtual_time",
    "simulated_engine",
    "told",
]
