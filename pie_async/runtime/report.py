"""What a process was doing when it had to be ended, written to a file that outlives it.

Nothing here may hang or raise: a full disk, a damaged object or a lock that somebody holds costs
the part of the report that it concerns.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

WRITE_S = 5.0
"""How long writing may take."""
MOST_REPORTS = 20
"""Older ones of a directory are deleted: what goes on for ever must not fill the disk."""

_NAME = "pie-report-"

_log = logging.getLogger(__name__)

Sections = Mapping[str, Callable[[], str]]
"""What else a report tells: headline -> text, made when it is written."""


def write_report(
    directory: str | None, why: str, loop: asyncio.AbstractEventLoop, sections: Sections
) -> Path | None:
    """Write a report, in a thread that is waited for `WRITE_S` at most, and name it in the log.

    Args:
        directory: made if it is missing; None: one in the user's cache directory.

    Returns:
        its file, or None if that could not be written; the stacks then are on standard error.
    """
    written: list[Path] = []

    def write() -> None:
        try:
            written.append(_write(Path(directory or default_directory()), why, loop, sections))
        except Exception as error:
            _log.error("%s; no report: %s", why, error)
            faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
        else:
            _log.error("%s; the report is %s", why, written[0])

    thread = threading.Thread(target=write, name="pie-report", daemon=True)
    thread.start()
    thread.join(WRITE_S)
    return written[0] if written else None


def default_directory() -> Path:
    """Where the user's caches are."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "pie_async" / "reports"


def _write(directory: Path, why: str, loop: asyncio.AbstractEventLoop, sections: Sections) -> Path:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    _make_room(directory)
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    path = directory / f"{_NAME}{stamp}-{os.getpid()}-{time.monotonic_ns() % 10**6:06}.txt"
    # Not a file, or a link, that somebody else put there; and nobody else's to read.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(fd, "w", encoding="utf-8", errors="replace") as file:
        file.write(f"{why}\n\nprocess {os.getpid()}, {stamp}, Python {sys.version.split()[0]}\n")
        _write_part(file, "threads", _threads)
        file.flush()
        faulthandler.dump_traceback(file=file, all_threads=True)
        for headline, tell in ({"tasks": lambda: _tasks(loop)} | dict(sections)).items():
            _write_part(file, headline, tell)
    return path


def _write_part(file: io.TextIOBase | Any, headline: str, tell: Callable[[], str]) -> None:
    try:
        text = tell()
    except Exception as error:
        text = f"could not be told: {type(error).__name__}: {error}"
    file.write(f"\n--- {headline} ---\n{text}\n")


def _make_room(directory: Path) -> None:
    reports = sorted(directory.glob(f"{_NAME}*.txt"))
    for old in reports[: max(0, len(reports) - MOST_REPORTS + 1)]:
        with contextlib.suppress(OSError):
            old.unlink()


def _threads() -> str:
    """What the numbers in the stacks below are called."""
    return "\n".join(f"0x{each.ident or 0:016x} {each.name}" for each in threading.enumerate())


def _tasks(loop: asyncio.AbstractEventLoop) -> str:
    """Every task of the loop and where it waits, outermost call first."""
    tasks = sorted(asyncio.all_tasks(loop), key=lambda task: task.get_name())
    return "\n".join(
        "\n".join((task.get_name(), *(f"  {place}" for place in places(task.get_coro()))))
        for task in tasks
    )


def places(awaiting: Any) -> Iterator[str]:
    """Where a suspended coroutine waits: its Python frames, outermost first."""
    while awaiting is not None:
        frame = getattr(awaiting, "cr_frame", None) or getattr(awaiting, "ag_frame", None)
        if frame is not None:
            code = frame.f_code
            yield f"{code.co_qualname} ({code.co_filename}:{frame.f_lineno})"
        awaiting = getattr(awaiting, "cr_await", None) or getattr(awaiting, "ag_await", None)
