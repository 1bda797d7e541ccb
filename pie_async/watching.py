"""An engine's watchdog: what it looks at, what its report tells, what it does then."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from pie_async.config import EngineConfig
from pie_async.errors import EngineStuck
from pie_async.runtime.faults import Faults
from pie_async.runtime.report import Sections, write_report
from pie_async.runtime.watchdog import STUCK, Turns, Watchdog, Watched
from pie_async.story import Story

if TYPE_CHECKING:
    from pie_async.wiring import Actors

TOLD = 200
"""Messages of the story that a report tells."""

Stop = Callable[[EngineStuck], None]


def watch_engine(
    actors: Actors,
    config: EngineConfig,
    story: Story,
    *,
    faults: Faults | None = None,
    stop: Stop | None,
) -> Watchdog | None:
    """Start to watch an engine's actors, its device and the running loop; None: switched off.

    Args:
        faults: the plan that is running, if one is: the report tells it, and what has bitten.
        stop: called on the loop if the engine stands still. None: the process is the engine's own
            and ends, for whatever holds it up may hold up its end as well.
    """
    sections: dict[str, Callable[[], str]] = {
        "engine": lambda: _lines(actors.scheduler.stats()),
        "configuration": lambda: _lines(config),
        "story": lambda: story.tell(last=TOLD),
    }
    if faults is not None:
        sections["faults"] = lambda: f"{_lines(faults.plan)}\nbites: {dict(faults.bites)}"
    return _watch(config, actors.watched, sections, stop=stop)


def watch_loop(config: EngineConfig) -> Watchdog | None:
    """Start to watch the running loop of a process that is to end if it stands still."""
    return _watch(config, (), {"configuration": lambda: _lines(config)}, stop=None)


def _watch(
    config: EngineConfig, watched: tuple[Watched, ...], sections: Sections, *, stop: Stop | None
) -> Watchdog | None:
    if not config.watchdog_s:
        return None
    loop = asyncio.get_running_loop()

    def bite(one: Watched) -> None:
        why = f"the {one.name} stood still for {config.watchdog_s:g} s: {one.tell()}"
        states = "\n".join(f"{each.name}: {each.tell()}" for each in watchdog.watched)
        write_report(config.report_dir, why, loop, {"watched": lambda: states, **sections})
        if stop is None:
            os._exit(STUCK)
        # A loop that turns again may go on, and one that does not cannot stop anything.
        if not isinstance(one, Turns):
            loop.call_soon_threadsafe(stop, EngineStuck(f"the engine stopped: {why}"))

    watchdog = Watchdog(loop, watched, within_s=config.watchdog_s, bite=bite)
    watchdog.start()
    return watchdog


def _lines(values: msgspec.Struct) -> str:
    return "\n".join(f"{name}: {value}" for name, value in msgspec.structs.asdict(values).items())
