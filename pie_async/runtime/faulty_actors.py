"""Where a plan of faults reaches actors: what happens before a message is handled, or posted."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pie_async.errors import ConfigError
from pie_async.runtime.actor import Actor, Observer
from pie_async.runtime.faults import (
    ActorRaises,
    ClockJump,
    EngineKilled,
    Fault,
    FaultPlan,
    Faults,
    LogDiskFull,
    MailDelayed,
)
from pie_async.runtime.late_mail import LateMail


class InjectedFault(Exception):
    """What an actor raises because a plan says so: a mistake that nobody foresaw."""


def check_names(plan: FaultPlan, *, actors: Iterable[str], messages: Iterable[str]) -> None:
    """Whether a plan names actors and messages that there are.

    Raises:
        ConfigError: it does not; lists those there are.
    """
    known = {"actors": frozenset(actors), "messages": frozenset(messages)}
    for fault in plan.faults:
        for what, names in known.items():
            for name in getattr(fault, what, ()):
                if name not in names:
                    raise ConfigError(
                        f"fault {fault.point}: {what} has {name!r}; there are "
                        f"{', '.join(sorted(names))}",
                        option="faults",
                    )


def faulty(observer: Observer, faults: Faults) -> Observer:
    """The observer, after whom things go wrong as planned."""

    def observe(actor: str, message: Any) -> None:
        observer(actor, message)
        name = type(message).__name__

        def bites(kind: type[Fault]) -> Any:
            return faults.at(kind, actor=actor, message=name)

        if (jump := bites(ClockJump)) is not None:
            _jump(jump.seconds)
        if bites(EngineKilled):
            os.kill(os.getpid(), signal.SIGKILL)
        if bites(ActorRaises):
            raise InjectedFault(f"the {actor} actor failed at {name} (by a plan of faults)")

    return observe


def _jump(seconds: float) -> None:
    """Virtual clocks jump; on a real one nothing moves for so long, as when a machine slept."""
    jump = getattr(asyncio.get_running_loop(), "jump", time.sleep)
    jump(seconds)


def delay_mail(
    actors: Iterable[Actor[Any]], faults: Faults, sender_of: Callable[[Any], str]
) -> None:
    """Have messages come late as planned."""
    if not faults.has(MailDelayed):
        return

    def delay_of(actor: str, message: Any) -> float:
        late = faults.at(MailDelayed, actor=actor, message=type(message).__name__)
        return 0.0 if late is None else late.seconds

    for actor in actors:
        name = actor.name
        LateMail(
            actor.mailbox,
            delay_s=lambda message, name=name: delay_of(name, message),  # type: ignore[misc]
            sender_of=sender_of,
        )


class _FullDisk(io.TextIOBase):
    """A file that can sometimes not be written."""

    def __init__(self, faults: Faults) -> None:
        self._faults = faults

    def write(self, text: str) -> int:
        if self._faults.at(LogDiskFull):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(text)


@contextlib.contextmanager
def log_on_full_disk(faults: Faults | None) -> Iterator[None]:
    """Meanwhile the package's log also goes to a file on a disk that is full as planned."""
    if faults is None or not faults.has(LogDiskFull):
        yield
        return
    log, handler = logging.getLogger("pie_async"), logging.StreamHandler(_FullDisk(faults))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
