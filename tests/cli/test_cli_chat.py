"""`pie-async chat` in a real terminal: Ctrl-C, Ctrl-D, and what it remembers."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time

import pytest

from pie_async.__main__ import main
from pie_async.cli.chat import LoopThread

pytestmark = pytest.mark.realtime
SMALL = ["--device-kv", "2MiB", "--host-pool", "32MiB"]


def _in_foreground() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C


class Terminal:
    """A command with a terminal of its own, in the foreground there."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "pie_async", "chat", *SMALL, *arguments],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            preexec_fn=_in_foreground, env={**os.environ, "TERM": "dumb"},
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        time.sleep(0.3)  # what is typed while readline sets the terminal up is lost
        os.write(self._ours, text.encode())

    def wait_for(self, pattern: str, *, within_s: float = 60) -> None:
        """Until it shows; what came up to there is forgotten."""
        until_s = time.monotonic() + within_s
        while (match := re.search(pattern, self.seen)) is None:
            assert time.monotonic() < until_s, f"no {pattern!r} in {self.seen!r}"
            if select.select([self._ours], [], [], 0.2)[0]:
                self.seen += os.read(self._ours, 65536).decode(errors="replace")
        self.seen = self.seen[match.end() :]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def terminal():
    opened = Terminal("-n", "3000", "--temperature", "0")
    yield opened
    opened.close()


def test_ctrl_c_ends_the_answer_alone_and_ctrl_d_the_conversation(terminal) -> None:
    terminal.wait_for("Ctrl-D ends")
    terminal.wait_for("> ")
    terminal.type("Who goes there?\n")
    terminal.wait_for(r"(?s)there\?\r\n.{20}")  # it answers
    terminal.type("\x03")
    terminal.wait_for(r"\[stopped\]")
    terminal.wait_for("> ")
    terminal.type("\x03")
    terminal.wait_for("/new starts anew")
    terminal.type("/new\n")  # else how far the first answer came decides how long this one is
    terminal.wait_for("> ")
    terminal.type("Who goes there?\n")
    terminal.wait_for(r"(?s)there\?\r\n.{20}")
    terminal.type("\x03")
    terminal.wait_for(r"\[stopped\]")
    terminal.type("\x04")
    assert terminal.process.wait(30) == 0


def test_a_second_ctrl_c_at_the_prompt_ends_it(terminal) -> None:
    terminal.wait_for("> ")
    terminal.type("\x03")
    terminal.wait_for("> ")
    terminal.type("\x03")
    assert terminal.process.wait(30) == 130


def told(monkeypatch, capsys, lines: str, *arguments: str) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert main(["chat", *SMALL, "-n", "12", "--temperature", "0", *arguments]) == 0
    return capsys.readouterr().out


def test_what_was_said_is_remembered_until_a_new_beginning(monkeypatch, capsys) -> None:
    twice = told(monkeypatch, capsys, "Who goes there?\nWho goes there?\n")
    anew = told(monkeypatch, capsys, "Who goes there?\n/new\nWho goes there?\n")
    half = len(anew) // 2
    assert anew[:half] == anew[half:] != ""
    assert twice != anew


def test_a_failed_call_does_not_leave_the_loop_behind() -> None:
    async def fail() -> None:
        raise ValueError("no")

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="no"), LoopThread() as loop:
        loop.call(fail())
    assert "pie-loop" not in {thread.name for thread in threading.enumerate()}
    assert signal.getsignal(signal.SIGINT) is handler
