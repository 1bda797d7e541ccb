"""`pie-async serve` and signals: what runs is finished or told, nothing stays, the status is 0."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
from contextlib import contextmanager

import pytest

from pie_async.resilience.process import LEAVE_S
from tests.resilience.test_serve_survives import ask, children

pytestmark = pytest.mark.realtime

LONG = {"prompt": "To be, or", "max_tokens": 400, "temperature": 0, "ignore_eos": True,
        "stream": True, "n": 4}  # fmt: skip


@contextmanager
def a_server(*flags: str):
    """(process, port)"""
    command = [sys.executable, "-m", "pie_async", "serve", "--port", "0", "--device-kv", "16MiB"]
    with subprocess.Popen(
        [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            line = process.stdout.readline()
            assert "http://" in line, process.stderr.read()
            yield process, int(line.split("/v1")[0].rsplit(":", 1)[1])
        finally:
            process.kill()


def first_event(reply) -> None:
    while not reply.readline().startswith(b"data: "):
        pass


def last_event(reply) -> bytes:
    return [line for line in reply if line.startswith(b"data: ")][-1].strip()


def ended(process, *, within_s: float) -> None:
    began_s = time.monotonic()
    _, errors = process.communicate(timeout=within_s + 20.0)
    assert process.returncode == 0, errors
    assert time.monotonic() - began_s < within_s
    assert "Traceback" not in errors


def test_what_runs_is_finished_within_the_timeout_and_nothing_new_admitted():
    with a_server("--shutdown-timeout", "60") as (process, port):
        engines = children(process.pid)
        with ask(port, {**LONG, "max_tokens": 60}) as reply:
            first_event(reply)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            with pytest.raises((urllib.error.URLError, ConnectionError)):
                ask(port, LONG)
            assert last_event(reply) == b"data: [DONE]"
        ended(process, within_s=15.0)
        assert not any(os.path.exists(f"/proc/{engine}") for engine in engines)


@pytest.mark.parametrize("flags", [(), ("--in-process",)], ids=["apart", "in-process"])
def test_what_outlasts_the_timeout_ends_with_an_error_event(flags):
    with a_server("--shutdown-timeout", "0.1", *flags) as (process, port):
        with ask(port, LONG) as reply:
            first_event(reply)
            process.send_signal(signal.SIGTERM)
            error = json.loads(last_event(reply).removeprefix(b"data: "))["error"]
            assert error["code"] == "engine_stopped"
        ended(process, within_s=15.0)


def test_a_second_signal_does_not_wait_even_for_an_engine_that_hangs():
    with a_server("--shutdown-timeout", "600") as (process, port):
        (engine,) = children(process.pid)
        with ask(port, LONG) as reply:
            first_event(reply)
            os.kill(engine, signal.SIGSTOP)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert b"engine_stopped" in last_event(reply)
        ended(process, within_s=LEAVE_S + 15.0)  # then it is killed
        assert not os.path.exists(f"/proc/{engine}")
